"""Doors to code outside the package: the examples of docs/extend.md are these very files, and a run uses them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from head_cases import make_batch, make_features, make_head
from planted import DataSet
from runs import TINY, lines, load, tiny_config
from torch import nn

from detbb import Backbone
from detbb.checkpoint.content import load_detector
from detbb.config.loading import config_to_dict
from detbb.config.schema import Config, DataConfig, SplitConfig
from detbb.core.errors import UserError
from detbb.data.doctor.repair import check
from detbb.data.formats import read_split
from detbb.detector import build_detector
from detbb.heads import find_head
from detbb.heads.loading import config_from_dict, load_config
from detbb.inference.evaluate import evaluate
from detbb.structures.batch import ImageSize
from detbb.training.loop import train

pytestmark = pytest.mark.usefixtures("unsynced", "thin_resnets")

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "extend.md").read_text()
CSV = "examples.csv_format:CSV"
TINY_BACKBONE = "'examples.tiny_backbone:TinyBackbone'"
SHORT = "schedule.warmup_steps=0"
OWN_WRITER = "log.to=[metrics, 'examples.csv_writer:CsvWriter']"


@pytest.mark.parametrize("name", ["csv_writer", "csv_format", "tiny_backbone"])
def test_page_shows_the_example_as_it_is_in_under_40_lines(name: str):
    code = (REPOSITORY / "examples" / f"{name}.py").read_text()
    assert f"```python\n{code}```" in PAGE and code.count("\n") < 40


def test_a_writer_from_outside_holds_every_evaluation_once(tmp_path: Path, monkeypatch):
    """Also where a resumed run repeats one that metrics.jsonl, which is written last, does not hold."""
    monkeypatch.syspath_prepend(REPOSITORY)
    train(tiny_config(tmp_path, OWN_WRITER, "train.steps=4", "eval.every=2"))
    run = tmp_path / "run"
    file = run / "metrics.jsonl"
    kept = [line for line in file.read_text().splitlines(keepends=True) if '"step": 4, "split": "val"' not in line]
    file.write_text("".join(kept))
    train(tiny_config(tmp_path, OWN_WRITER, "train.steps=4", "eval.every=2"), resume="auto")
    rows = list(csv.reader((run / "metrics.csv").open()))
    expected = [(str(r["step"]), name, value) for r in lines(run, "val") for name, value in r.items() if "/" in name]
    assert [(step, name, float(value)) for step, _, _, name, value in rows] == expected
    assert {r["step"] for r in lines(run, "val")} == {2, 4} and not (run / "tb").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[metrics, csv]", r"log.to: 'csv' is not known; valid are metrics, tensorboard, package.module:Name"),
        ("[metrics, 'no_such_module:Csv']", "log.to 'no_such_module:Csv': cannot import 'no_such_module'"),
        ("[metrics, 'pathlib:Path']", "log.to 'pathlib:Path': 'Path' of 'pathlib' is no subclass of detbb.Writer"),
        ("[tensorboard]", "log.to: must name 'metrics', which a resumed run reads"),
    ],
)
def test_a_writer_that_cannot_be_used_is_an_error_at_start(tmp_path: Path, names: str, message: str):
    with pytest.raises(UserError, match=message):
        train(tiny_config(tmp_path, f"log.to={names}"))
    assert not (tmp_path / "run").exists()


def as_csv(data: DataSet, split: str) -> SplitConfig:
    """A split of `data` as the example's CSV file."""
    coco, path = data.json[split], data.folder / f"{split}.csv"
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    names = {category["id"]: category["name"] for category in coco["categories"]}
    rows = [(files[o["image_id"]], names[o["category_id"]], *o["bbox"]) for o in coco["annotations"]]
    lines = [f"{file},{name},{x},{y},{x + w},{y + h}" for file, name, x, y, w, h in rows]
    path.write_text("\n".join(["file,class,x1,y1,x2,y2", *lines]))
    return SplitConfig(images=str(data.images(split)), annotations=str(path))


def test_a_format_from_outside_is_examined_trained_and_repaired(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    data = DataSet(tmp_path / "data")
    coco = read_split(data.source(), "train", "shapes")
    source = DataConfig(format=CSV, train=as_csv(data, "train"), val=as_csv(data, "val"), image_size=[32, 64])
    own = read_split(source, "train", "shapes")
    assert own is not None and coco is not None and list(own.file_names) == list(coco.file_names)
    for name in ("boxes_xywh", "labels", "first", "sizes"):
        assert getattr(own, name).tolist() == getattr(coco, name).tolist(), name
    config = tiny_config(tmp_path, "train.steps=4", "train.batch_size=2")
    config.data = {"shapes": source}
    check(config, fix=tmp_path / "fixed")
    train(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.pt"
    assert load_detector(checkpoint).classes["shapes"].names == ("car", "zebra")
    assert "shapes/bbox/AP" in evaluate(checkpoint, output_dir=tmp_path / "eval")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("csv", r"data\.shapes\.format.*'csv' is not known; valid are coco, .*package\.module:Name"),
        ("'no_such_module:CSV'", "'no_such_module:CSV': cannot import 'no_such_module'"),
        ("'pathlib:Path'", "'pathlib:Path': 'Path' of 'pathlib' is no detbb.data.formats.Format"),
    ],
)
def test_a_data_format_that_is_none_is_an_error_at_start(tmp_path: Path, name: str, message: str):
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, f"data.shapes.format={name}")


FROZEN = ["backbone.stem", "backbone.stage1"]


def test_a_backbone_from_outside_trains_freezes_and_evaluates(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    frozen = f"freeze=[{', '.join(FROZEN)}]"
    config = tiny_config(
        tmp_path, f"backbone.arch={TINY_BACKBONE}", frozen, "train.steps=2", SHORT, "checkpoint.every=1"
    )
    train(config)
    first, last = (load(tmp_path / "run", f"step_000000{step}") for step in (1, 2))
    names = {n for n in first["model"] if n.startswith("backbone.")}
    kept = {n for n in names if n.startswith(("backbone.stem.", "backbone.stage1."))}
    assert len(kept) == 12 and set(last["frozen"]["digests"]) == kept
    equal = {n for n in names if torch.equal(first["model"][n], last["model"][n])}
    assert equal == kept
    assert {n.split(".")[1] for n in first["model"] if n.startswith("neck.inner")} == {"inner"}
    assert {n.split(".")[2] for n in first["model"] if n.startswith("neck.inner")} == {"stage2", "stage3", "stage4"}
    checkpoint = tmp_path / "run" / "checkpoints" / "last.pt"
    assert "shapes/bbox/AP" in evaluate(checkpoint, output_dir=tmp_path / "eval")


def test_stages_that_no_head_reads_are_not_built(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    config = tiny_config(tmp_path, f"backbone.arch={TINY_BACKBONE}", "neck.type=none", "heads.shapes.levels=[stage2]")
    backbone = build_detector(config).backbone
    assert backbone.stages == ("stem", "stage1", "stage2") and backbone.out == ("stage2",)
    assert not hasattr(backbone, "stage3")


class OwnNorms(Backbone):
    """Ignores the norm layer; its stem is two submodules."""

    takes_norm = False
    aliases: ClassVar = {"stem": ("first", "second")}

    def __init__(self, arch, *, norm_layer):
        super().__init__(arch)
        self.first, self.second = nn.Conv2d(3, 8, 4, stride=4), nn.GroupNorm(1, 8)
        self.deep = nn.Conv2d(8, 16, 8, stride=8)
        self.stages, self.channels, self.strides = ("stem", "deep"), {"deep": 16}, {"deep": 32}


OWN = f"{__name__}:OwnNorms"


def test_a_backbone_with_norms_of_its_own_says_so(tmp_path: Path):
    deep = ["neck.type=none", "heads.shapes.levels=[deep]"]
    with pytest.raises(UserError, match=rf"backbone\.norm: 'bn', but {OWN} has norms of its own; valid is null"):
        build_detector(tiny_config(tmp_path, f"backbone.arch='{OWN}'", *deep))
    with pytest.raises(UserError, match=r"backbone\.norm: null, but resnet18 has no norm of its own; valid: bn,"):
        build_detector(tiny_config(tmp_path, "backbone.norm=null"))
    config = tiny_config(
        tmp_path, f"backbone.arch='{OWN}'", "backbone.norm=null", "freeze=[backbone.stem]",
        "optimizer.lr_mult={backbone.stem: 0.5, backbone: 0.1}", *deep,
    )  # fmt: skip
    detector = build_detector(config)
    assert {n for n, p in detector.named_parameters() if not p.requires_grad} == {
        f"backbone.{module}.{kind}" for module in ("first", "second") for kind in ("weight", "bias")
    }


class OwnForward(OwnNorms):
    def forward_from(self, after, known):
        return {name: 2 * x for name, x in super().forward_from(after, known).items()}


def test_a_backbone_with_a_forward_of_its_own_is_refused(tmp_path: Path):
    config = tiny_config(tmp_path, f"backbone.arch='{__name__}:OwnForward'", "backbone.norm=null")
    with pytest.raises(UserError, match="has a forward_from of its own; valid: stages that run in order"):
        build_detector(config)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet51", r"backbone\.arch 'resnet51' is not known; valid are .*package\.module:Name"),
        ("no_such_module:Net", r"backbone\.arch 'no_such_module:Net': cannot import 'no_such_module'"),
        ("pathlib:Path", r"backbone\.arch 'pathlib:Path': 'Path' of 'pathlib' is no subclass of detbb\.Backbone"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_an_error_at_start(tmp_path: Path, arch: str, message: str):
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, f"backbone.arch='{arch}'")  # before data are read


def test_a_checkpoint_does_not_choose_the_backbones_code(tmp_path: Path):
    values = config_to_dict(tiny_config(tmp_path))
    values["backbone"]["arch"] = "not_imported_yet:Net"
    with pytest.raises(UserError, match=r"a file: backbone\.arch 'not_imported_yet:Net'.*--import not_imported_yet"):
        config_from_dict(values, "a file")


QUERY = "examples.query_head:QueryHead"


@pytest.fixture
def query_head(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    return find_head(QUERY)


def query_config(folder: Path, keys: str, *overrides: str) -> Config:
    text = TINY.format(out=folder / "run", data=folder / "shapes")
    fcos = "{type: fcos, data: shapes, levels: [p3, p4, p5], num_convs: 1}"
    assert fcos in text
    (folder / "query.yaml").write_text(text.replace(fcos, f"{{type: '{QUERY}', data: shapes, {keys}}}"))
    return load_config(folder / "query.yaml", list(overrides))


def test_a_query_head_from_outside_trains_and_evaluates(tmp_path: Path, query_head):
    checkpoint = train(query_config(tmp_path, "queries: 8", "train.steps=2", SHORT))
    records = lines(tmp_path / "run", "train")
    assert len(records) == 2 and {"shapes/loss_cls", "shapes/loss_l1", "shapes/loss_giou"} <= set(records[0])
    assert "shapes/bbox/AP" in evaluate(checkpoint, output_dir=tmp_path / "eval")


def padding_matters(head) -> float:
    """How much boxes and scores of an image change with what is in its padding, and how much there is of it."""
    size, generator = ImageSize((64, 90), (64, 90)), torch.Generator().manual_seed(0)
    found = []
    for hw, filling in (((2, 3), 0.0), ((2, 3), 9.0), ((4, 5), 9.0)):
        cells = torch.full((1, 64, *hw), filling)
        cells[:, :, :2, :3] = torch.randn(1, 64, 2, 3, generator=generator.manual_seed(0))
        (prediction,) = head.decode(head({"p5": cells}, [size]), [size])
        found.append(torch.cat([prediction.boxes / 90, prediction.scores[:, None]], dim=1))
    return max(float((other - found[0]).abs().max()) for other in found[1:])


def test_a_query_head_sees_no_padding_by_its_mask(query_head, monkeypatch):
    head = make_head(query_head).eval()
    with torch.no_grad():
        assert padding_matters(head) < 1e-6
        monkeypatch.setattr(
            head, "image_mask", lambda level, features, sizes: torch.ones_like(features[level][:, 0]) > 0
        )
        assert padding_matters(head) > 1e-3  # without the mask


def test_a_query_head_learns_two_images(query_head):
    head, features, batch = make_head(query_head), make_features(("p5",)), make_batch()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = sum(head.loss(head(features, batch.sizes), batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("queries: 0", r"heads\.shapes\.queries is 0, must be at least 1"),
        ("queries: many", r"heads\.shapes\.queries is 'many'"),
        ("querys: 3", r"heads\.shapes\.querys .*did you mean 'queries'"),
        ("levels: [p4, stage9]", r"heads\.shapes\.levels: .*'stage9' is not known"),
    ],
)
def test_a_head_from_outside_has_its_own_keys_and_ranges(tmp_path: Path, query_head, keys: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        build_detector(query_config(tmp_path, keys))
    assert "\n" not in str(caught.value)
