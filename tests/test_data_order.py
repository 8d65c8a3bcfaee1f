"""Which images a step gets, and how they are augmented, follows from (seed, step) alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import box, shapes_config, shapes_split
from PIL import Image
from torch import Tensor

from detbb.config.schema import Config, DataConfig, SplitConfig, TrainConfig
from detbb.core.errors import UserError
from detbb.data.formats import read_split
from detbb.data.loader import TrainDataset, eval_loader, train_loader
from detbb.data.sample import SampleReader
from detbb.data.sampler import MicroBatch, SampleKey, SampleOrder, SourceSchedule, StepSampler, hash_seed
from detbb.inference.evaluate import ground_truth
from detbb.structures.batch import Batch
from detbb.structures.predictions import Predictions

NEEDS = {"shapes": frozenset({"boxes", "masks", "keypoints"})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def batches(config: Config, first: int, last: int, share: tuple[int, int] = (0, 1)) -> list[Batch]:
    sources = {"shapes": shapes_split(config)}
    loader = train_loader(
        sources, config, needs=NEEDS, start_step=first, end_step=last, rank=share[0], world_size=share[1]
    )
    return list(loader)


def tensors(batch: Batch) -> list[Tensor]:
    parts = [(t.boxes, t.labels, t.image_labels, t.masks, t.keypoints) for t in batch.targets]
    return [batch.images, *(p for part in parts for p in part if p is not None)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return [[(t.image_id, t.seed, t.size) for t in x.targets] for x in a] == [
        [(t.image_id, t.seed, t.size) for t in x.targets] for x in b
    ] and all(torch.equal(s, t) for x, y in zip(a, b, strict=True) for s, t in zip(tensors(x), tensors(y), strict=True))


def test_workers_do_not_change_order_or_pixels(folder: Path) -> None:
    reference = batches(shapes_config(folder), 0, 9)
    assert len(reference) == 9 and all(b.images.shape[0] == 8 and b.source == "shapes" for b in reference)
    for workers in (2, 4):
        assert same(batches(shapes_config(folder, workers=workers), 0, 9), reference)
    assert not same(batches(shapes_config(folder).model_copy(update={"seed": 4}), 0, 9), reference)


def test_the_global_random_state_neither_matters_nor_moves(folder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = batches(shapes_config(folder, workers=2), 0, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    np.random.seed(1)
    assert same(batches(shapes_config(folder, workers=2), 0, 2), first)


def test_a_loader_that_starts_later_gives_the_tail(folder: Path) -> None:
    for accumulate in (1, 2):
        config = shapes_config(folder, accumulate=accumulate)
        whole = batches(config, 0, 11)
        for step in (1, 4, 10):
            assert same(batches(config, step, 11), whole[step * accumulate :])


def test_every_image_comes_once_an_epoch_augmented_anew(folder: Path) -> None:
    config = shapes_config(folder, train=32)
    found = batches(config, 0, 12)
    epochs = [[t.image_id for b in found[k : k + 4] for t in b.targets] for k in (0, 4, 8)]
    assert all(sorted(e) == list(range(1, 33)) for e in epochs) and epochs[0] != epochs[1]
    pixels = {}
    for batch in found:
        for image, target in zip(batch.images, batch.targets, strict=True):
            pixels.setdefault(target.image_id, set()).add(image.numpy().tobytes())
    assert sum(len(versions) == 3 for versions in pixels.values()) >= 24  # sizes in 77 … 96 pixels, mirrored or not
    assert len({t.seed for b in found for t in b.targets}) == 12 * 8


@pytest.mark.parametrize(("images", "batch"), [(10, 4), (8, 4), (3, 8), (1, 4), (97, 16)])
@pytest.mark.parametrize("grouped", [False, True])
def test_nothing_is_dropped_or_repeated_in_an_epoch(images: int, batch: int, grouped: bool) -> None:
    landscape = np.arange(images) % 3 > 0 if grouped else None
    order = SampleOrder(images, batch, seed=1, landscape=landscape)
    blocks = 6
    per_block = -(-images // batch)
    stream = [key for turn in range(blocks * per_block) for key in order.batch(turn)]
    assert len(stream) == blocks * per_block * batch
    whole_epochs = len(stream) // images
    for epoch in range(whole_epochs):
        assert sorted(i for e, i in stream if e == epoch) == list(range(images))
    again = SampleOrder(images, batch, seed=1, landscape=landscape)
    assert again.batch(blocks * per_block - 1) == stream[-batch:]  # without having seen what comes before


def test_grouping_leaves_at_most_one_mixed_batch_a_block() -> None:
    landscape = np.random.default_rng(0).random(1000) < 0.6
    order = SampleOrder(1000, 16, seed=2, landscape=landscape)
    kinds = [{bool(landscape[i]) for _, i in order.batch(t)} for t in range(63)]
    assert sum(len(k) == 2 for k in kinds) <= 1
    firsts = [next(iter(k)) for k in kinds]
    assert sum(a != b for a, b in pairwise(firsts)) > 10  # orientations alternate at random


def test_streams_of_a_coco_sized_set_are_all_different() -> None:
    streams = {hash_seed(0, epoch, image) for epoch in range(3) for image in range(118_000)}
    assert len(streams) == 3 * 118_000 and max(streams) < 2**63
    assert (
        hash_seed(1, 2) != hash_seed(2, 1)
        and hash_seed(0) != hash_seed(0, 0)
        and hash_seed(5) == hash_seed(5)
        and hash_seed(-1) >= 0
    )


def test_sources_take_turns_by_weight_and_prefixes_are_stable() -> None:
    schedule = SourceSchedule({"a": 2, "b": 1, "c": 0.5})
    late = [schedule.source_at(s) for s in range(70)]
    assert [SourceSchedule({"a": 2, "b": 1, "c": 0.5}).source_at(s) for s in (69, 3)] == [late[69], late[3]]
    assert Counter(n for n, _ in late) == {"a": 40, "b": 20, "c": 10}
    for name in "abc":
        assert [t for n, t in late if n == name] == list(range(sum(n == name for n, _ in late)))
    for start in range(50):  # smooth: no window is far from the weights
        assert abs(sum(n == "a" for n, _ in late[start : start + 7]) - 4) <= 1
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"data\.a\.weight"):
            SourceSchedule({"a": weight})


def test_visits_count_across_phases_that_change_the_sources() -> None:
    """Source a alone, a and b, b alone, all: no turn comes twice, none is left out, and prefixes stay."""
    phases = [(0, ["a"]), (10, ["b", "a"]), (30, ["b"]), (35, ["a", "b", "c"])]
    schedule = SourceSchedule({"a": 1, "b": 1, "c": 2}, phases)
    found = [schedule.source_at(s) for s in range(75)]
    for name in "abc":
        assert [t for n, t in found if n == name] == list(range(sum(n == name for n, _ in found)))
    assert found[9:12] == [("a", 9), ("a", 10), ("b", 0)] and {n for n, _ in found[30:35]} == {"b"}
    assert Counter(n for n, _ in found[10:30]) == {"a": 10, "b": 10}
    assert Counter(n for n, _ in found[35:]) == {"a": 10, "b": 10, "c": 20}
    assert SourceSchedule({"a": 1, "b": 1, "c": 2}, phases).source_at(74) == found[74]
    assert [SourceSchedule({"a": 3, "b": 1}, [(0, ["a", "b"])]).source_at(s) for s in range(20)] == [
        SourceSchedule({"a": 3, "b": 1}).source_at(s) for s in range(20)
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_share_the_same_images(accumulate: int) -> None:
    def keys(rank: int, processes: int) -> list:
        orders = {"s": SampleOrder(30, 8, seed=0)}
        return list(
            StepSampler(
                SourceSchedule({"s": 1}), orders, steps=range(6), accumulate=accumulate, share=(rank, processes)
            )
        )

    alone = keys(0, 1)
    assert len(alone) == 6 * accumulate
    for processes in (2, 4):
        shares = [keys(r, processes) for r in range(processes)]
        joined = [[key for share in shares for key in share[m]] for m in range(len(alone))]
        assert joined == [list(m) for m in alone] and all(s[0].everyone == list(alone[0]) for s in shares)


@pytest.mark.parametrize("augment", ["default", [{"type": "RandomRotate90", "p": 1}]])
def test_processes_pad_alike_and_see_the_pixels_of_one_process(folder: Path, augment: object) -> None:
    config = shapes_config(folder, augment=augment)
    alone = batches(config, 0, 6)
    shares = [batches(config, 0, 6, (rank, 2)) for rank in range(2)]
    for whole, left, right in zip(alone, *shares, strict=True):
        assert torch.equal(whole.images, torch.cat([left.images, right.images]))
        assert all(
            torch.equal(a.boxes, b.boxes) for a, b in zip(whole.targets, left.targets + right.targets, strict=True)
        )


def test_evaluation_groups_do_not_depend_on_processes(folder: Path) -> None:
    config = shapes_config(folder)
    data = shapes_split(config, "val")

    def run(rank: int, processes: int, workers: int = 0) -> list[Batch]:
        loader = eval_loader(
            data, config.data["shapes"], batch_size=4, workers=workers, rank=rank, world_size=processes
        )
        return list(loader)

    alone = run(0, 1, workers=2)
    assert sorted(t.image_id for b in alone for t in b.targets) == data.image_ids.tolist()
    shares = [run(r, 3) for r in range(3)]
    for k, batch in enumerate(alone):
        other = shares[k % 3][k // 3]
        assert torch.equal(batch.images, other.images) and [t.size for t in batch.targets] == [
            t.size for t in other.targets
        ]


def spoil(config: Config, *indices: int) -> list[str]:
    data = shapes_split(config)
    for i in indices:
        data.path(i).write_bytes(b"")
    return [data.file_names[i] for i in indices]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_stop_the_run_or_are_replaced_and_reported(tmp_path: Path, workers: int) -> None:
    config = shapes_config(tmp_path, workers=workers, train=24)
    names = spoil(config, 3, 4)
    with pytest.raises(UserError, match=r"00000[45]\.png: is empty") as error:
        batches(config, 0, 4)
    assert "\n" not in str(error.value)
    config.data["shapes"].on_bad_image = "skip"
    found = batches(config, 0, 12)
    ids = Counter(t.image_id for b in found for t in b.targets)
    assert ids[4] == ids[5] == 0 and ids[6] == 4 * 3 and ids[1] == 4  # image 6 stands in for both
    reports = [r for b in found for r in b.bad_images]
    assert all(any(n in r for n in names) for r in reports) and len(reports) == 4 * 3
    assert same(found, batches(config, 0, 12))
    spoil(config, *range(24))
    with pytest.raises(UserError, match="none of 24 images"):
        batches(config, 0, 1)


def test_the_stand_in_of_a_bad_image_leaves_the_padding(tmp_path: Path) -> None:
    """Image 0 is small and bad, those after it are larger: each process must know so without reading."""
    sides = [(40, 60), (96, 90), (64, 96), (96, 96)]
    images = [{"id": i + 1, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sides)]
    for i, (h, w) in enumerate(sides):
        Image.fromarray(np.full((h, w, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "0.png").write_bytes(b"")
    content = {"images": images, "annotations": [box(1, 2, [0, 0, 9, 9])], "categories": [{"id": 3, "name": "x"}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    split = SplitConfig(images=str(tmp_path), annotations=str(tmp_path / "x.json"))
    for augment in ("default", "none", [{"type": "RandomRotate90", "p": 0.5}]):
        source = DataConfig(train=split, image_size=[96, 96], augment=augment, on_bad_image="skip")
        data = read_split(source, "train", "mine")
        config = Config(device="cpu", data={"mine": source}, train=TrainConfig(batch_size=2, workers=0))
        options = {"needs": {"mine": frozenset()}, "start_step": 0, "end_step": 8}
        alone = list(train_loader({"mine": data}, config, **options))
        shares = [list(train_loader({"mine": data}, config, **options, rank=r, world_size=2)) for r in (0, 1)]
        for whole, left, right in zip(alone, *shares, strict=True):
            assert torch.equal(whole.images, torch.cat([left.images, right.images]))
        assert sum(len(b.bad_images) for b in alone) == 4


def test_a_step_costs_the_same_in_a_set_of_any_size(tmp_path: Path) -> None:
    data = shapes_split(shapes_config(tmp_path, train=4))
    many = replace(data, image_ids=np.arange(2_000_000), labels=np.zeros(2_000_000, np.int32))
    source = shapes_config(tmp_path).data["shapes"]
    dataset = TrainDataset({"shapes": SampleReader(many, source, train=True)})
    tracemalloc.start()
    try:
        key = SampleKey("shapes", 0, 1, 0)
        dataset.__getitems__(MicroBatch([key], [key]))
        ground_truth(many, 1, like=Predictions(boxes=torch.zeros(0, 4)))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_a_size_that_annotations_claim_is_not_allocated(tmp_path: Path) -> None:
    data = shapes_split(shapes_config(tmp_path, train=4))
    huge = replace(data, sizes=np.full_like(data.sizes, 200_000))
    source = shapes_config(tmp_path).data["shapes"].model_copy(update={"on_bad_image": "skip"})
    (batch,) = eval_loader(huge, source, batch_size=4)
    assert len(batch.bad_images) == 4 and batch.images.shape == (4, 3, 96, 96)


def test_a_bad_image_is_evaluated_as_black_if_skipped(tmp_path: Path) -> None:
    config = shapes_config(tmp_path)
    data = shapes_split(config)
    spoil(config, 3)
    with pytest.raises(UserError, match="is empty"):
        list(eval_loader(data, config.data["shapes"], batch_size=4))
    config.data["shapes"].on_bad_image = "skip"
    found = list(eval_loader(data, config.data["shapes"], batch_size=4))
    assert sorted(t.image_id for b in found for t in b.targets) == data.image_ids.tolist()
    assert sum(len(b.bad_images) for b in found) == 1
    assert [t.image_id for b in found for i, t in zip(b.images, b.targets, strict=True) if not i.any()] == [4]


def test_targets_cross_processes_without_open_files(folder: Path) -> None:
    config = shapes_config(folder, workers=2)
    loader = train_loader({"shapes": shapes_split(config)}, config, needs=NEEDS, start_step=0, end_step=30)
    held = list(islice(loader, 30))
    opened = len(os.listdir("/proc/self/fd"))
    assert opened < 30 * (2 + 8) + 100 and len(held) == 30  # the images and at most the masks: not each small tensor


CHILD = """
import os, sys, time
from datasets import shapes_config, shapes_split
from detbb.data.loader import train_loader
from pathlib import Path
config = shapes_config(Path(sys.argv[1]), workers=2)
data, needs = {"shapes": shapes_split(config)}, {"shapes": frozenset()}
loader = iter(train_loader(data, config, needs=needs, start_step=0, end_step=9999))
next(loader)
children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
print(*children, flush=True)
while True:
    next(loader)
    time.sleep(0.01)
"""


def test_workers_ignore_signals_and_end_with_their_parent(folder: Path) -> None:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests / "support"), str(tests.parent)])}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert process.stdout is not None
        workers = [int(w) for w in process.stdout.readline().split()]
        assert len(workers) >= 2
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None and all(alive(w) for w in workers)
    finally:
        process.kill()
        process.wait()
    end = time.monotonic() + 20
    while any(alive(w) for w in workers) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(alive(w) for w in workers)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
