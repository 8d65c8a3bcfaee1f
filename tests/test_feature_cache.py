"""The feature cache: the losses of the uncached run, each image computed once, and nothing stale, whatever happens."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch
from learning import small_config, small_detector
from runs import learned, lines, tiny_config

from detbb.config.schema import DataConfig
from detbb.core.cache import FOLDERS_FILE
from detbb.core.errors import Stopped, UserError
from detbb.data import feature_store
from detbb.data.feature_store import Plan, Store, open_folder
from detbb.data.formats import read_split
from detbb.data.loader import train_loader
from detbb.data.sample import SampleReader
from detbb.feature_cache import setup as cache_setup
from detbb.feature_cache.cache import RELEASE_AFTER, FeatureCache
from detbb.feature_cache.frozen_prefix import FrozenPrefix

pytestmark = pytest.mark.usefixtures("unsynced", "thin_resnets")

training = importlib.import_module("detbb.training.loop")
FLIPS = "data.shapes.augment=[{type: HorizontalFlip, p: 0.5}, {type: VerticalFlip, p: 0.5}]"
POLICIES = {  # augmentation, variants an image
    "none": (["data.shapes.augment=none"], 1),
    "flips": ([FLIPS], 4),
    "views": (["data.shapes.views=2", "data.shapes.pad=source"], 2),
    "own": (["data.shapes.views=2", "data.shapes.augment=[{type: GaussNoise, p: 0.5}, {type: HorizontalFlip}]"], 2),
}
SMALL = (
    "freeze=[backbone, neck]",
    "train.steps=8",
    "data.shapes.train.size=8",
    "data.shapes.val=null",
    "ema=null",
    "schedule.warmup_steps=0",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture
def computed(monkeypatch):
    """How many images each call of a prefix computed."""
    counts: list[int] = []
    levels = FrozenPrefix.levels

    def counted(self, images, sizes):
        counts.append(len(images))
        return levels(self, images, sizes)

    monkeypatch.setattr(FrozenPrefix, "levels", counted)
    return counts


def run(folder, images, *overrides, name="run", data=SMALL):
    config = tiny_config(folder, *data, *overrides, name=name, data=images)
    training.train(config)
    return Path(config.output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_cached_losses_are_equal_and_each_view_is_computed_once(policy, tmp_path, images, computed):
    """In double, where rounding cannot hide anything: 8 steps, 4 epochs."""
    augment, variants = POLICIES[policy]
    plain = run(tmp_path, images, *augment, "train.precision=fp64", name="plain")
    assert sum(computed) == 32
    computed.clear()
    cached = run(tmp_path, images, *augment, "train.precision=fp64", "train.cache_features=memory", name="cached")
    assert 8 * min(variants, 2) <= sum(computed) <= 8 * variants and set(computed) == {1}
    for a, b in zip(lines(plain, "train"), lines(cached, "train"), strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], rel=1e-9) for k in a if isinstance(a[k], float))
    said = (cached / "log.txt").read_text()
    assert " GB in memory, 0 % stored" in said and ("feature cache: 100 % stored" in said or policy == "flips")


def test_the_prefix_rests_while_nothing_is_missing(source):
    rested: list[int] = []
    missed = []
    prefix = SimpleNamespace(
        after="neck",
        levels=lambda images, sizes: {n: f[None] for n, f in levels(1.0).items()},
        release=lambda: rested.append(cache.step),
    )
    store = Store(PLAN)
    cache = FeatureCache(prefix, {"made": store})
    for cache.step, batch in enumerate(
        loader_of(source.annotations, source.config, batch_size=2, steps=60, store=store)
    ):
        if cache.step == 30:
            store._index[:] = 0
            store._trusted[:] = 0
        missed += [cache.step] * (len(batch.images) > 0)
        cache(batch)
    assert missed[:2] == [0, 1] and 30 <= missed[2] <= missed[-1] < 40
    assert rested == [1 + RELEASE_AFTER, missed[-1] + RELEASE_AFTER]


def test_fp32_losses_differ_by_rounding_alone(tmp_path, images):
    plain = run(tmp_path, images, "data.shapes.augment=none", "train.steps=1", name="plain")
    cached = run(tmp_path, images, "data.shapes.augment=none", "train.steps=1", "train.cache_features=memory", name="c")
    (a,), (b,) = lines(plain, "train"), lines(cached, "train")
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.fixture
def stop_at(monkeypatch):
    """Sends this process a SIGTERM in step `at[0]`."""
    at: list[int] = []
    step = training.train_step

    def stopping(*args, **options):
        if at and options["step"] == at[0]:
            at.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **options)

    monkeypatch.setattr(training, "train_step", stopping)
    return at


@pytest.mark.slow
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(place, tmp_path, images, stop_at, computed):
    options = (FLIPS, f"train.cache_features={place}", "train.workers=1")
    whole = run(tmp_path, images, *options, f"train.cache_dir={tmp_path}/a", name="whole")
    once = sum(computed)
    computed.clear()
    stop_at.append(4)
    options = (*SMALL, *options, f"train.cache_dir={tmp_path}/b")
    config = tiny_config(tmp_path, *options, name="stopped", data=images)
    with pytest.raises(Stopped):
        training.train(config)
    training.train(config, resume="auto")
    assert learned(whole) == learned(tmp_path / "stopped")
    assert sum(computed) <= once + 8 if place == "disk" else sum(computed) > once  # memory is gone with the process


def test_another_branch_on_the_same_backbone_computes_nothing(tmp_path, images, computed):
    options = ("data.shapes.augment=none", "train.cache_features=disk")
    run(tmp_path, images, *options, name="first")
    assert sum(computed) == 8
    computed.clear()
    other = ("heads.shapes.num_convs=2", "seed=0", "optimizer.lr=0.002", "train.batch_size=2", "train.workers=1")
    run(tmp_path, images, *options, *other, name="second")
    assert computed == [] and len(list((tmp_path / "feature_cache").iterdir())) == 1
    assert ", 100 % stored" in (tmp_path / "second" / "log.txt").read_text()
    run(tmp_path, images, *options, "seed=1", name="other_weights")  # random ones here
    assert sum(computed) == 8


def test_a_full_disk_ends_storing_and_nothing_else(tmp_path, images, monkeypatch, computed):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    cached = run(tmp_path, images, "data.shapes.augment=none", "train.cache_features=disk")
    assert sum(computed) == 32 and (cached / "log.txt").read_text().count("the disk is full") == 1


# --- what is not cached, and why


REFUSED = {
    "set data.shapes.views (4, for example), or use flips only": ["data.shapes.augment=default"],
    "change the size of images": ["data.shapes.augment=[{type: RandomScale}]", "data.shapes.views=2"],
    "pad: source": ["data.shapes.views=2"],
    "different sizes": ["data.shapes.augment=none", "data.shapes.image_size=[64, 128]"],
    "train.cache_limit_gb 1e-05": ["data.shapes.augment=none", "train.cache_limit_gb=0.00001"],
    "no phase freezes the whole backbone": ["data.shapes.augment=none", "freeze=[backbone.stem, backbone.layer1]"],
    "are free for each process in": ["data.shapes.augment=none"],
}


@pytest.mark.slow
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_work_is_refused_at_start_auto_says_why(reason, tmp_path, images, monkeypatch):
    if "free" in reason:
        monkeypatch.setattr(cache_setup.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    for wanted in ("memory", "disk"):
        with pytest.raises(UserError, match=rf"train\.cache_features: '{wanted}', but .*") as error:
            run(tmp_path, images, f"train.cache_features={wanted}", *REFUSED[reason])
        assert reason in str(error.value)
    quiet = run(tmp_path, images, *REFUSED[reason], "train.cache_features=auto", "train.steps=1", name="auto")
    said = (quiet / "log.txt").read_text()
    assert "feature cache: not used in this phase" in said or "cache_features auto: not used, because" in said
    if "no phase" not in reason:
        assert " ".join(reason.split()) in " ".join(said.split())


def test_auto_says_when_a_phase_is_too_short_to_pay(tmp_path, images):
    short = run(tmp_path, images, "data.shapes.augment=none", "train.cache_features=auto", "train.steps=2")
    assert "not used, because this phase is 1 passes over data.shapes long" in (short / "log.txt").read_text()


# --- nothing stale


@pytest.fixture
def source(tmp_path):
    """A reader of four images of its own, which tests may change."""
    config = DataConfig(format="shapes", augment="none", image_size=[64, 64])
    config.train.images, config.train.size = str(tmp_path / "own"), 4
    return SampleReader(read_split(config, "train", "made"), config, train=True)


PLAN = Plan(images=4, variants=1, hw=(64, 64), levels={"p3": (8, 8, 3), "p4": (4, 4, 3)}, dtype=torch.float32)


def levels(value):
    return {name: torch.full((c, h, w), value) + torch.rand(c, h, w) for name, (h, w, c) in PLAN.levels.items()}


def filled(store, reader):
    for index in range(4):
        store.put(store.find(reader, index, 0), levels(index))
    return store


def hits(store, reader):
    return [store.find(reader, index, 0).is_stored for index in range(4)]


@pytest.fixture
def on_disk(tmp_path, source):
    """Opens the store again, as a new run does."""
    folder = open_folder(tmp_path / "cache", "what 1", PLAN)
    assert hits(Store(PLAN, folder), source) == [False] * 4
    filled(Store(PLAN, folder), source)
    return lambda: Store(PLAN, open_folder(tmp_path / "cache", "what 1", PLAN)), folder


def test_a_new_run_finds_what_was_stored(on_disk, source):
    store = on_disk[0]()
    assert hits(store, source) == [True] * 4 and store.filled == 4


def test_a_changed_image_of_same_size_and_time_is_no_hit(on_disk, source):
    reopened, _ = on_disk
    running = reopened()
    assert hits(running, source) == [True] * 4
    path = source.path(1)
    before, content = os.stat(path), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for store in (reopened(), running):
        assert hits(store, source) == [True, False, True, True]
    path.unlink()
    assert hits(running, source) == [True, False, True, True]


def test_an_image_that_changes_while_it_is_read_is_not_stored(on_disk, source):
    store = on_disk[0]()
    path = source.path(2)
    path.write_bytes(path.read_bytes() + b"\0")
    entry = store.find(source, 2, 0)
    assert not entry.is_stored and store.checked(entry, source, 2) == entry
    path.write_bytes(path.read_bytes() + b"\0")
    again = store.checked(entry, source, 2)
    assert again.image_sha256 == b""
    store.put(again, levels(2))
    assert not store.find(source, 2, 0).is_stored


@pytest.mark.parametrize("part", ["index", "features"])
def test_altered_or_torn_bytes_are_no_hit(part, on_disk, source):
    reopened, folder = on_disk
    spoil(folder / FOLDERS_FILE, part)
    assert hits(reopened(), source) == [True, False, False, True]


def spoil(file, part):
    """Flip a bit of entry 1, and make the second half of entry 2 one that never arrived."""
    size = {"index": 64, "features": PLAN.record}[part]
    features = file.stat().st_size - 4 * PLAN.record
    first = features - 4 * 64 if part == "index" else features
    with open(file, "r+b") as target:
        target.seek(first + size)
        byte = target.read(1)[0]
        target.seek(first + size)
        target.write(bytes([byte ^ 1]))
        target.seek(first + 2 * size + size // 2)
        target.write(bytes(size // 2))


BUGS = {  # what is planted, and what it gives for an altered image, altered bytes, and a kill between bytes and row
    "hashes of names": ("_sha256", lambda *parts: bytes(32 * [len(parts)]), [True] * 4),
    "unchecked records": ("_sha256", lambda *parts: hashlib.sha256(parts[0]).digest(), [True, False, True, True]),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_gives_hits_that_are_stale(bug, tmp_path, source, monkeypatch):
    name, planted, expected = BUGS[bug]
    monkeypatch.setattr(feature_store, name, planted)
    folder = open_folder(tmp_path / "cache", "", PLAN)
    filled(Store(PLAN, folder), source)
    spoil(folder / FOLDERS_FILE, "features")
    source.path(1).write_bytes(source.path(2).read_bytes())
    assert hits(Store(PLAN, folder), source) == expected


def test_a_store_is_a_safetensors_file_that_says_what_it_is_of(on_disk):
    with safetensors.safe_open(on_disk[1] / FOLDERS_FILE, "np") as file:
        assert file.metadata()["about"] == "what 1"
        assert file.get_tensor("index").any(1).all() and file.get_tensor("features").shape == (4, PLAN.record)


def test_folders_unused_for_a_month_are_removed_and_others_kept(on_disk, tmp_path):
    (tmp_path / "cache" / "mine").mkdir()
    users = tmp_path / "cache" / ("d" * 32)  # also named by a digest
    users.mkdir()
    for name in (FOLDERS_FILE, "photo.jpg"):
        (users / name).touch()
    (tmp_path / "cache" / f"{'d' * 32}.jpg").touch()
    for path in (tmp_path / "cache").iterdir():
        os.utime(path, (1, 1))
    used = open_folder(tmp_path / "cache", "what 2", PLAN)
    assert {f.name for f in (tmp_path / "cache").iterdir()} == {"mine", users.name, f"{users.name}.jpg", used.name}
    assert len(list(users.iterdir())) == 2


def test_an_entry_whose_row_was_not_written_yet_is_no_hit(tmp_path, source):
    """A kill between data and index."""
    store = Store(PLAN, open_folder(tmp_path / "cache", "what 2", PLAN))
    entry = store.find(source, 0, 0)
    store._write(entry.slot, torch.rand(PLAN.record // 4).view(torch.uint8).numpy())
    assert not store.find(source, 0, 0).is_stored


def test_a_folder_of_something_else_is_refused(tmp_path):
    folder = open_folder(tmp_path / "cache", "what 1", PLAN)
    with pytest.raises(UserError, match="is not what this run would write there; remove it"):
        open_folder(tmp_path / "cache", "what 1", dataclasses.replace(PLAN, images=5))
    with open(folder / FOLDERS_FILE, "r+b") as file:
        file.write(bytes(9))
    with pytest.raises(UserError, match="remove it"):
        open_folder(tmp_path / "cache", "what 1", PLAN)


def _name(config, detector, reader):
    cache, _ = cache_setup._plan(config, detector, detector.frozen, source="made", annotations=reader.annotations)
    return cache_setup._about(config, detector, "made", cache, reader)


def _change_weight(config, detector, reader):
    with torch.no_grad():
        detector.backbone.layer2[0].conv1.weight[3, 2, 1, 1] += 1e-7


def _change_statistic(config, detector, reader):
    detector.backbone.layer3[1].bn2.running_var[5] *= 1.0000002


def _change_eps(config, detector, reader):
    detector.backbone.layer3[1].bn2.eps = 1e-3


def _rename_image(config, detector, reader):
    reader.annotations.image_ids[0] += 1


CHANGES = {
    "weight": _change_weight,
    "statistic": _change_statistic,
    "eps": _change_eps,
    "image list": _rename_image,
    "input scale": lambda c, d, r: d.pixel_std.mul_(1.001),
    "frozen part": lambda c, d, r: d.freeze(["backbone"]),
    "image size": lambda c, d, r: setattr(c.data["made"], "image_size", [32, 32]),
    "augmentation": lambda c, d, r: setattr(c.data["made"], "augment", [{"type": "HorizontalFlip"}]),
    "stored as": lambda c, d, r: setattr(c.train, "cache_dtype", "bf16"),
    "fold": lambda c, d, r: setattr(c.train, "fold_frozen", "off"),
    "precision": lambda c, d, r: setattr(c.train, "precision", "bf16"),
    "levels": lambda c, d, r: setattr(c.heads["objects"], "levels", ["p4", "p5"]),
    "version": lambda c, d, r: setattr(cache_setup, "_VERSIONS", ("torch", "numpy")),
}
KEPT = {
    "head": lambda c, d, r: d.head("objects").apply(lambda m: [p.data.zero_() for p in m.parameters()]),
    "learning rate": lambda c, d, r: setattr(c.optimizer, "lr", 1.0),
    "seed": lambda c, d, r: setattr(c, "seed", 5),
    "boxes": lambda c, d, r: r.annotations.boxes_xywh.__iadd__(1.0),
}


@pytest.mark.parametrize("what", [*CHANGES, *KEPT])
def test_the_folder_follows_from_what_features_depend_on(what, source, monkeypatch):
    monkeypatch.setattr(cache_setup, "_VERSIONS", cache_setup._VERSIONS)
    config = small_config()
    config.data = {"made": source.config}
    detector = small_detector(config)
    detector.sources = {"objects": "made"}
    detector.freeze(["backbone", "neck"]).train()
    before = _name(config, detector, source)
    assert before == _name(config, detector, source)
    (CHANGES | KEPT)[what](config, detector, source)
    reader = SampleReader(source.annotations, config.data["made"], train=True, seed=config.seed)
    assert (_name(config, detector, reader) != before) == (what in CHANGES)


def test_code_and_attributes_from_outside_give_another_folder(tmp_path, source, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = """
import torch
from torch import nn
class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 1.0
        self.register_buffer("shift", torch.zeros(1), persistent=False)
    def forward(self, x):
        return torch.relu(x) * self.scale + self.shift
"""
    names = []
    for code in (text, text, text.replace("torch.relu", "torch.sigmoid")):
        (tmp_path / "gate.py").write_text(code)
        sys.modules.pop("gate", None)
        importlib.invalidate_caches()
        config = small_config()
        config.data = {"made": source.config}
        detector = small_detector(config)
        detector.backbone.relu = gate = importlib.import_module("gate").Gate()
        detector.sources = {"objects": "made"}
        detector.freeze(["backbone", "neck"]).train()
        names.append(_name(config, detector, source))
    assert names[0] == names[1] != names[2]
    gate.scale = 2.0
    names.append(_name(config, detector, source))
    gate.shift += 1
    names.append(_name(config, detector, source))
    assert len(set(names)) == 4
    monkeypatch.setattr(type(gate), "__module__", "made_in_memory")
    with pytest.raises(cache_setup.Unusable, match="the code of Gate is in no file"):
        _name(config, detector, source)


def test_views_depend_on_the_seed_and_flips_do_not(source):
    config = small_config()
    config.data = {"made": source.config}
    detector = small_detector(config)
    detector.sources = {"objects": "made"}
    detector.freeze(["backbone", "neck"]).train()
    for augment, views, same in (("default", 2, False), ([{"type": "HorizontalFlip"}], None, True)):
        source.config.augment, source.config.views, source.config.pad = augment, views, "source"
        names = set()
        for seed in (0, 1):
            config.seed = seed
            names.add(_name(config, detector, SampleReader(source.annotations, source.config, train=True, seed=seed)))
        assert (len(names) == 1) == same


# --- records


def loader_of(annotations, data, *, batch_size, steps, store=None):
    config = small_config()
    config.data = {"made": data}
    config.train.batch_size, config.train.workers = batch_size, 0
    needs, stores = {"made": frozenset()}, {"made": store} if store is not None else None
    return train_loader({"made": annotations}, config, needs=needs, start_step=0, end_step=steps, stores=stores)


@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 0), ("bf16", 2**-8), ("fp16", 2**-11), ("fp64", 0)])
def test_levels_come_back_as_they_were_stored(kind, tolerance, source):
    plan = dataclasses.replace(PLAN, dtype=cache_setup.DTYPES[kind])
    store = Store(plan)
    assert plan.record == (8 * 8 + 4 * 4) * 3 * {"fp32": 4, "fp64": 8}.get(kind, 2)

    class Prefix:
        after = "neck"

        def levels(self, images, sizes):
            mean = images.float().mean((1, 2, 3)).view(-1, 1, 1, 1) / 7
            return {name: mean * torch.ones(c, h, w) for name, (h, w, c) in plan.levels.items()}

    cache = FeatureCache(Prefix(), {"made": store})
    loader = loader_of(source.annotations, source.config, batch_size=2, steps=4, store=store)
    seen: dict[int, torch.Tensor] = {}
    decoded = []
    for batch in loader:
        decoded.append(len(batch.images))
        given = cache(batch).precomputed
        assert given.after == "neck" and list(given.levels) == ["p3", "p4"]
        assert given.levels["p3"].shape == (2, 3, 8, 8) and given.levels["p4"].shape == (2, 3, 4, 4)
        assert given.levels["p3"].is_contiguous(memory_format=torch.channels_last)
        for target, p3 in zip(batch.targets, given.levels["p3"], strict=True):
            image = source.read(target.image_id - 1)[0]
            expected = torch.zeros(3, 64, 64)
            expected[:, : image.shape[1], : image.shape[2]] = image
            expected = expected.mean() / 7
            assert (p3 - expected).abs().max() <= tolerance * expected.abs() + 1e-5
            assert torch.equal(seen.setdefault(target.image_id, p3), p3)
    assert sum(decoded) == 4


def test_a_bad_image_is_passed_over_as_without_the_cache(source):
    source.config.on_bad_image = "skip"
    source.path(1).write_bytes(b"no image")
    store = Store(PLAN)
    loader = loader_of(source.annotations, source.config, batch_size=4, steps=2, store=store)
    first, second = [], []
    for found, batch in zip((first, second), loader, strict=True):
        found += sorted(t.image_id for t in batch.targets)
        assert len(batch.bad_images) == 1
        for entry, target in zip(batch.entries, batch.targets, strict=True):
            assert entry.slot == target.image_id - 1
            if not entry.is_stored:
                store.put(entry, levels(1.0))
    assert first == second == [1, 3, 3, 4]


# --- targets and views


def fields_equal(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


@pytest.mark.parametrize("augment", ["none", "default", [{"type": "VerticalFlip"}], [{"type": "GaussNoise"}]])
def test_a_target_without_its_image_is_the_target_with_it(augment, source):
    config = source.config.model_copy(update={"augment": augment, "views": 3, "image_size": [48, 56]})
    for split, needs in (
        (source.annotations, {"masks", "keypoints"}),
        (read_split(_semantic(source), "train", "made"), {"semantic"}),
    ):
        reader = SampleReader(split, config, train=True, needs=frozenset(needs))
        for index in range(4):
            for epoch in range(3):
                fields_equal(reader.read(index, epoch, step=7)[1], reader.target(index, epoch, step=7))


def _semantic(source):
    folder = source.annotations.root.parent
    config = DataConfig(format="semantic", classes=str(folder / "classes.json"))
    config.train.images, config.train.annotations = str(folder / "images"), str(folder / "masks")
    return config


def test_views_come_in_turn_and_variants_tell_the_flips(source):
    config = source.config.model_copy(update={"augment": "default", "views": 3})
    reader = SampleReader(source.annotations, config, train=True)
    assert reader.variants() == 3 and [reader.variant(0, e) for e in range(5)] == [0, 1, 2, 0, 1]
    images = [reader.read(0, epoch)[0] for epoch in range(6)]
    assert all(torch.equal(images[e], images[e + 3]) for e in range(3))
    assert len({i.shape for i in images[:3]} | {hash(i.numpy().tobytes()) for i in images[:3]}) > 2
    flips = [{"type": "HorizontalFlip"}, {"type": "VerticalFlip"}]
    reader = SampleReader(source.annotations, config.model_copy(update={"augment": flips, "views": None}), train=True)
    plain = SampleReader(source.annotations, config.model_copy(update={"augment": "none"}), train=True).read(0)[0]
    expected = [plain, plain.flip(2), plain.flip(1), plain.flip(1, 2)]
    found = [reader.variant(0, epoch) for epoch in range(20)]
    assert set(found) == {0, 1, 2, 3}
    for epoch, variant in enumerate(found):
        assert torch.equal(reader.read(0, epoch)[0], expected[variant])


def test_pad_source_gives_every_batch_the_same_size(source):
    config = source.config.model_copy(update={"augment": "default", "image_size": [64, 128]})
    sizes = {}
    for pad in ("batch", "source"):
        config.pad = pad
        loader = loader_of(source.annotations, config, batch_size=1, steps=12)
        sizes[pad] = {tuple(batch.images.shape[-2:]) for batch in loader}
    assert len(sizes["batch"]) > 1 and len(sizes["source"]) == 1
    assert sizes["source"].pop() == tuple(max(side) for side in zip(*sizes["batch"], strict=True))
    config.augment = [{"type": "RandomScale"}]
    with pytest.raises(UserError, match="pad: 'source', but augment changes the size"):
        loader_of(source.annotations, config, batch_size=1, steps=1)
