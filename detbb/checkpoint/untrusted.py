"""What a checkpoint or branch file from anybody may ask for: what its own tensors bear out, and no more.

docs/reliability.md lists what was looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from detbb.config.schema import Config
from detbb.core.errors import UserError
from detbb.core.files import view_of
from detbb.detector import Detector, build_detector

# The largest number (for a list: and its length) of stored settings that no tensor's shape bears out.
LIMITS = {
    "data.*.image_size": 16_384,
    "data.*.max_pixels": 1_000_000_000,
    "train.timeout_s": 10_000_000,
    "eval.batch_size": 1_024,
    "log.images": 256,
    "heads.*.detections_per_image": 10_000,
    "heads.*.topk_candidates": 100_000,
    "heads.*.rpn_pre_nms_test": 100_000,
    "heads.*.rpn_post_nms_test": 100_000,
    "heads.*_resolution": 128,
    "heads.*.roi_sampling_ratio": 16,
    "heads.*.anchor_*": 4_096,
}
MAX_ENTRIES = 100_000  # of all lists and sections together
MAX_LIST = 64  # of those that LIMITS names
MAX_TEXT = 10_000
DRAWS = ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_")


def check_values(config: Mapping[str, Any], origin: str) -> None:
    """Refuse a stored configuration that would take memory or time out of proportion. Raises: UserError."""
    for count, (at, value) in enumerate(_entries(config, "")):
        if count > MAX_ENTRIES:
            raise UserError(f"{origin}: more than {MAX_ENTRIES:,} entries")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise UserError(f"{origin}: {at[:100]} has {len(value):,} characters, at most {MAX_TEXT:,} are valid")
        if type(value) is int and abs(value) >= 2**63:
            raise UserError(f"{origin}: {at[:100]} is a whole number beyond 64 bits")
        most = next((limit for pattern, limit in LIMITS.items() if fnmatchcase(at, pattern)), None)
        if most is None:
            continue
        if isinstance(value, list) and len(value) > MAX_LIST:
            raise UserError(f"{origin}: {at[:100]} has {len(value):,} entries, at most {MAX_LIST} are valid in a file")
        if isinstance(value, int | float) and value > most:
            raise UserError(f"{origin}: {at[:100]} is {value:,}, at most {most:,} is valid in a file")


def _entries(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Every value below `value` by its path; entries of a list have the list's path."""
    yield at, value
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _entries(item, f"{at}.{key}" if at else str(key))
    for item in value if isinstance(value, list | tuple) else ():
        yield from _entries(item, at)


def build_exactly(config: Config, classes: Mapping[str, Any], given: Mapping[str, Tensor]) -> Detector:
    """A detector with the tensors of `given`, whose shapes were checked by `check_shapes`."""
    with _WithoutDraws():
        detector = build_detector(config, classes)
    detector.load_state_dict(given)
    return detector


def check_shapes(config: Config, classes: Mapping[str, Any], given: Mapping[str, Tensor], problem: str) -> None:
    """Compare the tensors that a detector would have with those given, before memory is taken for it.

    Raises: UserError: `problem`, and the tensors that do not fit.
    """
    own = planned_state(config, classes, problem, most=len(given))
    if wrong := sorted(set(own) ^ set(given)) or [n for n in own if own[n].shape != given[n].shape]:
        raise UserError(f"{problem}: {', '.join(name[:200] for name in wrong[:5])}")
    if _elements(own) > _elements(given):
        raise UserError(f"{problem}: several names of the file share one tensor, the detector has one for each")


def _elements(tensors: Mapping[str, Tensor]) -> int:
    """How many numbers the tensors hold together; tied ones count once."""
    return sum({view_of(tensor): tensor.numel() for tensor in tensors.values()}.values())


def planned_state(config: Config, classes: Mapping[str, Any], problem: str, *, most: int) -> dict[str, Tensor]:
    """A detector's tensors by name, without memory for their values (on the meta device).

    most: tensors that are there. Raises: UserError: `problem`; far more parameters, or numbers that cannot be built.
    """
    left = 2 * most + 2_000  # a backbone is built whole, and the stages that nobody reads are dropped

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"{problem}: its config asks for far more than the {most} tensors that are there")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return dict(build_detector(config, classes).state_dict())
    except UserError:
        raise
    except Exception as error:
        if not any(":" in part.type for part in config.heads.values()) and ":" not in config.backbone.arch:
            line = " ".join(str(error).split())[:200]
            raise UserError(f"{problem}: it cannot be built ({type(error).__name__}: {line})") from error
    finally:
        hook.remove()
    # A part of the user's own may need values while it is built.
    return dict(build_detector(config, classes).state_dict())


class _WithoutDraws(TorchFunctionMode):
    """Leaves out the random initialisation of tensors that a file's values replace."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
