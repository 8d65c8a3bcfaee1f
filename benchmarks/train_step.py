"""A training step of detbb against torchvision's model in its reference loop: the same weights, batch and losses.

    python benchmarks/train_step.py                       # R50 and R18, FCOS and RetinaNet, 320 x 320, batch 2
    python benchmarks/train_step.py --arch resnet18 --head fcos --repeats 5 --json step.json

Cases: nothing frozen, stem and layer1, the whole backbone; then the frozen prefix alone, and where a step's time goes.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timing
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detbb.config.schema import Config
from detbb.detector import build_detector
from detbb.distributed.processes import wrap
from detbb.feature_cache.frozen_prefix import FrozenPrefix, last_frozen
from detbb.heads import find_head
from detbb.structures.batch import Batch, ImageSize, Target
from detbb.training import optim
from detbb.training.step import TrainState, train_step

CLASSES = [f"class {i}" for i in range(80)]
CASES = {"nothing frozen": [], "stem and layer1": ["backbone.stem", "backbone.layer1"], "backbone": ["backbone"]}
TRAINABLE_LAYERS = {"nothing frozen": 5, "stem and layer1": 3, "backbone": 0}


def made_batch(size: int, images: int, boxes: int = 7) -> Batch:
    """Random pixels and boxes."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, size, size), generator=g, dtype=torch.uint8)
    targets = []
    for index in range(images):
        corner = torch.rand(boxes, 2, generator=g) * size * 0.6
        xyxy = torch.cat([corner, corner + size * (0.05 + 0.3 * torch.rand(boxes, 2, generator=g))], dim=1)
        labels = torch.randint(0, len(CLASSES), (boxes,), generator=g)
        present = torch.zeros(len(CLASSES), dtype=torch.bool)
        present[labels] = True
        targets.append(Target(index, ImageSize((size, size), (size, size)), index, xyxy, labels, present))
    return Batch(pixels, targets, "made")


def reference(arch: str, head: str, *, trainable: int, size: int) -> nn.Module:
    """torchvision's detector on the same backbone, with frozen batch norms."""
    torch.manual_seed(0)
    resnet = torchvision.models.get_model(arch, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    extra = LastLevelP6P7(256, 256)
    backbone = _resnet_fpn_extractor(resnet, trainable, returned_layers=[2, 3, 4], extra_blocks=extra)
    kind = {"fcos": FCOS, "retinanet": RetinaNet}[head]
    with contextlib.redirect_stdout(io.StringIO()):
        return kind(backbone, len(CLASSES), min_size=size, max_size=size).train()


def reference_step(model: nn.Module, batch: Batch) -> Callable[[], dict[str, float]]:
    """references/detection/engine.py: forward, reduce for the log, check, backward, step."""
    images = [image.float() / 255 for image in batch.images]
    targets = [{"boxes": t.boxes, "labels": t.labels} for t in batch.targets]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-6, 0.9, weight_decay=1e-4)

    def step() -> dict[str, float]:
        losses = model(images, targets)
        total = sum(losses.values())
        assert torch.isfinite(total)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return {name: value.item() for name, value in losses.items()}

    return step


def make_state(arch: str, head: str, freeze: list[str], peer: nn.Module) -> TrainState:
    """detbb's detector with the peer's weights, as a training phase starts it; no average, as in the peer."""
    config = Config()
    config.backbone.arch = arch
    config.heads = {"it": find_head(head).Config(type=head, data="made")}
    config.optimizer.lr = 1e-6
    detector = build_detector(config, {"it": CLASSES})
    detector.load_state_dict(renamed(peer.state_dict(), set(detector.state_dict())))
    detector.freeze(freeze).train()
    made = TrainState(detector, None, config.train, torch.device("cpu"), torch.amp.GradScaler("cpu", enabled=False))
    made.optimizer, made.model = optim.build_optimizer(detector, config.optimizer), wrap(detector)
    made.prefix = FrozenPrefix(detector, config.train) if last_frozen(detector) else None
    return made


def renamed(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """torchvision's detector keys as detbb's."""
    ours = {}
    for name, tensor in state.items():
        name = name.replace("backbone.body.", "backbone.").replace("head.", "heads.it.", 1)
        name = name.replace("backbone.fpn.extra_blocks.", "neck.")
        for index, (layer, level) in enumerate((("layer2", "p3"), ("layer3", "p4"), ("layer4", "p5"))):
            name = name.replace(f"backbone.fpn.inner_blocks.{index}.", f"neck.inner.{layer}.")
            name = name.replace(f"backbone.fpn.layer_blocks.{index}.", f"neck.output.{level}.")
        ours[name] = tensor
    return ours | {name: torch.tensor(0) for name in wanted if name.endswith("num_batches_tracked")}


def step_of(made: TrainState, batch: Batch) -> Callable[[], dict[str, Tensor]]:
    options: dict[str, Any] = {"lr": 1e-6, "stop": lambda: 0, "folder": Path("."), "step": 0}
    return lambda: train_step(made, [batch], **options).losses


def breakdown(made: TrainState, batch: Batch, repeats: int) -> dict[str, float]:
    """Medians in ms of a step's parts."""
    times: dict[str, list[float]] = {}
    batch = batch.to(torch.device("cpu"))
    for _ in range(repeats + 1):
        marks = [time.perf_counter()]
        given = made.prefix(batch) if made.prefix is not None else batch
        marks.append(time.perf_counter())
        features = (
            made.detector.forward_from(given.precomputed)
            if given.precomputed
            else made.detector.features(batch.images, batch.sizes)
        )
        marks.append(time.perf_counter())
        head = made.detector.head("it")
        output = head(features, batch.sizes)
        marks.append(time.perf_counter())
        total = torch.stack(list(head.loss(output, batch).values())).sum()
        marks.append(time.perf_counter())
        total.backward()
        marks.append(time.perf_counter())
        made.optimizer.step()
        made.optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        parts = ("frozen prefix", "backbone and neck", "head", "loss", "backward", "update")
        for part, a, b in zip(parts, marks, marks[1:], strict=False):
            times.setdefault(part, []).append(1e3 * (b - a))
    return {part: sorted(values[1:])[repeats // 2] for part, values in times.items()}


def compare(arch: str, head: str, options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, parts = [], {}
    batch = made_batch(options.size, options.batch)
    for case, freeze in CASES.items():
        peer = reference(arch, head, trainable=TRAINABLE_LAYERS[case], size=options.size)
        made = make_state(arch, head, freeze, peer)
        theirs, ours = reference_step(peer, batch), step_of(made, batch)
        a, b = sum(theirs().values()), float(sum(ours().values()))
        assert abs(a - b) < 1e-2 * abs(a), f"not the same computation: losses {a} and {b}"
        name = f"{arch} {head}, {case}"
        seconds = timing.in_turn(
            {"torchvision": theirs, "detbb": ours}, repeats=options.repeats, cpu_time=options.cpu_time
        )
        rows.append(timing.row(name, seconds))
        timing.show(rows[-1:])
        parts[name] = breakdown(made, batch, min(options.repeats, 5))
        print("    " + "   ".join(f"{part} {ms:.1f}" for part, ms in parts[name].items()) + " ms", flush=True)
    prefix, x = made.prefix, made.detector.normalize(batch.images, batch.sizes).contiguous()
    candidates = {
        "torchvision": lambda: peer.backbone.body(x),
        "detbb": lambda: prefix.levels(batch.images, batch.sizes),
    }
    rows.append(
        timing.row(
            f"{arch} {head}, frozen backbone alone",
            timing.in_turn(candidates, repeats=options.repeats, cpu_time=options.cpu_time),
        )
    )
    timing.show(rows[-1:])
    return rows, parts


def main() -> None:
    parser = timing.arguments(__doc__ or "", repeats=15)
    parser.add_argument("--arch", nargs="+", default=["resnet50", "resnet18"])
    parser.add_argument("--head", nargs="+", default=["fcos", "retinanet"], choices=["fcos", "retinanet"])
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    parts: dict[str, Any] = {}
    for arch in options.arch:
        for head in options.head:
            found = compare(arch, head, options)
            rows += found[0]
            parts |= found[1]
    timing.finish(options.json, rows, breakdown_ms=parts)


if __name__ == "__main__":
    main()
