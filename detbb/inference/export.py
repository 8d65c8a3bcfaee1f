"""ONNX of a checkpoint with all its branches, from the image to what `decode` gives, checked against PyTorch.

PyTorch's TorchScript exporter is used, not `dynamo=True`: detections are as many as there are, and NMS, RoIAlign and
the loops of torchvision's detection modules have ONNX forms there.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from detbb.checkpoint.content import opened, restore_detector
from detbb.config.schema import Config
from detbb.core.errors import UserError
from detbb.core.files import check_output, write_atomically
from detbb.core.machine import check_batch
from detbb.data.images import BadImage, list_images, read_image
from detbb.detector import Detector
from detbb.structures.batch import BATCH_STRIDE, ImageSize, round_up
from detbb.structures.predictions import Predictions

OPSET = 18
TOLERANCE = 1e-4  # in units of SCALES; of the largest value for what is not a detection
MIN_MATCHED = 0.99  # of the detections; NMS and thresholds may decide the other way where numbers are nearly equal
SCALES = {"boxes": 0.0, "scores": 1.0, "labels": 1.0, "masks": 10.0, "keypoints": 0.0}  # 0: the longest side


class ExportDiffers(RuntimeError):
    """The ONNX model does not compute what PyTorch does; no file was written."""


@dataclass
class Export:
    """What was written: outputs by name with their shapes, and per head how much was compared and how it differs."""

    path: Path
    size: tuple[int, int]
    images: int  # that both were run on
    shapes: dict[str, tuple[int | str, ...]]
    checks: dict[str, Check] = field(default_factory=dict)

    def lines(self) -> list[str]:
        height, width = self.size
        made = [f"{self.path}: input image uint8 (1, 3, {height}, {width}) RGB"]
        made += [f"  output {name} ({', '.join(map(str, shape))})" for name, shape in self.shapes.items()]
        return made + [f"  {name}: {check.line(self.images)}" for name, check in self.checks.items()]


@dataclass
class Check:
    """One head's ONNX results beside PyTorch's over all images, in units of what TOLERANCE is relative to."""

    difference: float = 0.0
    detections: int | None = None  # None: not a head that detects
    unmatched: int = 0  # of both sides

    def line(self, images: int) -> str:
        if self.detections == 0:
            return f"WARNING: nothing was detected on the {images} images of the check, so nothing was compared"
        what = f"{images} images" if self.detections is None else f"{self.detections} detections on {images} images"
        tail = f", {self.unmatched} without a partner" if self.unmatched else ""
        return f"equal to PyTorch on {what}: largest difference {self.difference:.1e}{tail}"

    @property
    def passes(self) -> bool:
        most = 0 if self.detections is None else (1 - MIN_MATCHED) * 2 * self.detections
        return self.difference <= TOLERANCE and self.unmatched <= most


class ExportModule(nn.Module):
    """(1, 3, H, W) uint8 RGB -> what every head decodes, as a flat tuple; `names` says what each entry is."""

    def __init__(self, detector: Detector, heads: Sequence[str], size: tuple[int, int]) -> None:
        super().__init__()
        self.detector, self.heads, self.size = detector, list(heads), ImageSize(size, size)
        self.names: list[str] = []

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        detector = self.detector
        features = detector.neck(detector.backbone((image.float() - detector.pixel_mean) / detector.pixel_std))
        heads, sizes = {n: detector.head(n) for n in self.heads}, [self.size]
        decoded = {n: head.decode(head(features, sizes), sizes)[0] for n, head in heads.items()}
        named = {f"{n}.{k}": v for n, said in decoded.items() for k, v in vars(said).items() if v is not None}
        self.names = list(named)
        return tuple(named.values())


def export_onnx(
    checkpoint: str | Path,
    output: str | Path,
    *,
    size: tuple[int, int] | None = None,
    heads: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Export:
    """Write a checkpoint's branches, as they are evaluated, to one ONNX file, and say how it compares with PyTorch.

    The input `image` is one (1, 3, H, W) uint8 RGB image that fills H x W; normalisation is inside. Outputs are
    `<head>.<field>` of `Predictions`, in pixels of that image: `boxes` (n, 4) xyxy, `scores` (n,), `labels` (n,),
    `masks` (n, 28, 28), `keypoints` (n, K, 3), `semantic` (C, H, W) logits, `probabilities` (C,), `values` (C,). The
    metadata entry `detbb` holds the classes of each head as JSON.

    size: H, W; by default `image_size` of the first head's data. heads: all, or these.
    Raises: UserError: an argument cannot be used, or `onnx` is not installed; ExportDiffers: the check failed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f"export needs onnx and onnxruntime ({error}); valid: pip install 'detbb[export]'") from error
    content, config, chosen = opened(checkpoint, heads)
    size = _checked_size(config, chosen, size)
    output = Path(output)
    check_output(output, overwrite=overwrite)
    whole = ExportModule(restore_detector(content).float(), chosen, size).eval()
    images = check_images(config, size)
    model = onnx.load_from_string(_trace(whole, images[-1]))
    onnx.helper.set_model_props(model, {"detbb": json.dumps(_description(whole, content))})
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    shapes = {o.name: tuple(d if isinstance(d, int) else "n" for d in o.shape) for o in session.get_outputs()}
    export = Export(output, size, len(images), shapes)
    for image in images:
        with torch.inference_mode():
            expected = whole(image)
        found = [torch.from_numpy(np.asarray(v)) for v in session.run(None, {"image": image.numpy()})]
        compare(export.checks, _by_head(whole.names, expected), _by_head(whole.names, found), side=max(size))
    if wrong := {name: check for name, check in export.checks.items() if not check.passes}:
        raise ExportDiffers(f"ONNX differs from PyTorch, nothing was written: {wrong}")
    write_atomically(output, lambda file: file.write(data))
    return export


def compare(
    checks: dict[str, Check], expected: dict[str, Predictions], found: dict[str, Predictions], *, side: int
) -> None:
    """Add one image to each head's check. Detections are paired by nearness: equal scores may come in another order."""
    for name, reference in expected.items():
        check = checks.setdefault(name, Check(detections=None if reference.boxes is None else 0))
        if check.detections is None:
            for field_name, value in vars(reference).items():
                if value is not None:
                    gap = (value - getattr(found[name], field_name)).abs().max() / value.abs().max().clamp(min=1)
                    check.difference = max(check.difference, float(gap))
            continue
        rows, columns = _vectors(reference, side), _vectors(found[name], side)
        check.detections += len(rows)
        if not len(rows) or not len(columns):
            check.unmatched += len(rows) + len(columns)
            continue
        gaps = torch.cdist(rows, columns, p=torch.inf)
        nearest = torch.cat([gaps.min(0).values, gaps.min(1).values])
        check.unmatched += int((nearest > TOLERANCE).sum())
        check.difference = max([check.difference, *nearest[nearest <= TOLERANCE].tolist()])


def check_images(config: Config, size: tuple[int, int]) -> list[Tensor]:
    """Images (1, 3, H, W) uint8 to run both on: up to two of each val folder that is here, and one made up."""
    pictures = []
    for source in config.data.values():
        folder = Path((source.val and source.val.images) or "")
        for name in list_images(folder)[0][:2] if folder != Path() and folder.is_dir() else ():
            try:
                pictures.append(read_image(folder / name, source.max_pixels))
            except BadImage:
                continue
    noise = np.random.default_rng(0)
    pictures.append(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8))  # enlarged: blotches of all colours
    resized = [cv2.resize(p, (size[1], size[0]), interpolation=cv2.INTER_LINEAR) for p in pictures]
    return [torch.from_numpy(p).permute(2, 0, 1)[None].contiguous() for p in resized]


def _checked_size(config: Config, heads: Sequence[str], size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        short, longest = config.data[config.heads[heads[0]].data].image_size
        size = round_up(short), round_up(longest)
    check_batch(1, size, "--size or data.<name>.image_size")
    if any(s < BATCH_STRIDE or s % BATCH_STRIDE for s in size):
        raise UserError(f"--size: {size[0]} {size[1]}; valid are multiples of {BATCH_STRIDE}")
    return size


def _trace(whole: ExportModule, image: Tensor) -> bytes:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants that the fixed size makes right, and of the exporter's age
        whole(image)
        file = Path(folder) / "model.onnx"
        names: dict[str, Any] = {"input_names": ["image"], "output_names": whole.names}
        torch.onnx.export(whole, (image,), file, opset_version=OPSET, dynamo=False, **names)
        return file.read_bytes()


def _description(whole: ExportModule, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "heads": {name: {"classes": content["classes"][name]["names"]} for name in whole.heads},
        "input": "image: uint8 RGB, filling the whole input",
        "step": content["step"],
        "versions": content["versions"],
    }


def _by_head(names: Sequence[str], values: Sequence[Tensor]) -> dict[str, Predictions]:
    said: dict[str, dict[str, Tensor]] = {}
    for name, value in zip(names, values, strict=True):
        head, _, field_name = name.partition(".")
        said.setdefault(head, {})[field_name] = value
    return {head: Predictions(**fields) for head, fields in said.items()}


def _vectors(said: Predictions, side: int) -> Tensor:
    """(n, D) detections as points whose distance is in units of SCALES; labels are a whole 1 apart."""
    found = [(getattr(said, name), scale or side) for name, scale in SCALES.items()]
    return torch.cat([(v[:, None] / scale).flatten(1) for v, scale in found if v is not None], dim=1)
