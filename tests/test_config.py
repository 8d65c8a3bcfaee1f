"""The configuration: what is written is what is run, and every mistake is one line that names its key."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import detbb
from detbb.config.loading import config_to_dict, save_config
from detbb.config.schema import Config
from detbb.core.errors import UserError
from detbb.heads.docs import make_docs, make_schema
from detbb.heads.fcos import FcosHead
from detbb.heads.loading import config_from_dict, load_config

REPOSITORY = Path(__file__).resolve().parents[1]
VALID = """
output_dir: runs/test
backbone: {arch: resnet18, norm: bn}
data:
  blood:
    format: coco
    train: {images: train, annotations: train.json}
    val: {images: val, annotations: val.json}
  scenes:
    format: semantic
    train: {images: scenes, annotations: masks}
    classes: [sky, ground]
  cells:
    format: yolo
    train: {images: cells, annotations: labels}
    classes: names.txt
heads:
  objects: {type: fcos, data: blood}
  pixels: {type: semantic, data: scenes}
phases:
  - {steps: 40, freeze: [backbone, neck]}
  - {freeze: [backbone.stem]}
train: {steps: 100, batch_size: 12}
schedule: {milestones: [60, 80]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# (override, what the one line must say besides the override: the key, and what is valid or near)
MISTAKES = [
    ("trian.steps=5", ["trian is not a key", "did you mean 'train'?"]),
    ("train.stpes=5", ["train.stpes", "did you mean 'steps'?"]),
    ("phases[0].stpes=5", ["phases[0].stpes", "did you mean 'steps'?"]),
    ("phases[2].steps=5", ["phases[2]", "2 entries"]),
    ("heads.objects.nms_tresh=0.5", ["heads.objects.nms_tresh", "did you mean 'nms_threshold'?"]),
    ("data.blood.train.anotations=x", ["data.blood.train.anotations", "did you mean 'annotations'?"]),
    ("data.blood.train.images=3", ["data.blood.train.images", "3", "text"]),
    ("optimizer.lr_mult.bakbone=0.1", ["optimizer.lr_mult.bakbone", "did you mean 'backbone'?"]),
    ("train.steps=", ["train.steps", "no value"]),
    ("train.steps", ["train.steps", "key=value"]),
    ("=3", ["key=value"]),
    ("train=3", ["train is 3", "section"]),
    ("heads=fcos", ["heads is 'fcos'", "section"]),
    ("heads.objects=fcos", ["heads.objects is 'fcos'", "section"]),
    ("phases=3", ["phases is 3", "list"]),
    ("phases=[3]", ["phases[0] is 3", "section"]),
    ("freeze.a=1", ["freeze", "list"]),
    ("train.steps=many", ["train.steps is 'many'", "whole number"]),
    ("train.steps=1.5", ["train.steps is 1.5", "whole number"]),
    ("train.steps=true", ["train.steps is true", "whole number"]),
    ("train.steps=-5", ["train.steps is -5", "at least 1"]),
    ("train.steps=99999999999999999999", ["train.steps", "64 bits"]),
    ("optimizer.lr=fast", ["optimizer.lr is 'fast'", "number"]),
    ("optimizer.lr=.inf", ["optimizer.lr", "finite number"]),
    ("optimizer.lr=0", ["optimizer.lr is 0", "above 0"]),
    ("optimizer.lr_mult.backbone=0", ["optimizer.lr_mult.backbone", "freeze it"]),
    ("optimizer.betas=[0.9]", ["optimizer.betas", "two numbers"]),
    ("optimizer.betas=[0.9,1.0]", ["optimizer.betas[1]", "below 1"]),
    ("optimizer.momentum=1", ["optimizer.momentum", "below 1"]),
    ("backbone.norm=batch", ["backbone.norm is 'batch'", "bn, frozen_bn, sync_bn, gn"]),
    ("backbone.norm_eval=yes", ["backbone.norm_eval is 'yes'", "true or false"]),
    ("backbone.norm=frozen_bn", ["random weights", "norm: bn (or gn), or give backbone.weights"]),
    ("backbone.norm_eval=true", ["backbone.norm_eval", "random weights", "allow_random"]),
    ("backbone={norm: gn, norm_eval: true}", ["backbone.norm_eval", "'gn' has no running statistics"]),
    ("neck.norm=frozen_bn", ["neck.norm", "random weights", "init_from"]),
    ("neck.norm_eval=true", ["neck.norm_eval", "no running statistics"]),
    ("neck.channels=0", ["neck.channels is 0", "at least 1"]),
    ("train={steps: 100, epochs: 3}", ["train.steps", "train.epochs", "both"]),
    ("train.steps=null", ["train.steps", "train.epochs", "missing"]),
    ("freeze=backbone", ["freeze is 'backbone'", "must be a list, such as [backbone]"]),
    ("imgsz=640", ["imgsz is not a key", "detbb, which says data.<name>.image_size"]),
    ("epochs=12", ["epochs is not a key", "detbb, which says train.epochs"]),
    ("optimizer.lr0=0.1", ["optimizer.lr0 is not a key", "detbb, which says optimizer.lr"]),
    ("SOLVER.BASE_LR=0.02", ["SOLVER.BASE_LR", "detbb, which says optimizer.lr"]),
    ("heads.objects.num_classes=3", ["heads.objects.num_classes", "detbb, which says data.<name>.classes"]),
    ("model.backbone.frozen_stages=1", ["model.backbone.frozen_stages", "backbone.stem, backbone.layer1"]),
    ("phases[0].steps=null", ["phases[0].steps", "only the last"]),
    ("phases[0].steps=100", ["phases", "100", "less than train.steps 100"]),
    ("phases[1].steps=50", ["phases", "90", "must be train.steps 100"]),
    ("phases[0].freeze=[bakcbone]", ["phases[0].freeze[0]", "'bakcbone'", "did you mean 'backbone'?"]),
    ("phases[1].freeze=[neck,heads.object]", ["phases[1].freeze[1]", "'heads.object'", "did you mean 'objects'?"]),
    ("heads.objects.type=fcso", ["heads.objects.type", "fcso", "did you mean 'fcos'?"]),
    ("heads.objects.type=no_such_package:Head", ["heads.objects.type", "no_such_package"]),
    ("heads.objects.data=bloood", ["heads.objects.data is 'bloood'", "did you mean 'blood'?"]),
    ("heads.objects.threshold=1.5", ["heads.objects.threshold", "between 0 and 1"]),
    ("heads.pixels.data=blood", ["heads.pixels.data", "format coco", "needs semantic"]),
    ("heads.objects.data=scenes", ["heads.objects.data", "format semantic", "needs boxes"]),
    ("heads.mask={type: mask_rcnn, data: scenes}", ["heads.mask.data", "format semantic", "needs masks"]),
    ("heads.new={type: fcos}", ["heads.new.data", "missing"]),
    ("heads.new={data: blood}", ["heads.new", "type"]),
    ("heads.my-head={type: fcos, data: blood}", ["heads.my-head", "not a valid name"]),
    ("heads.keys={type: fcos, data: blood}", ["heads.keys", "ModuleDict"]),
    ("data.a/b={format: shapes}", ["data.a/b", "not a valid name"]),
    ("data.blood.format=coco2", ["data.blood.format", "coco, voc, yolo, semantic, shapes"]),
    ("data.blood.train={annotations: null}", ["data.blood.train.annotations", "missing", "coco"]),
    ("data.blood.train.size=4", ["data.blood.train.size", "format coco generates no images"]),
    ("data.scenes.classes=null", ["data.scenes.classes", "format semantic"]),
    ("data.scenes.classes=[sky,sky]", ["data.scenes.classes", "twice"]),
    ("data.blood.image_size=[1333,800]", ["data.blood.image_size", "short side, longest side"]),
    ("data.blood.image_size=[640]", ["data.blood.image_size", "short side, longest side"]),
    ("data.blood.image_size=[0,10]", ["data.blood.image_size[0]", "at least 1"]),
    ("data.blood.augment=heavy", ["data.blood.augment is 'heavy'", "default, none"]),
    ("data.blood.augment=[{p: 0.5}]", ["data.blood.augment", "{type: Name"]),
    ("data.blood.weight=0", ["data.blood.weight", "above 0"]),
    ("train.batch_size=0", ["train.batch_size is 0", "at least 1"]),
    ("train.accumulate=5", ["train.batch_size is 12", "10 or 15"]),
    ("train.precision=fp8", ["train.precision", "fp32, fp64, bf16, fp16"]),
    ("train.grad_clip=0", ["train.grad_clip", "above 0"]),
    ("schedule.milestones=[80,60]", ["schedule.milestones", "ascending"]),
    ("schedule.milestones=[60,100]", ["schedule.milestones", "below train.steps 100"]),
    ("schedule.warmup_steps=100", ["schedule.warmup_steps is 100", "below train.steps 100"]),
    ("ema.decay=1", ["ema.decay", "below 1"]),
    ("ema=0.99", ["ema is 0.99", "section"]),
    ("checkpoint.keep=1", ["checkpoint.keep is 1", "at least 2"]),
    ("eval.every=0", ["eval.every", "at least 1"]),
    ("checkpoint.every=0", ["checkpoint.every", "at least 1"]),
    ("eval.best=object/bbox/AP", ["eval.best", "did you mean 'objects'?"]),
    ("eval.best=pixels/sem/mIoU", ["eval.best", "data.scenes has no val split"]),
    ("init_from=[a]", ["init_from", "text"]),
    ("output_dir=${nowhere}", ["output_dir", "nowhere"]),
    ("output_dir=${oc.env:DETBB_UNSET}", ["output_dir", "DETBB_UNSET is not set"]),
    ("output_dir=${oc.env:HF_TOKEN,x}", ["output_dir", "HF_TOKEN", "secret"]),
    ("output_dir=${oc.env:AWS_ACCESS_KEY_ID,x}", ["output_dir", "AWS_ACCESS_KEY_ID", "secret"]),
    ("output_dir=${oc.env:HOME${seed}}", ["output_dir", "not nested"]),
    ("heads.objects.prior_probability=0", ["heads.objects.prior_probability", "above 0 and below 1"]),
    ("heads.objects.num_convs=-1", ["heads.objects.num_convs", "at least 0"]),
    ("heads.objects.center_sampling_radius=0", ["heads.objects.center_sampling_radius", "above 0"]),
    ("heads.new={type: classify, data: blood, dropout: 1}", ["heads.new.dropout", "at least 0 and below 1"]),
    ("heads.new={type: mask_rcnn, data: blood, mask_channels: []}", ["heads.new.mask_channels", "not be empty"]),
    ("heads.new={type: mask_rcnn, data: blood, mask_channels: [0]}", ["heads.new.mask_channels[0]", "at least 1"]),
    ("heads.new={type: keypoint_rcnn, data: blood, keypoint_channels: []}", ["keypoint_channels", "not be empty"]),
    ("heads.new={type: faster_rcnn, data: blood, box_delta_weights: [1,1,1]}", ["box_delta_weights", "four numbers"]),
    ("heads.new={type: faster_rcnn, data: blood, box_delta_weights: [0,1,1,1]}", ["delta_weights[0]", "above 0"]),
    ("heads.new={type: faster_rcnn, data: blood, anchor_ratios: []}", ["heads.new.anchor_ratios", "not be empty"]),
    ("heads.new={type: faster_rcnn, data: blood, anchor_sizes: [[0.0]]}", ["anchor_sizes[0][0]", "above 0"]),
    ("heads.new={type: faster_rcnn, data: blood, anchor_sizes: [[],[]]}", ["anchor_sizes", "not be empty"]),
    (
        "heads.new={type: faster_rcnn, data: blood, box_foreground_iou: 0.3}",
        ["heads.new.box_background_iou is 0.5", "at most box_foreground_iou 0.3"],
    ),
    ("heads.new={type: faster_rcnn, data: blood, rpn_foreground_iou: 0.2}", ["rpn_background_iou is 0.3", "0.2"]),
    ("heads.new={type: retinanet, data: blood, background_iou: 0.7}", ["heads.new.background_iou", "iou 0.5"]),
    ("heads.objects.topk_candidates=0", ["heads.objects.topk_candidates", "at least 1"]),
    ("output_dir=${oc.decode:x}", ["output_dir", "valid are ${other.key} and ${oc.env:NAME,default}"]),
    ("output_dir=???", ["output_dir", "not resolved"]),
    ("train.steps=!!int 5", ["tag"]),
    ("base=other.yaml", ["base"]),
    ("log.every=[1", ["line 1"]),
]


@pytest.mark.parametrize(("override", "said"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_names_override_key_and_what_is_valid(file: Path, override: str, said: list[str]):
    text = error_of(file, override)
    assert text.startswith("override ") or str(file) in text
    assert not [part for part in said if part not in text], text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("train: {steps: 5}\ntrain: {steps: 6}\n", ["line 2", "'train' is given twice"]),
        ("train: {steps: 5\n", ["line 2"]),
        ("train: !!python/object/apply:os.system [ls]\n", ["line 1", "tag"]),
        ("a: &x {b: 1}\nc: *x\n", ["line 2", "alias"]),
        ("1: 2\n", ["line 1", "a key must be a word"]),
        ("", ["null", "sections"]),
        ("- a\n", ["sections"]),
        ("a: " + "[" * 5000, ["line 1"]),
        ("a: \x07\n", ["not readable"]),
        ("seed: 0\n", ["data is empty", "heads is empty"]),
        ("base: nowhere.yaml\n", ["run.yaml: base is 'nowhere.yaml'", "no such config file"]),
        ("base: 3\n", ["base is 3", "path"]),
        ("base: child.yaml\n", ["child.yaml: base is 'run.yaml'", "circle"]),
        ("freeze: [neck]\nphases: [{steps: 5}]\n", ["freeze and phases are both given"]),
        ("x: " + "[]," * 400_000, ["larger than 1 MB"]),
        ("path: d\ntrain: images\nval: images\nnames: {0: cell}\n", ["Ultralytics", "format: yolo"]),
        ("_BASE_: a.yaml\nMODEL: {WEIGHTS: x}\n", ["Detectron2", "docs/config.md"]),
    ],
)
def test_mistake_in_the_file_names_the_file_and_the_line_or_key(
    tmp_path: Path, file: Path, wrong: str, said: list[str]
):
    (tmp_path / "child.yaml").write_text("base: run.yaml\n")
    file.write_text(wrong)
    text = error_of(file)
    assert str(file.parent) in text
    assert not [part for part in said if part not in text], text


def test_all_mistakes_are_said_at_once_each_under_what_wrote_it(file: Path):
    file.write_text(VALID + "sed: 1\nlog: {every: 0}\noptimizer: {lr: fast, momentum: 1}\n")
    text = error_of(file, "train.stpes=5", "heads.objects.nms_threshold=2")
    assert text.startswith(f"{file}: ") and text.count(str(file)) == 1
    assert [text.count(key) for key in ("sed is not", "log.every is 0", "lr is 'fast'", "momentum is 1")] == [1] * 4
    assert "; override 'train.stpes=5': train.stpes is not a key" in text
    assert "; override 'heads.objects.nms_threshold=2': heads.objects.nms_threshold is 2" in text
    many = error_of(file, *(f"x{number}=1" for number in range(20)))
    assert many.count("is not a key") == 7 and many.endswith("; and 14 more")
    file.write_text(VALID)
    text = error_of(file, "heads.pixels.data=blood", "schedule.warmup_steps=100")
    assert "heads.pixels.data" in text and "; override 'schedule.warmup_steps=100': schedule.warmup_steps" in text


def test_missing_file_names_a_near_one(file: Path):
    assert "did you mean 'run.yaml'?" in error_of(file.with_name("runn.yaml"))


def test_error_names_the_file_that_wrote_the_key(tmp_path: Path, file: Path):
    child = tmp_path / "child.yaml"
    child.write_text("base: run.yaml\noptimizer: {lr: 0.5}\n")
    assert load_config(child).optimizer.lr == 0.5
    file.write_text(VALID + "log: {evry: 3}\n")
    assert error_of(child, "seed=1").startswith(f"{file}: log.evry")


def test_base_is_merged_before_the_rest(tmp_path: Path, file: Path):
    child = tmp_path / "child.yaml"
    child.write_text(
        "base: run.yaml\ntrain: {steps: 200}\nheads: {objects: {nms_threshold: 0.3}}\nphases: []\nema: null\n"
    )
    config, parent = load_config(child), load_config(file)
    assert (config.train.steps, config.train.batch_size) == (200, 12)
    assert (config.heads["objects"].nms_threshold, config.heads["objects"].data) == (0.3, "blood")
    assert (config.phases, len(parent.phases)) == ([], 2)
    assert (config.ema, config.eval.weights, parent.eval.weights) == (None, "model", "ema")


def test_bases_may_stand_in_a_row_of_eight_and_the_nearest_wins(tmp_path: Path, file: Path):
    for number in range(1, 10):
        below = "run.yaml" if number == 1 else f"{number - 1}.yaml"
        (tmp_path / f"{number}.yaml").write_text(f"base: {below}\nseed: {number}\nlog: {{every: {number}}}\n")
    config = load_config(tmp_path / "8.yaml", ["log.every=9"])
    assert (config.seed, config.log.every, config.train.batch_size) == (8, 9, 12)
    assert "at most 8 bases in a row" in error_of(tmp_path / "9.yaml")


def test_a_run_of_an_older_version_goes_on_with_its_config(tmp_path: Path, file: Path):
    """Its config.yaml says `carried` for what is `inherited_heads` now."""
    old = tmp_path / "old.yaml"
    old.write_text(file.read_text() + "carried: [objects]\n")
    assert load_config(old).inherited_heads == ["objects"]


def test_steps_replace_epochs_of_a_base_and_freeze_its_phases(tmp_path: Path, file: Path):
    child, grandchild = tmp_path / "child.yaml", tmp_path / "grandchild.yaml"
    child.write_text("base: run.yaml\ntrain: {epochs: 3}\nfreeze: [neck]\n")
    grandchild.write_text("base: child.yaml\ntrain: {steps: 90}\nphases: [{freeze: [backbone]}]\n")
    for path, overrides, expected in (
        (child, [], (None, 3.0, ["neck"], 0)),
        (child, ["train.steps=90"], (90, None, ["neck"], 0)),
        (grandchild, [], (90, None, [], 1)),
        (grandchild, ["freeze=[heads.pixels]", "train.epochs=2"], (None, 2.0, ["heads.pixels"], 0)),
    ):
        config = load_config(path, overrides)
        assert (config.train.steps, config.train.epochs, config.freeze, len(config.phases)) == expected
    text = error_of(child, "train.steps=90", "train.epochs=2", "phases=[{}]", "freeze=[neck]")
    assert "train.epochs are both given" in text and "freeze and phases are both given" in text


def test_a_dict_and_a_config_are_checked_as_a_file_is(file: Path):
    values = yaml.safe_load(VALID)
    config = load_config(values, ["seed=3"])
    assert config == load_config(file, ["seed=3"]) == load_config(config) and load_config(config, ["seed=4"]).seed == 4
    assert load_config({"base": str(file), "output_dir": "${oc.env:DETBB_UNSET,x}"}).output_dir == "x"
    with pytest.raises(UserError, match=r"^the given configuration: trian is not a key"):
        load_config({**values, "trian": {}})
    config.train.steps = 0
    with pytest.raises(UserError, match=r"^the given configuration: train\.steps is 0, must be at least 1"):
        load_config(config)


def test_overrides_reach_every_kind_of_value(file: Path):
    config = load_config(
        file,
        [
            "optimizer.lr=1e-3",
            "train.cache_features=off",
            "train.workers=0",
            "train.grad_clip=null",
            "phases[0].steps=30",
            "phases.1.freeze=[heads.pixels]",
            "optimizer.lr_mult.backbone.layer1=0.5",
            "heads.objects.levels=[p4,p5]",
            "ema.decay=0.5",
            "eval.every=25",
            "data.blood.augment=[{type: HorizontalFlip, p: 0.5}]",
            "output_dir=runs/a=b",
            "init_from=runs/${seed}/last.pt",
        ],
    )
    assert config.optimizer.lr == 1e-3
    assert config.train.cache_features == "off"
    assert config.train.grad_clip is None
    assert [p.steps for p in config.phases] == [30, None]
    assert config.phases[1].freeze == ["heads.pixels"]
    assert config.optimizer.lr_mult == {"backbone.layer1": 0.5}
    assert isinstance(config.heads["objects"], FcosHead.Config)
    assert config.heads["objects"].levels == ["p4", "p5"]
    assert config.ema is not None and config.ema.decay == 0.5
    assert (config.eval.every, config.checkpoint.every) == (25, 25)
    assert config.data["blood"].augment == [{"type": "HorizontalFlip", "p": 0.5}]
    assert (config.output_dir, config.init_from) == ("runs/a=b", "runs/0/last.pt")


def test_environment_is_resolved_in_what_is_saved(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file.write_text(VALID.replace("images: train,", "images: '${oc.env:DETBB_DATA,data}/train',"))
    monkeypatch.delenv("DETBB_DATA", raising=False)
    assert load_config(file).data["blood"].train.images == "data/train"
    assert load_config(file, ["output_dir=${oc.env:COCO_KEYPOINTS,runs}"]).output_dir == "runs"  # no KEY
    monkeypatch.setenv("DETBB_DATA", "/elsewhere")
    config = load_config(file)
    save_config(config, tmp_path / "saved.yaml")
    monkeypatch.setenv("DETBB_DATA", "/somewhere")
    assert load_config(tmp_path / "saved.yaml").data["blood"].train.images == "/elsewhere/train"


def test_batch_must_divide_among_the_processes(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    load_config(file)
    monkeypatch.setenv("WORLD_SIZE", "8")
    load_config(file)  # without RANK it is one process
    monkeypatch.setenv("RANK", "0")
    text = error_of(file)
    assert "train.batch_size is 12" in text and "8 or 16" in text


def test_a_saved_config_loads_as_the_same_config(file: Path, tmp_path: Path):
    config = load_config(file, ["optimizer.lr_mult.neck=0.1", "data.blood.classes=[RBC, 'off', '1']", "device=cpu"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config_from_dict(config_to_dict(config), "the checkpoint") == config
    assert type(config) is Config and _only_plain(config_to_dict(config))


def _only_plain(value: object) -> bool:
    if type(value) is dict:
        return all(type(key) is str and _only_plain(item) for key, item in value.items())
    return (
        all(map(_only_plain, value)) if type(value) is list else value is None or type(value) in (bool, int, float, str)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sed": 1}, "did you mean 'seed'?"),
        ({"seed": "${oc.env:HOME}"}, "seed"),
        ({"output_dir": "${oc.env:HOME}"}, "not resolved"),
        ({"data": {1: {}}}, "key 1"),
        ({"data": {"a": object()}}, "data.a"),
    ],
)
def test_a_stored_config_is_strict_and_reads_no_environment(file: Path, change: dict, said: str):
    with pytest.raises(UserError, match=r"^last\.pt: ") as caught:
        config_from_dict({**config_to_dict(load_config(file)), **change}, "last.pt")
    assert said in str(caught.value)


def test_docs_are_current():
    assert (REPOSITORY / "docs" / "config.md").read_text() == make_docs(), "run: make docs"
    assert (REPOSITORY / "docs" / "config.schema.json").read_text() == make_schema(), "run: make docs"


def train_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools" / "train.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_mistake_in_a_command_is_one_line_and_exit_code_2(file: Path):
    for arguments in (["--confg", "x"], ["--config", str(file), "--resume", "train.stpes=5"]):
        done = train_command(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def detbb_command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`detbb ARGUMENTS` of a package that lies in `root`."""
    place = str(root / "detbb" / "core" / "cli.py")
    code = f"from detbb.core import cli; cli.__file__ = {place!r}; cli.command()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "--help"], 0, "usage: train.py"),
        pytest.param(["eval", "nope.pt"], 2, "error: checkpoint nope.pt: no such file", marks=pytest.mark.slow),
        (["trian"], 2, "error: usage: detbb {check_data,checkpoint,eval,export,predict,train}"),
        (["--help"], 0, "usage: detbb COMMAND"),
        (["--version"], 0, f"detbb {detbb.__version__}"),
    ],
)
def test_the_command_of_an_editable_installation_runs_the_tools(arguments: list[str], code: int, said: str):
    done = detbb_command(REPOSITORY, *arguments)
    assert done.returncode == code and (done.stdout + done.stderr).startswith(said), done.stderr


def test_the_command_of_a_wheel_runs_its_own_tools(tmp_path: Path):
    """As pyproject.toml lays them out: force-include."""
    shutil.copytree(REPOSITORY / "tools", tmp_path / "detbb_tools")
    (tmp_path / "detbb_tools" / "train.py").write_text("print('its own')")
    assert detbb_command(tmp_path, "train", "--help").stdout.startswith("its own")
    assert detbb_command(tmp_path, "trian").stderr.startswith("error: usage: detbb {check_data,checkpoint,eval,")


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "detbb", "--help"], capture_output=True, text=True, cwd=REPOSITORY)
    tools = {path.stem for path in (REPOSITORY / "tools").glob("*.py")}
    assert done.returncode == 0 and {line.split()[0] for line in done.stdout.splitlines()[2:]} == tools


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("mine.yaml", "--config; did you mean --config mine.yaml?"),
        ("--config mine.yaml --lr 0.1", "arguments: --lr; overrides are written optimizer.lr=0.1"),
        ("--config mine.yaml --epochs=10", "arguments: --epochs=10; overrides are written optimizer.lr=0.1"),
    ],
)
def test_a_command_written_as_for_another_tool_is_answered(arguments: str, said: str):
    parse = runpy.run_path(str(REPOSITORY / "tools/train.py"))["parse"]
    with pytest.raises(UserError, match=re.escape(said)):
        parse(arguments.split())


def test_an_override_parted_by_the_shell_gets_quotes(file: Path):
    assert "quote what has spaces, such as 'freeze=[backbone, neck]'" in error_of(file, "freeze=[backbone,", "neck]")


@pytest.mark.parametrize("tool", sorted((REPOSITORY / "tools").glob("*.py")), ids=lambda p: p.name)
def test_help_shows_an_example_and_imports_no_torch(tool: Path):
    code = f"""
import sys, runpy
sys.argv = [{str(tool)!r}, "--help"]
try: runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as e: assert not e.code, e.code
assert not {{"torch", "numpy", "pydantic"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python tools/{tool.name} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "resume", "overrides"),
    [
        ([], None, []),
        (["a=1", "b=2"], None, ["a=1", "b=2"]),
        (["--resume"], "auto", []),
        (["--resume", "a=1"], "auto", ["a=1"]),
        (["--resume", "auto", "a=1"], "auto", ["a=1"]),
        (["--resume", "last.pt", "a=1"], "last.pt", ["a=1"]),
        (["a=1", "--resume", "b=2"], "auto", ["a=1", "b=2"]),
        (["--resume=lr=1/last.pt", "a=1"], "lr=1/last.pt", ["a=1"]),
    ],
)
def test_resume_takes_a_checkpoint_and_never_an_override(
    arguments: list[str], resume: str | None, overrides: list[str]
):
    sys.path.insert(0, str(REPOSITORY / "tools"))
    try:
        from train import parse
    finally:
        sys.path.pop(0)
    for line in (["--config", "x.yaml", *arguments], [*arguments, "--config", "x.yaml"]):
        options = parse(line)
        assert (options.config, options.resume, options.overrides) == ("x.yaml", resume, overrides)
