"""Evaluation and prediction of a trained checkpoint: the same numbers everywhere, and files a person can use."""

import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from planted import DataSet, semantic
from processes import run_ranks

from detbb.checkpoint.branches import extract, slim
from detbb.checkpoint.content import checkpoint_file, load_detector, open_checkpoint
from detbb.config.schema import Config, TrainConfig
from detbb.core.errors import UserError
from detbb.data.formats import read_split
from detbb.data.images import BadImage
from detbb.distributed.collectives import rank
from detbb.heads.loading import config_from_dict
from detbb.heads.semantic import SemanticConfig
from detbb.inference.evaluate import evaluate, evaluate_detector, write_json
from detbb.inference.export import export_onnx
from detbb.inference.predict import find_images, predict
from detbb.metrics.evaluators import CocoEvaluator, SemanticEvaluator
from detbb.report.log import RunLog
from detbb.structures.predictions import Predictions
from detbb.training.loop import train

pytestmark = pytest.mark.usefixtures("unsynced")

ROOT = Path(__file__).parents[1]
FILES = ("results.json", "metrics.json", "samples.png", "pr_curves.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run/` (two branches on one source, seven val images) and the images it learned from."""
    folder = tmp_path_factory.mktemp("evaluate")
    shapes = {"format": "shapes", "image_size": [64, 64]}
    shapes |= {"train": {"images": str(folder / "data"), "size": 8}, "val": {"images": str(folder / "data"), "size": 7}}
    values = {
        "device": "cpu",
        "output_dir": str(folder / "run"),
        "backbone": {"arch": "resnet18", "norm": "bn"},
        "neck": {"type": "fpn", "channels": 64},
        "data": {"shapes": shapes},
        "heads": {
            "objects": {"type": "fcos", "data": "shapes", "threshold": 0.0},
            "present": {"type": "classify", "data": "shapes", "multi_label": True},
        },
        "train": {"steps": 3, "batch_size": 4, "workers": 0},
        "optimizer": {"type": "adamw", "lr": 0.001},
        "ema": {"decay": 0.5, "warmup_steps": 0},
        "eval": {"weights": "both", "batch_size": 2},
        "log": {"images": 2},
    }
    train(config_from_dict(values, "test"))
    return folder


def checkpoint_of(run: Path) -> Path:
    return run / "run/checkpoints/step_0000003.pt"


def logged(run: Path, weights: str) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "run/metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line.get("weights") == weights]
    return {name: value for name, value in line.items() if "/" in name}


def parts_of(run: Path) -> tuple[Config, dict]:
    config = config_from_dict(open_checkpoint(checkpoint_of(run))["config"], "test")
    annotations = read_split(config.data["shapes"], "val", "shapes")
    return config, {name: annotations for name in config.heads}


def test_a_checkpoint_gives_exactly_what_training_logged(run: Path, tmp_path: Path) -> None:
    metrics = evaluate(checkpoint_of(run), output_dir=tmp_path / "out")
    averaged, raw = logged(run, "ema"), logged(run, "model")
    assert metrics == averaged | {f"model:{name}": value for name, value in raw.items()}
    assert averaged != raw and {"objects/bbox/AP", "present/cls/mAP"} <= set(averaged)
    for suffix in ("", "_model"):
        for name in FILES:
            ours, theirs = (
                tmp_path / f"out{suffix}/objects" / name,
                run / f"run/eval/step_0000003{suffix}/objects" / name,
            )
            assert ours.read_bytes() == theirs.read_bytes()
    own = json.loads((tmp_path / "out/objects/metrics.json").read_text())
    assert own["weights"] == "ema" and own["bbox/AP"] == averaged["objects/bbox/AP"]


@pytest.mark.slow
def test_metrics_and_files_do_not_depend_on_process_count(run: Path, tmp_path: Path) -> None:
    """Four groups over three processes: nobody may be padded, counted twice, or grouped otherwise."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += [str(ROOT / "tools/eval.py"), str(checkpoint_of(run)), "--output-dir", str(tmp_path / "out")]
    command += ["--head", "objects", "eval.weights=ema"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    evaluate(checkpoint_of(run), heads=["objects"], overrides=["eval.weights=ema"], output_dir=tmp_path / "one")
    for name in FILES:
        assert (tmp_path / "out/objects" / name).read_bytes() == (tmp_path / "one/objects" / name).read_bytes()
    assert not (tmp_path / "out/present").exists() and done.stdout.count("objects/bbox") == 1


def fail_on_one_rank(checkpoint: Path, kind: str) -> tuple[str, int]:
    """The error's type and text, and the most bytes that every rank was sent."""
    sent = [0]
    gather = dist.all_gather_object
    dist.all_gather_object = lambda items, item: (sent.append(len(pickle.dumps(item))), gather(items, item))[1]
    add, calls = CocoEvaluator.add, []

    def fail(self: CocoEvaluator, image_id: int, predictions: Predictions) -> None:
        add(self, image_id, predictions)
        calls.append(image_id)
        if rank() == 1 and len(calls) == 2 and kind:
            raise BadImage("x.png", "is cut") if kind == "image" else FloatingPointError("not finite")

    CocoEvaluator.add = fail  # type: ignore[method-assign]
    try:
        evaluate(checkpoint, heads=["objects"], overrides=["eval.weights=ema"])
    except (UserError, FloatingPointError) as error:
        return f"{'UserError' if isinstance(error, UserError) else type(error).__name__}: {error}", max(sent)
    return "", max(sent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "says"), [("image", "UserError: x.png: is cut"), ("number", "FloatingPointError: not finite"), ("", "")]
)
def test_what_one_process_cannot_evaluate_ends_all_of_them(run: Path, kind: str, says: str) -> None:
    for found, most in run_ranks(fail_on_one_rank, 2, checkpoint_of(run), kind, timeout_s=60):
        assert found == says and most < 1000  # results and pictures go to rank 0 alone


def test_an_image_with_a_bad_mask_is_left_out_or_ends_the_run(tmp_path: Path) -> None:
    data = DataSet(tmp_path / "data")
    semantic(data, mode="RGB")
    source = data.source().model_copy(update={"on_bad_image": "skip"})
    annotations = read_split(source, "train", "mine")
    assert annotations is not None

    class Zeros(torch.nn.Module):
        """A detector that gives every pixel label 0; the truth is 1."""

        _head = SimpleNamespace(
            needs="semantic", main_metric="sem/mIoU", evaluator=lambda a, engine: SemanticEvaluator(a)
        )
        heads = {"sem": _head}  # noqa: RUF012
        parameters = staticmethod(lambda: iter([torch.zeros(1)]))  # type: ignore[assignment]

        def predict(self, images: torch.Tensor, sizes: list, heads: list[str]) -> dict[str, list[Predictions]]:
            return {"sem": [Predictions(semantic=torch.zeros(len(annotations.classes), *s.hw)) for s in sizes]}

    heads = {"sem": SemanticConfig(type="semantic", data="mine")}
    options = {"output_dir": None, "weights": "ema"}
    config = Config(data={"mine": source}, heads=heads, train=TrainConfig(workers=0))  # type: ignore[arg-type]
    found = evaluate_detector(Zeros(), {"sem": annotations}, config=config, **options)  # type: ignore[arg-type]
    assert found["sem/sem/pACC"] == 0
    source.on_bad_image = "error"
    with pytest.raises(UserError, match=r"7\.png: has mode RGB"):
        evaluate_detector(Zeros(), {"sem": annotations}, config=config, **options)  # type: ignore[arg-type]


def test_heads_of_one_source_share_one_backbone_pass(run: Path) -> None:
    config, annotations = parts_of(run)
    detector = load_detector(checkpoint_of(run))
    calls: list[list[str]] = []
    original = detector.predict
    detector.predict = lambda *a, heads: calls.append(list(heads)) or original(*a, heads=heads)  # type: ignore[method-assign]
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = evaluate_detector(detector, annotations, config=config, output_dir=None, weights="ema")
    assert calls == [["objects", "present"]] * 4  # seven images in groups of two
    assert torch.equal(torch.get_rng_state(), random[0]) and (np.random.get_state()[1] == random[1]).all()
    assert not detector.training and all(torch.equal(t, before[n]) for n, t in detector.state_dict().items())
    assert evaluate_detector(detector, annotations, config=config, output_dir=None, weights="ema") == first


def test_stopping_leaves_no_half_result(run: Path, tmp_path: Path) -> None:
    config, annotations = parts_of(run)
    asked = iter([False, True])
    metrics = evaluate_detector(
        load_detector(checkpoint_of(run)),
        annotations,
        config=config,
        output_dir=tmp_path,
        weights="ema",
        stop=lambda: next(asked),
    )
    assert metrics == {} and not list(tmp_path.iterdir())


def test_results_are_in_original_ids_and_pixels(run: Path, tmp_path: Path) -> None:
    """The images are resized to half: boxes in resized pixels would end in the left half."""
    evaluate(checkpoint_of(run), output_dir=tmp_path, heads=["objects"], overrides=["eval.weights=ema"])
    _, annotations = parts_of(run)
    data = annotations["objects"]
    sizes = dict(zip(data.image_ids.tolist(), data.sizes.tolist(), strict=True))
    results = json.loads((tmp_path / "objects/results.json").read_text())
    assert {r["image_id"] for r in results} <= set(sizes) and {r["category_id"] for r in results} <= set(
        data.category_ids
    )
    assert results == sorted(results, key=lambda r: r["image_id"])
    right = max((r["bbox"][0] + r["bbox"][2]) / sizes[r["image_id"]][1] for r in results)
    assert 0.9 < right <= 1 + 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": ["object"]}, "'object' is not known; valid are objects, present"),
        ({"overrides": ["data.shapes.val=null"]}, "no head of this checkpoint has data"),
        ({"overrides": ["eval.batchsize=2"]}, "eval.batchsize"),
        ({"overrides": ["data.shapes.val=null"], "heads": ["present"]}, "data.shapes has no 'val' split"),
    ],
)
def test_what_cannot_be_evaluated_is_said(run: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(checkpoint_of(run), **arguments)


def test_predictions_of_files_and_folders(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = sorted((run / "data").rglob("*.png"))[:2]
    pixels = np.asarray(Image.open(images[0]).convert("RGB"))
    for name in ("a/one.png", "b/deep/one.png", "b/one.png", "细胞 ü.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "a/bad.jpg").write_bytes(b"no image")
    inputs = [tmp_path / "a", tmp_path / "b", tmp_path / "细胞 ü.png", tmp_path / "none.png"]
    entries = predict(checkpoint_of(run), inputs, output_dir=tmp_path / "out", threshold=0.0)
    pictures = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    stems = ["deep/one", "one", "one_2", "细胞 ü"]
    assert pictures == sorted(f"{stem}.{head}.png" for stem in stems for head in ("objects", "present"))
    assert json.loads((tmp_path / "out/predictions.json").read_text()) == entries
    assert [Path(e["file_name"]).name for e in entries] == ["one.png", "one.png", "one.png", "细胞 ü.png"]
    assert len({json.dumps(e["heads"]["objects"]).replace(f'"image_id": {e["id"]},', "") for e in entries}) == 1
    found = entries[0]["heads"]["objects"][0]
    assert {"bbox", "score", "category_id", "category", "image_id"} == set(found)
    assert entries[0]["heads"]["present"][0]["category"] in ("circle", "rectangle", "triangle")
    error = capsys.readouterr().err
    assert error.count("skipped") == 2 and "bad.jpg" in error and "none.png" in error


def test_predictions_are_those_that_evaluation_makes(run: Path, tmp_path: Path) -> None:
    evaluate(checkpoint_of(run), output_dir=tmp_path, overrides=["eval.weights=ema", "eval.batch_size=1"])
    _, annotations = parts_of(run)
    data = annotations["objects"]
    (entry,) = predict(checkpoint_of(run), data.path(0), threshold=0.0)
    results = json.loads((tmp_path / "objects/results.json").read_text())
    expected = [r["bbox"] for r in results if r["image_id"] == data.image_ids[0]]
    assert [r["bbox"] for r in entry["heads"]["objects"]] == expected and expected


def test_threshold_and_head_choose_what_is_said(run: Path) -> None:
    image = next((run / "data").rglob("*.png"))
    (all_of_them,) = predict(checkpoint_of(run), image, heads=["objects"])  # the head's own threshold is 0
    scores = [r["score"] for r in all_of_them["heads"]["objects"]]
    middle = sorted(scores)[len(scores) // 2]
    (some,) = predict(checkpoint_of(run), image, heads=["objects"], threshold=middle)
    assert [r["score"] for r in some["heads"]["objects"]] == [s for s in scores if s >= middle]
    assert list(some["heads"]) == ["objects"] and 0 < len(some["heads"]["objects"]) < len(scores)
    for value in (-0.1, 5.0, float("nan")):
        with pytest.raises(UserError, match=r"--threshold: .* valid are numbers from 0 to 1"):
            predict(checkpoint_of(run), run / "data", threshold=value)


def test_inputs_are_never_overwritten(run: Path, tmp_path: Path) -> None:
    source = next((run / "data").rglob("*.png"))
    for name in ("x.png", "x.objects.png"):
        (tmp_path / name).write_bytes(source.read_bytes())
    for _ in range(2):
        predict(
            checkpoint_of(run), [tmp_path / "x.png", tmp_path / "x.objects.png"], output_dir=tmp_path, heads=["objects"]
        )
    assert (tmp_path / "x.objects.png").read_bytes() == (tmp_path / "x.png").read_bytes() == source.read_bytes()
    assert (tmp_path / "x_2.objects.png").exists()


def test_earlier_pictures_inside_an_input_folder_are_no_inputs(tmp_path: Path) -> None:
    for name in ("x.png", "out/x.objects.png", "other/y.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(name) for _, name in find_images([tmp_path], tmp_path / "out")] == ["other/y.jpg", "x.png"]
    with pytest.raises(UserError, match=r"--output-dir: .* is an input, too"):
        list(find_images([tmp_path / "x.png", tmp_path], tmp_path / "other" / ".."))


def test_only_bad_inputs_exit_with_2(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict.py", str(checkpoint_of(run)), str(tmp_path / "none.png"), "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/predict.py"), run_name="__main__")
    assert ended.value.code == 2 and "error: no image to predict on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/x", "/proc/nope", "x" * 300])
def test_an_unwritable_output_is_refused_before_the_work(run: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    checkpoint, out = checkpoint_of(run), tmp_path / place
    config = config_from_dict(open_checkpoint(checkpoint)["config"] | {"output_dir": str(out)}, "test")
    for command in (
        lambda: train(config),
        lambda: evaluate(checkpoint, output_dir=out),
        lambda: predict(checkpoint, run / "data", output_dir=out),
        lambda: extract(checkpoint, "objects", output=out / "b.pt"),
        lambda: export_onnx(checkpoint, out / "x.onnx"),
        lambda: write_json(out / "x.json", []),
        lambda: RunLog(out),
    ):
        with pytest.raises(UserError, match=f"cannot write {out}"):
            command()
    with pytest.raises(UserError, match="is a folder"):
        extract(checkpoint, "objects", output=tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_folder_means_its_best_checkpoint(run: Path, tmp_path: Path, capsys) -> None:
    folder = run / "run"
    assert checkpoint_file(folder) == folder / "checkpoints/best.pt"
    assert checkpoint_file(folder / "checkpoints") == folder / "checkpoints/best.pt"
    assert evaluate(folder) == evaluate(folder / "checkpoints/best.pt")
    assert f"{folder}: best.pt ({folder}/checkpoints/best.pt)" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.pt").hardlink_to(checkpoint_of(run))
    assert open_checkpoint(tmp_path)["step"] == 3 and "last.pt" in capsys.readouterr().err
    with pytest.raises(UserError, match="is a folder without"):
        open_checkpoint(run)


def test_a_slim_checkpoint_evaluates_to_the_same_bytes(run: Path, tmp_path: Path) -> None:
    whole, small = checkpoint_of(run), tmp_path / "slim.pt"
    assert "averages (EMA) as evaluated" in slim(whole, output=small)[0]
    assert small.stat().st_size < 0.4 * whole.stat().st_size
    evaluate(whole, output_dir=tmp_path / "whole", overrides=["eval.weights=ema"])
    evaluate(small, output_dir=tmp_path / "slim")
    for head in ("objects", "present"):
        one, other = (tmp_path / kind / head / "results.json" for kind in ("whole", "slim"))
        assert one.read_bytes() == other.read_bytes()
    config = config_from_dict(open_checkpoint(whole)["config"] | {"output_dir": str(tmp_path / "new")}, "test")
    with pytest.raises(UserError, match=r"--resume: .*'none'; use init_from"):
        train(config, resume=str(small))


def test_another_config_gives_the_data_and_keeps_the_branches(run: Path, tmp_path: Path) -> None:
    """Its batch size would not divide among torchrun's processes, which only matters to training."""
    text = (run / "run/config.yaml").read_text().replace("size: 7", "size: 5").replace("/data", "/more")
    (tmp_path / "other.yaml").write_text(text.replace("weights: both", "weights: ema"))
    metrics = evaluate(checkpoint_of(run), config=tmp_path / "other.yaml", output_dir=tmp_path / "out")
    assert {"objects/bbox/AP", "present/cls/mAP"} <= set(metrics) and metrics != logged(run, "ema")
    ids = {r["image_id"] for r in json.loads((tmp_path / "out/present/results.json").read_text())}
    assert len(ids) == 5
    (tmp_path / "other.yaml").write_text(text.replace("present:", "absent:"))
    with pytest.raises(UserError, match="'absent' is not known; valid are objects, present"):
        evaluate(checkpoint_of(run), config=tmp_path / "other.yaml")
