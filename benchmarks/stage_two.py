"""Stage two, a branch on a frozen backbone and neck: epochs with the feature cache against torchvision's way.

    python benchmarks/stage_two.py                          # R50, 256 x 256, batch 8: semantic, classify, fcos
    python benchmarks/stage_two.py --head semantic --images 32 --repeats 2 --json stage_two.json

torchvision's way: its backbone with FPN, frozen, in every step's forward pass, and SGD; data and head are detbb's own
in both. Also: what the first epoch costs more than one without a cache, and how far later ones are from the floor:
the head's forward, backward and update on features that are in memory already.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timing
import torch
import torchvision
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detbb.config.schema import Config, DataConfig
from detbb.data.feature_store import Store
from detbb.data.formats import read_split
from detbb.data.formats.shapes import generate_shapes
from detbb.data.loader import train_loader
from detbb.detector import build_detector
from detbb.distributed.processes import wrap
from detbb.feature_cache import setup as cache_setup
from detbb.feature_cache.cache import FeatureCache
from detbb.feature_cache.frozen_prefix import FrozenPrefix
from detbb.heads import find_head
from detbb.structures.annotations import Annotations
from detbb.training import optim
from detbb.training.step import TrainState, train_step

HEADS: dict[str, dict[str, Any]] = {"semantic": {}, "classify": {"multi_label": True}, "fcos": {}}


class Setting:
    """One head on generated images: a config, its data, and a fresh training state."""

    def __init__(self, head: str, options: Any, folder: Path) -> None:
        self.head, self.batch = head, options.batch
        root = generate_shapes(folder, "train", options.images)
        source = DataConfig(image_size=[options.size] * 2, augment="none", pad="source")
        source.train.images, source.train.annotations = str(root / "images"), str(root / "annotations.json")
        if head == "semantic":
            source.format, source.classes = "semantic", str(root / "classes.json")
            source.train.annotations = str(root / "masks")
        self.config = Config(data={"made": source}, output_dir=str(folder / "run"))
        self.config.backbone.arch = options.arch
        self.config.heads = {"it": find_head(head).Config(type=head, data="made", **HEADS[head])}
        self.config.train.batch_size, self.config.train.workers = options.batch, options.workers
        self.config.train.cache_features = "memory"
        found = read_split(source, "train", "made")
        assert found is not None
        self.data: Annotations = found
        self.steps = len(self.data) // options.batch

    def make_state(self) -> TrainState:
        torch.manual_seed(0)
        detector = build_detector(self.config, {"it": self.data.classes}).freeze(["backbone", "neck"]).train()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        made = TrainState(detector, None, self.config.train, torch.device("cpu"), scaler)
        made.optimizer, made.model = optim.build_optimizer(detector, self.config.optimizer), wrap(detector)
        made.prefix = FrozenPrefix(detector, self.config.train)
        return made

    def with_cache(self, made: TrainState) -> FeatureCache:
        """An empty cache in memory before the state's prefix."""
        data = {"made": self.data}
        cache, _ = cache_setup.with_cache(made.prefix, self.config, made.detector, data=data, steps=1000 * self.steps)
        assert isinstance(cache, FeatureCache)
        return cache

    def batches(self, epoch: int, made: TrainState | None) -> Any:
        stores = made.prefix.stores if made is not None and isinstance(made.prefix, FeatureCache) else None
        return train_loader(
            {"made": self.data},
            self.config,
            needs={"made": frozenset({"semantic"} if self.head == "semantic" else ())},
            start_step=epoch * self.steps,
            end_step=(epoch + 1) * self.steps,
            stores=stores,
        )

    def epochs(self, made: TrainState) -> Callable[[], None]:
        """Each call trains one epoch more."""
        number = iter(range(10**6))

        def epoch() -> None:
            for batch in self.batches(next(number), made):
                train_step(made, [batch], lr=1e-4, stop=lambda: 0, folder=Path("."), step=0)

        return epoch

    def reference(self) -> Callable[[], None]:
        """The loop of torchvision's references, with its backbone and FPN, and this head."""
        resnet = torchvision.models.get_model(self.config.backbone.arch, norm_layer=torchvision.ops.FrozenBatchNorm2d)
        extra = LastLevelP6P7(256, 256)
        body = _resnet_fpn_extractor(resnet, 0, returned_layers=[2, 3, 4], extra_blocks=extra).requires_grad_(False)
        head = self.make_state().detector.head("it").to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.SGD(head.parameters(), 1e-4, 0.9, weight_decay=1e-4)
        normalize = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        number = iter(range(10**6))

        def epoch() -> None:
            for batch in self.batches(next(number), None):
                features = dict(
                    zip(("p3", "p4", "p5", "p6", "p7"), body(normalize(batch.images / 255)).values(), strict=True)
                )
                total = sum(head.loss(head(features, batch.sizes), batch).values())
                assert torch.isfinite(total)
                optimizer.zero_grad()
                total.backward()
                optimizer.step()

        return epoch

    def floor(self) -> Callable[[], None]:
        """Steps on batches whose features are in memory already."""
        made = self.make_state()
        given = [made.prefix(batch.to(torch.device("cpu"))) for batch in self.batches(0, None)]
        optimizer, head = made.optimizer, made.detector.head("it")

        def epoch() -> None:
            for batch in given:
                total = torch.stack(list(head.loss(head(batch.precomputed.levels, batch.sizes), batch).values())).sum()
                optimizer.zero_grad(set_to_none=True)
                total.backward()
                optimizer.step()

        return epoch


def compare(head: str, options: Any, folder: Path) -> list[dict[str, Any]]:
    setting = Setting(head, options, folder)
    measure = {"repeats": options.repeats, "warm_up": 1, "cpu_time": options.cpu_time}
    name = f"{options.arch} {head}"
    made = setting.make_state()
    cache, prefix, epoch = setting.with_cache(made), made.prefix, setting.epochs(made)
    plan = cache.stores["made"].plan

    def uncached() -> None:
        made.prefix = prefix
        epoch()

    def first() -> None:
        made.prefix = FeatureCache(prefix, {"made": Store(plan)})
        epoch()

    rows = [timing.row(f"{name}: first epoch", timing.in_turn({"no cache": uncached, "cache": first}, **measure))]
    made.prefix = cache
    candidates = {"torchvision": setting.reference(), "cache": epoch, "floor": setting.floor()}
    seconds = timing.in_turn(candidates, **measure)
    rows.append(timing.row(f"{name}: later epochs", {n: seconds[n] for n in ("torchvision", "cache")}))
    rows.append(timing.row(f"{name}: from the floor", {n: seconds[n] for n in ("cache", "floor")}))
    timing.show(rows)
    return rows


def main() -> None:
    parser = timing.arguments(__doc__ or "", repeats=5)
    parser.add_argument("--head", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for head in options.head:
            rows += compare(head, options, Path(folder))
    timing.finish(options.json, rows)


if __name__ == "__main__":
    main()
