"""Any input gives a result or a UserError (exit codes 0 and 2): no traceback, no hang, no memory beyond a bound.

`make fuzz` tries more; DETBB_FUZZ is how many inputs of each kind.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickletools
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from planted import DataSet, Evil
from runs import TINY, shrink
from test_checkpoint_folder import content

from detbb.checkpoint.content import open_checkpoint, restore_detector
from detbb.core.errors import UserError
from detbb.data.doctor.examine import examine
from detbb.data.images import image_header, read_image, read_index_png
from detbb.data.loader import SampleReader, eval_loader
from detbb.heads.loading import load_config
from detbb.metrics.evaluators import CocoEvaluator
from detbb.modeling.backbones.resnet import build_resnet
from detbb.modeling.weights import load_backbone_weights

pytestmark = pytest.mark.slow

INPUTS = int(os.environ.get("DETBB_FUZZ", "50"))
LONGEST_S = 20
MOST_BYTES = 400e6
fuzz = settings(
    max_examples=INPUTS,
    deadline=None,
    derandomize="DETBB_FUZZ" not in os.environ,  # the suite tries the same inputs every time
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),  # explaining a failure traces every line: minutes for a checkpoint
)


@contextmanager
def bounded() -> Iterator[None]:
    """Only a UserError of one line may leave the block, in time, and resident memory may not grow beyond the bound."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {LONGEST_S} s")

    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark afresh
    before = _high_water()
    signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError as error:
        assert "\n" not in str(error) or "coverage" in str(error)
    finally:
        signal.alarm(0)
    assert _high_water() - before < MOST_BYTES


def _high_water() -> float:
    status = Path("/proc/self/status").read_text()
    return 1024 * float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with bytes overwritten, cut out, put in or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from([0, 1, 1, 2, 8, 100, 10**6])))
        data = data[:at] + draw(st.binary(max_size=8) | st.just(data[at:end] * 2)) + data[end:]
    return data


# fmt: off
JUNK = st.sampled_from([
    None, True, -1, 0, 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-300, 1e300, float("nan"),
    float("inf"), "", "x", "../x", "/etc/passwd", "7.png", "é\u2028\x00", "\ud800", "9" * 500, [], {}, [[]], [[1, 2]],
    {"a": {}},
    [0, 0, 0, 0], [1, 1, 1e308, 1e308], [-5, -5, 100, 100], {"size": [30, 40], "counts": [1200]},
    {"size": None, "counts": "0"}, {"size": 5, "counts": "0"}, {"size": [30, 40], "counts": "\ud800"}, "\ud800.png",
    2**62, -(2**62), [0, 0, 1e200, 1e200], [1e300, 1, 2],
    {"size": [30, 40], "counts": "Q1"}, {"size": [10**6, 10**6], "counts": [10**12]}, [[0, 0, 1e9, 0, 0, 1e9]],
])
YAML = st.sampled_from([
    "!!python/object/apply:os.system ['touch executed']", "&a [*a, *a]", "*a", "${oc.env:HOME}", "${heads}", "${",
    "${oc.", "\t", "- " * 99, "[" * 2000, "{a: " * 300, "? x", "<<: {a: 1}", "1e999", ".nan", "0x1f", "1_0",
    "2001-01-01", "12:30", "null", "~", "", "yes", "'", '"', "|", ">", "%YAML 9", "---", "...", "\ufeff", "\x00",
    "\x1b[0m", "9" * 5000, "-1", "🤖",
])
# fmt: on


def _places(value: Any, at: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inside for place in _places(item, (*at, key)))]


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of containers with a few entries replaced by junk, taken away or repeated."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 4))):
        places = [place for place in _places(tree) if place]
        if not places:
            break
        *parents, key = draw(st.sampled_from(places))
        at = tree
        for part in parents:
            at = at[part]
        action = draw(st.sampled_from(["junk", "junk", "junk", "remove", "repeat"]))
        if action == "junk":
            at[key] = copy.deepcopy(draw(JUNK))
        elif action == "remove":
            del at[key]
        elif isinstance(at, list):
            at.append(copy.deepcopy(at[key]))
    return tree


@fuzz
@given(data=st.data())
def test_any_config_text(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    lines = TINY.format(out="out", data="data").splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.integers(0, len(lines) - 1))
        line, junk = lines[row], data.draw(YAML | st.text(max_size=12))
        at = data.draw(st.integers(0, len(line)))
        lines[row] = data.draw(
            st.sampled_from([line[:at] + junk + line[at:], line.partition(":")[0] + ": " + junk, junk])
        )
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with bounded():
        load_config(path, world_size=1)
    assert not Path("executed").exists()
    with bounded():
        load_config(data.draw(changed(yaml.safe_load(TINY.format(out="out", data="data")))), world_size=1)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return DataSet(tmp_path_factory.mktemp("fuzz") / "data")


def use_data(data_set: DataSet, text: str | bytes) -> None:
    """What training and evaluation do with a data set, up to the batch."""
    source = data_set.source()
    assert source.train.annotations is not None
    Path(source.train.annotations).write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    report = examine({"mine": source})
    report.check()
    (found,) = report.annotations("train").values()
    needs = frozenset({"masks", "keypoints"} & {need for need in ("masks", "keypoints") if found.has(need)})
    reader = SampleReader(found, source, train=True, needs=needs)
    for index in range(len(found)):
        reader.read(index, epoch=index)
    for split in ("train", "val"):
        for one in report.annotations(split).values():
            list(eval_loader(one, source, batch_size=2))
            evaluator = CocoEvaluator(one)
            results = [{"image_id": int(one.image_ids[0]), "category_id": int(one.category_ids[0])}]
            evaluator.summarize([r | {"bbox": [1.0, 1.0, 9.0, 9.0], "score": 0.5} for r in results])


@fuzz
@given(data=st.data())
def test_any_coco_json(data_set: DataSet, data: st.DataObject) -> None:
    sound = data_set.json["train"]
    if data.draw(st.integers(0, 3)):
        text: str | bytes = json.dumps(data.draw(changed(sound)))
    else:
        text = data.draw(damaged(json.dumps(sound).encode()))
    with bounded():
        use_data(data_set, text)


def rezipped(whole: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A PyTorch file whose structure is changed and whose checksums are right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if entry.filename.endswith(".pkl") else data)
    return made.getvalue()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[bytes]]:
    """A folder, and a sound checkpoint as content and as files of both of PyTorch's forms."""
    from test_faults import _sound

    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        made = _sound(folder).content
    forms = []
    for new_form in (True, False):
        torch.save(content(3), buffer := io.BytesIO(), _use_new_zipfile_serialization=new_form)
        forms.append(buffer.getvalue())
    return folder, made, forms


@fuzz
@given(data=st.data())
def test_any_checkpoint_bytes(checkpoints: tuple[Path, dict[str, Any], list[bytes]], data: st.DataObject) -> None:
    folder, made, forms = checkpoints
    path, kind = folder / "x.pt", data.draw(st.sampled_from(["content", "content", "bytes", "structure", "opcodes"]))
    if kind == "content":
        small = (
            {**made, "model": dict(list(made["model"].items())[:3]), "ema": None} if data.draw(st.booleans()) else made
        )
        torch.save(data.draw(changed(small)), path)
    elif kind == "bytes":
        path.write_bytes(data.draw(damaged(data.draw(st.sampled_from(forms)))))
    elif kind == "structure":
        path.write_bytes(rezipped(forms[0], lambda pickled: data.draw(damaged(pickled))))
    else:
        path.write_bytes(rezipped(forms[0], lambda pickled: _other_opcode(pickled, data)))
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        with bounded():
            restore_detector(open_checkpoint(path))
        with bounded():
            load_backbone_weights(build_resnet("resnet18", out=("layer1",)), str(path))


def _other_opcode(pickled: bytes, data: st.DataObject) -> bytes:
    """The pickle with one instruction replaced by another, its argument kept."""
    places = [position for _, _, position in pickletools.genops(pickled) if position is not None]
    at = data.draw(st.sampled_from(places))
    return pickled[:at] + data.draw(st.sampled_from(pickletools.opcodes)).code.encode("latin1") + pickled[at + 1 :]


def test_a_command_in_any_pickle_does_not_run(checkpoints: tuple[Path, dict[str, Any], list[bytes]]) -> None:
    folder, made, _ = checkpoints
    for key in made:
        torch.save({**made, key: Evil(folder / "executed")}, folder / "x.pt")
        with pytest.raises(UserError, match="other than tensors"):
            open_checkpoint(folder / "x.pt")
    assert not (folder / "executed").exists()


FORMATS = {"jpg": {}, "png": {}, "bmp": {}, "gif": {}, "ppm": {}, "jp2": {}, "webp": {"lossless": True}, "tif": {}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = []
    for suffix, options in FORMATS.items():
        for array in (pixels, pixels[..., 0]):
            more = {"exif": exif} if suffix in ("jpg", "png", "webp", "tif") else {}
            Image.fromarray(array).save(
                buffer := io.BytesIO(), format=Image.registered_extensions()[f".{suffix}"], **options, **more
            )
            made.append(buffer.getvalue())
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(buffer := io.BytesIO(), format="PNG")
    return folder, [*made, buffer.getvalue()]


@fuzz
@given(data=st.data())
def test_any_image_bytes(images: tuple[Path, list[bytes]], data: st.DataObject) -> None:
    folder, made = images
    path = folder / "x.jpg"
    path.write_bytes(data.draw(damaged(data.draw(st.sampled_from(made))) | st.binary(max_size=60)))
    for use in (
        lambda: read_image(path, 1_000_000),
        lambda: image_header(path),
        lambda: read_index_png(path, 1_000_000),
    ):
        with bounded():
            use()
