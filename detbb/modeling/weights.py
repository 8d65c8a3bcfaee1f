"""Pretrained backbone weights: read without running code, renamed to torchvision's names, and accounted for."""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from detbb.core.errors import UserError, some
from detbb.core.files import BadFile, load_tensors
from detbb.modeling.numpy_pickle import read_arrays

# ImageNet's RGB mean and standard deviation on the scale 0 … 255: what torchvision's weights expect.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
MIN_COVERAGE = 0.9
KINDS = ("loaded", "missing", "wrong shape", "unexpected", "not used")

# Dicts and prefixes that checkpoints wrap a backbone in, outermost first.
WRAPPERS = ("model", "state_dict", "model_state_dict", "blobs")
PREFIXES = ("_orig_mod.", "module.", "model.", "encoder_q.", "backbone.", "bottom_up.", "body.")

# Detectron2's MSRA models are Caffe2's: R-50.pkl holds names such as res2_0_branch2a_bn_s.
CAFFE2 = (
    (r"_", "."),
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
    (r"\.bn\.(s|gamma)$", ".norm.weight"),
    (r"\.bn\.(bias|beta)$", ".norm.bias"),
    (r"\.bn\.(rm|running\.mean)$", ".norm.running_mean"),
    (r"\.bn\.(riv|running\.var)$", ".norm.running_var"),
    (r"^(?:res\.)?conv1\.", "stem.conv1."),
    (r"\.branch1\.", ".shortcut."),
    (r"\.branch2([abc])\.", lambda m: f".conv{'abc'.index(m[1]) + 1}."),
)
DETECTRON2 = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.", ""),
    (r"^res([2-5])\.", lambda m: f"layer{int(m[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)
Renames = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

CONVERT = (
    "; weights are read without running code, and a pickle can run any; if you trust it, convert it once: python -c "
    '"import pickle,torch; d={load}; '
    "d=d.get('model',d.get('state_dict',d.get('blobs',d))) if isinstance(d,dict) else d; "
    "d=d.state_dict() if hasattr(d,'state_dict') else d; "
    "torch.save({{k:torch.as_tensor(v) for k,v in d.items() if hasattr(v,'dtype')}},'OUT.pth')\""
)
LOAD_PICKLE = "pickle.load(open('IN','rb'),encoding='latin1')"
LOAD_TORCH = "torch.load('IN',map_location='cpu',weights_only=False)"


@dataclass
class Coverage:
    """What became of a module's tensors and a file's.

    sizes: {kind: {tensor name: elements}} for `loaded`, `missing`, `wrong shape`, `unexpected` (in the file only) and
    `not used` (the classifier and stages that were not built). state: everything that was read, float32, under
    torchvision's names, for `Head.load_backbone_weights`. notes: what a user should know.
    """

    source: str
    state: dict[str, Tensor]
    sizes: dict[str, dict[str, int]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    notes: list[str] = field(default_factory=list)

    def share(self, kind: str) -> float:
        """The elements of a kind over all elements of the module (`unexpected` and `not used` can exceed 1)."""
        whole = sum(sum(self.sizes[k].values()) for k in ("loaded", "missing", "wrong shape"))
        return sum(self.sizes[kind].values()) / max(whole, 1)

    def table(self) -> str:
        """The account as plain text: tensors, parameters (with statistics), percent of the module, names."""
        lines = [f"backbone weights from {self.source}", f"{'':12}{'tensors':>8}{'parameters':>13}{'%':>8}"]
        for kind, sizes in self.sizes.items():
            row = f"{kind:12}{len(sizes):8}{sum(sizes.values()):13,}{100 * self.share(kind):8.2f}"
            lines.append(row + ("" if kind == "loaded" else f"  {some(sizes, 4)}").rstrip())
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def load_backbone_weights(backbone: nn.Module, source: str) -> Coverage:
    """Load weights into a `Backbone`, and account for every tensor.

    source: `imagenet` (torchvision's IMAGENET1K_V1, checked by hash, downloaded if not there; V1 because torchvision's
    own detectors start from it), or a file (.pth .pt .pkl .safetensors; naming of torchvision, timm, Detectron2, Caffe2
    or MMDetection; wrappers such as `state_dict` and `module.` are peeled; a checkpoint of detbb is fine). No code of
    the file runs.

    Raises: UserError: unreadable, holds code, NaN or inf, or covers less than 90 % of the backbone; nothing is loaded.
    """
    notes: list[str] = []
    if source == "imagenet":
        state = _imagenet(str(backbone.arch))
    else:
        state, notes = to_torchvision(read_tensors(Path(source)))
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(f"backbone.weights: {source}: NaN or infinite values in {some(broken, 4)}")
    coverage = load_part(backbone, state, source=source)
    coverage.notes[:0] = notes
    return coverage


def load_part(module: nn.Module, state: dict[str, Tensor], *, prefix: str = "", source: str = "the file") -> Coverage:
    """Load what `state` has under `prefix` (`layer4.` for a C4 head), and account for every tensor.

    state: tensors under torchvision's names. Raises: UserError: less than 90 % of `module` covered; nothing is loaded.
    """
    part = Coverage(source, state)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    wanted = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    _account_for_statistics(state, wanted, part.notes)
    for name, tensor in wanted.items():
        found = state.get(name)
        kind = "missing" if found is None else "loaded" if found.shape == tensor.shape else "wrong shape"
        part.sizes[kind][name] = tensor.numel()
    stages = {name.split(".")[0] for name in wanted}
    for name, tensor in state.items():
        stage = name.split(".")[0]
        if name not in wanted and not name.endswith("num_batches_tracked"):
            unused = not prefix and stage not in stages and (stage == "fc" or stage.startswith("layer"))
            part.sizes["not used" if unused else "unexpected"][name] = tensor.numel()
    if part.share("loaded") < MIN_COVERAGE:
        missing, wrong = (some(part.sizes[kind], 4) for kind in ("missing", "wrong shape"))
        raise UserError(
            f"backbone.weights: {source} covers {100 * part.share('loaded'):.1f} % of "
            f"{getattr(module, 'arch', prefix.rstrip('.'))}, at least {100 * MIN_COVERAGE:.0f} % are needed; missing: "
            f"{missing}; wrong shape: {wrong}; it has: {some(state, 4)}"
        )
    counters = {k: v for k, v in state.items() if k.endswith("num_batches_tracked")}
    module.load_state_dict({**counters, **{k: state[k] for k in part.sizes["loaded"]}}, strict=False)
    return part


def read_tensors(path: Path) -> dict[str, Any]:
    """What a weight file holds, on the CPU. Raises: UserError: missing, damaged, or with objects other than tensors."""
    if not path.is_file():
        raise UserError(f"backbone.weights: {str(path)!r} is no file; valid are null, imagenet and a file")
    try:
        content = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
    except BadFile as error:
        pickled = path.suffix == ".pkl" and not zipfile.is_zipfile(path)
        content = read_arrays(path) if pickled else None
        if content is None:
            hint = ""
            if "other than" in str(error) and (
                pickled or path.open("rb").read(1) in (b"\x80", b"P")
            ):  # or it is no pickle
                hint = CONVERT.format(load=LOAD_PICKLE if pickled else LOAD_TORCH)
            raise UserError(f"backbone.weights: {error}{hint}") from error
    except SafetensorError as error:
        raise UserError(f"backbone.weights: {path}: not a whole safetensors file ({error})") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"backbone.weights: {path} holds a {kind}; valid is a dict of tensors by name")
    return content


def to_torchvision(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """(float32 copies of a checkpoint's backbone tensors under torchvision's names, notes)."""
    while inner := next((content[w] for w in WRAPPERS if isinstance(content.get(w), Mapping)), None):
        content = inner
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    pixels = [next((v for k, v in state.items() if k.endswith(name)), None) for name in ("pixel_mean", "pixel_std")]
    state = {k.replace("roi_heads.res5.", "backbone.res5."): v for k, v in state.items()}  # Detectron2's C4 head
    for prefix in PREFIXES:
        if any(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    notes: list[str] = []
    if caffe2 := "conv1_w" in state:
        state = {k: v for k, v in _rename(state, CAFFE2).items() if not k.endswith("momentum")}
    if detectron2 := any(k.startswith(("stem.conv1.", "res2.")) for k in state):
        state = _rename(state, DETECTRON2)
    state = {k: v.float().clone() if v.is_floating_point() else v.clone() for k, v in state.items()}
    if detectron2:
        notes.append(_take_over_pixels(state, *pixels))
        if caffe2 or "BGR" in notes[-1]:
            notes.append("MSRA's ResNets have their stride in the 1x1 convolution, these in the 3x3 (torchvision's)")
    return state, notes


def _imagenet(arch: str) -> dict[str, Tensor]:
    try:
        entry = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"]
    except (KeyError, ValueError) as error:
        raise UserError(f"backbone.weights: torchvision has no ImageNet weights for {arch}; valid is a file") from error
    try:
        return dict(entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True))
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(f"backbone.weights: cannot fetch {entry.url} into {folder} ({error})") from error


def _rename(state: Mapping[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _take_over_pixels(state: dict[str, Tensor], mean: Tensor | None, std: Tensor | None) -> str:
    """Make conv1 expect RGB with ImageNet's mean and std where the file says what it expects; else a note to do so."""
    imagenet_mean, imagenet_std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    mean, std = (None if t is None or t.numel() != 3 else t.flatten().float() for t in (mean, std))
    conv1 = state.get("conv1.weight")
    if mean is None or std is None or conv1 is None:
        return (
            "Detectron2's MSRA models (also its model zoo's) expect BGR pixels of 0 … 255 less the mean, with std 1; "
            "the file does not say, so conv1 is as it is. If it is one of them, reverse conv1's input channels and "
            f"multiply them by ImageNet's std {PIXEL_STD}"
        )
    order = "RGB" if (mean - imagenet_mean).abs().max() < (mean.flip(0) - imagenet_mean).abs().max() else "BGR"
    if order == "BGR":
        mean, std, conv1 = mean.flip(0), std.flip(0), conv1.flip(1)
    if (mean - imagenet_mean).abs().max() > 1:
        return f"the file expects a pixel mean of {mean.tolist()} (RGB), not ImageNet's; conv1 is as it is"
    state["conv1.weight"] = conv1 * (imagenet_std / std).view(1, 3, 1, 1)
    return f"conv1 was made for {order} pixels with std {std.tolist()}; it is converted to RGB and ImageNet's std"


def _account_for_statistics(state: dict[str, Tensor], wanted: Mapping[str, Tensor], notes: list[str]) -> None:
    has, needs = (any(k.endswith("running_mean") for k in names) for names in (state, wanted))
    if needs and not has:
        for name, tensor in wanted.items():
            affine = f"{name.rpartition('.')[0]}.weight"
            if name.endswith(("running_mean", "running_var")) and affine in state:
                state[name] = torch.full_like(tensor, float(name.endswith("running_var")))
        notes.append(
            "the file has no running statistics: mean 0 and variance 1 are taken, which is right where they are folded "
            "into weight and bias (MSRA's models), and wrong for a network trained with GroupNorm"
        )
    if has and not needs:
        notes.append("the file's running statistics have no place in this norm: features differ from the original's")
