"""Weight files: every naming lands on torchvision's, nothing of a file runs, every tensor is accounted for."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from detbb.core.errors import UserError
from detbb.modeling.backbones import Backbone
from detbb.modeling.backbones.resnet import build_resnet, build_resnet_c4
from detbb.modeling.norm import FrozenBatchNorm2d, group_norm
from detbb.modeling.weights import load_backbone_weights, load_part, read_tensors, to_torchvision

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> State:
    """The state of a ResNet-18 whose norms are neither 0 nor 1."""
    torch.manual_seed(0)
    state = torchvision.models.resnet18(weights=None).state_dict()
    return {k: torch.rand_like(v) + 0.5 if v.ndim == 1 else v + 3 if v.ndim == 0 else v for k, v in state.items()}


def fresh(norm_layer=FrozenBatchNorm2d, out=("layer2", "layer3", "layer4")) -> Backbone:
    return build_resnet("resnet18", norm_layer=norm_layer, out=out)


def save(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def assert_holds(backbone: nn.Module, state: State, *, counters: bool = True) -> None:
    for name, tensor in backbone.state_dict().items():
        if counters or not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, state[name]), name


def detectron2(state: State) -> State:
    """The same under Detectron2's names, which have no counters."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[-1] == "num_batches_tracked":
            continue
        if parts[0] == "fc":
            parts = ["stem", *parts]
        elif parts[0] == "conv1":
            parts = ["stem", "conv1", parts[-1]]
        elif parts[0] == "bn1":
            parts = ["stem", "conv1", "norm", parts[-1]]
        else:
            parts[0] = f"res{int(parts[0][-1]) + 1}"
            if parts[2] == "downsample":
                parts[2:4] = ["shortcut"] if parts[3] == "0" else ["shortcut", "norm"]
            elif parts[2].startswith("bn"):
                parts[2:3] = [parts[2].replace("bn", "conv"), "norm"]
        renamed[".".join(parts)] = tensor
    return renamed


def caffe2(state: State) -> State:
    """The same under the names of MSRA's files, statistics folded into scale and bias."""
    ends = {"weight": "s", "bias": "b"}
    renamed = {"conv1_w_momentum": torch.zeros(1), "pred_w": state["fc.weight"], "pred_b": state["fc.bias"]}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "fc" or parts[-1] not in ends:
            continue
        branch = {"conv1": "2a", "bn1": "2a", "conv2": "2b", "bn2": "2b", "downsample": "1"}
        if parts[0] == "conv1":
            renamed["conv1_w"] = tensor
        elif parts[0] == "bn1":
            renamed[f"res_conv1_bn_{ends[parts[-1]]}"] = tensor
        else:
            stem = f"res{int(parts[0][-1]) + 1}_{parts[1]}_branch{branch[parts[2]]}"
            renamed[f"{stem}_w" if tensor.ndim == 4 else f"{stem}_bn_{ends[parts[-1]]}"] = tensor
    return renamed


def prefixed(state: State, prefix: str, **others: torch.Tensor) -> State:
    return {**{prefix + k: v for k, v in state.items()}, **others}


WRAPS = {
    "plain": lambda s: s,
    "state_dict of DataParallel": lambda s: {"state_dict": prefixed(s, "module."), "epoch": 3, "arch": "resnet18"},
    "MMDetection": lambda s: {
        "meta": {"epoch": 12},
        "state_dict": prefixed(s, "backbone.", **{"neck.w": torch.ones(2)}),
    },
    "torchvision detector": lambda s: prefixed(s, "backbone.body.", **{"backbone.fpn.x": torch.ones(2)}),
    "detbb checkpoint": lambda s: {
        "format_version": 1,
        "model": prefixed(s, "backbone.", **{"heads.objects.conv1.weight": torch.ones(2)}),
        "ema": {"updates": 1, "tensors": {}},
        "step": 7,
    },
    "MoCo": lambda s: {
        "state_dict": prefixed(s, "module.encoder_q.", **{"module.encoder_k.conv1.weight": torch.ones(1)})
    },
    "compiled": lambda s: prefixed(s, "_orig_mod."),
}


@pytest.mark.parametrize("norm_layer", [FrozenBatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_files_load_every_tensor(model, tmp_path, wrap, norm_layer):
    backbone = fresh(norm_layer)
    coverage = load_backbone_weights(backbone, save(WRAPS[wrap](model), tmp_path / "file.pth"))
    assert_holds(backbone, model)
    assert coverage.share("loaded") == 1
    assert not coverage.sizes["missing"] and not coverage.sizes["wrong shape"] and not coverage.sizes["unexpected"]
    assert set(coverage.sizes["not used"]) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up."])
def test_detectron2_names_load_every_tensor(model, tmp_path, prefix):
    state = detectron2(model)
    assert {"stem.conv1.norm.running_var", "res2.0.conv1.norm.weight", "res3.0.shortcut.weight"} <= set(state)
    backbone = fresh()
    file = save({"model": prefixed(state, prefix), "__author__": "x"}, tmp_path / "file.pth")
    coverage = load_backbone_weights(backbone, file)
    assert_holds(backbone, model, counters=False)
    assert coverage.share("loaded") == 1 and not coverage.sizes["unexpected"]
    assert "BGR" in coverage.notes[0] and "1x1" in coverage.notes[1]


def test_detectron2_c4_model_gives_layer4_to_the_head(model, tmp_path):
    state = {f"roi_heads.{k}" if k.startswith("res5") else f"backbone.{k}": v for k, v in detectron2(model).items()}
    backbone = fresh(out=("layer3",))
    coverage = load_backbone_weights(backbone, save({"model": state}, tmp_path / "file.pth"))
    assert_holds(backbone, model, counters=False)
    head = build_resnet_c4("resnet18")[1]  # BatchNorm2d, and the file has no num_batches_tracked
    part = load_part(head, coverage.state, prefix="layer4.")
    assert_holds(head, {k.removeprefix("layer4."): v for k, v in model.items()}, counters=False)
    assert part.share("loaded") == 1 and not part.sizes["unexpected"]


def test_msra_names_load_with_folded_statistics(model, tmp_path):
    state = caffe2(model)
    assert {"res_conv1_bn_s", "res2_0_branch2a_bn_b", "res3_0_branch1_w"} <= set(state)
    backbone = fresh()
    coverage = load_backbone_weights(backbone, save(state, tmp_path / "file.pth"))
    folded = {k: torch.full_like(v, float(k.endswith("var"))) if "running" in k else v for k, v in model.items()}
    assert_holds(backbone, folded, counters=False)
    assert coverage.share("loaded") == 1
    assert sum("no running statistics" in note for note in coverage.notes) == 1


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_detectron2_pixel_format_is_taken_over_by_conv1(model, tmp_path, order):
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    their_std = torch.ones(3) if order == "BGR" else torch.tensor([57.375, 57.12, 58.395])
    turn = (lambda t, d: t.flip(d)) if order == "BGR" else (lambda t, d: t)
    state = detectron2(model) | {"pixel_mean": turn(mean, 0).view(3, 1, 1), "pixel_std": their_std.view(3, 1, 1)}
    backbone = fresh()
    load_backbone_weights(backbone, save({"model": state}, tmp_path / "file.pth"))
    image = torch.randint(0, 256, (1, 3, 32, 32)).double()
    rgb = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    theirs = (turn(image, 1) - turn(mean, 0).view(3, 1, 1)) / their_std.view(3, 1, 1)
    expected = F.conv2d(theirs, model["conv1.weight"].double(), stride=2, padding=3)
    torch.testing.assert_close(
        backbone.double().conv1(rgb), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32_copies(model, tmp_path, dtype):
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.items()}
    coverage = load_backbone_weights(fresh(), save(stored, tmp_path / "file.pt"))
    assert {v.dtype for v in coverage.state.values()} == {torch.float32, torch.int64}
    state, _ = to_torchvision(model)
    assert all(state[k].data_ptr() != model[k].data_ptr() for k in state)


def test_safetensors_and_a_pkl_that_is_no_pickle_load(model, tmp_path):
    safetensors.torch.save_file(model, tmp_path / "file.safetensors")
    for source in (str(tmp_path / "file.safetensors"), save(model, tmp_path / "file.pkl")):
        backbone = fresh()
        load_backbone_weights(backbone, source)
        assert_holds(backbone, model)


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("writer", [lambda o, p: p.write_bytes(pickle.dumps(o)), torch.save])
def test_code_in_a_file_does_not_run_and_how_to_convert_is_said(tmp_path, writer):
    trace, path = tmp_path / "ran", tmp_path / "R-50.pkl"
    writer({"model": Payload(trace)}, path)
    with pytest.raises(UserError, match=r"R-50\.pkl.*convert it once: python -c") as error:
        load_backbone_weights(fresh(), str(path))
    assert not trace.exists() and "\n" not in str(error.value)


def test_a_pickle_of_arrays_as_detectron2_has_them_loads(model, tmp_path):
    arrays = {k: v.numpy() for k, v in detectron2(model).items()}
    for number, wrapper in enumerate(("model", "blobs")):
        for protocol in (2, 4, 5):
            content = {wrapper: arrays, "__author__": "x", "number": np.float32(1)}
            path = tmp_path / f"{protocol}{number}.pkl"
            path.write_bytes(pickle.dumps(content, protocol).replace(b"cnumpy._core.", b"cnumpy.core."))
            backbone = fresh()
            load_backbone_weights(backbone, str(path))
            assert_holds(backbone, model, counters=False)


def test_arrays_of_a_pickle_keep_shape_order_and_values(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = {"c": values, "f": np.asfortranarray(values), "t": values.reshape(1, 2, 3).transpose(2, 0, 1)}
    arrays |= {"big": values.astype(">f8"), "one": np.array(3), "flag": values > 2}
    for protocol in range(2, 6):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(arrays, protocol))
        found = read_tensors(path)
        assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())


class Call:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return np.ndarray, self.arguments


def test_a_pickle_of_arrays_cannot_make_pointers_of_bytes(tmp_path):
    pointers = Call((1,), np.dtype("O"), b"A" * 8)
    for content in ({"a": Call(pointers)}, {"a": np.array([None])}):  # the first ended the process
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, 4))
        with pytest.raises(UserError, match="other than tensors"):
            read_tensors(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("name", "write"),
    [("IN.pkl", lambda content, path: path.write_bytes(pickle.dumps(content, 2))), ("IN.pth", torch.save)],
)
def test_the_conversion_line_of_the_error_works(model, tmp_path, name, write):
    path = tmp_path / name
    write({"model": {k: v.numpy() for k, v in detectron2(model).items()}, "made_in": Path("x")}, path)
    with pytest.raises(UserError) as error:
        load_backbone_weights(fresh(), str(path))
    line = re.search(r'python -c "(.*)"', str(error.value))[1]
    exec(line.replace("'IN'", repr(str(path))).replace("OUT.pth", str(tmp_path / "OUT.pth")), {})
    backbone = fresh()
    load_backbone_weights(backbone, str(tmp_path / "OUT.pth"))
    assert_holds(backbone, model, counters=False)
    assert "PyTorch 2.6" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_conversion_line_works_on_a_pickled_module(model, tmp_path, wrapped):
    module = torchvision.models.resnet18()
    module.load_state_dict(model)
    torch.save({"model": module, "date": Path("x")} if wrapped else module, tmp_path / "IN.pth")
    with pytest.raises(UserError) as error:
        load_backbone_weights(fresh(), str(tmp_path / "IN.pth"))
    line = re.search(r'python -c "(.*)"', str(error.value))[1]
    exec(line.replace("'IN'", repr(str(tmp_path / "IN.pth"))).replace("OUT.pth", str(tmp_path / "OUT.pth")), {})
    backbone = fresh()
    load_backbone_weights(backbone, str(tmp_path / "OUT.pth"))
    assert_holds(backbone, model)


@pytest.mark.parametrize("text", ["train: {steps: 2}\n", "<html>404</html>"])
def test_a_file_that_is_no_pickle_is_not_to_be_converted(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml: ") as error:
        read_tensors(tmp_path / "mine.yaml")
    assert "python -c" not in str(error.value)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    state = {"conv1.weight": torch.ones(64, 3, 7, 7)}
    whole = Path(save(state, tmp_path / "whole.pth"))
    assert list(read_tensors(whole)) == list(state)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:-5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(safetensors.torch.save(state)[:5000])
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    save([1, 2], tmp_path / "list.pth")
    for name in ("cut.pth", "empty.pth", "cut.safetensors", "bomb.pth", "list.pth", "absent.pth"):
        with pytest.raises(UserError, match=re.escape(name)) as error:
            read_tensors(tmp_path / name)
        assert "\n" not in str(error.value)


def test_coverage_counts_every_tensor_and_prints_its_share(model, tmp_path):
    state = {k: v for k, v in model.items() if not k.startswith("layer4")}
    del state["layer1.0.bn1.weight"]
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    state["attention.weight"] = torch.zeros(10)
    backbone = fresh(out=("layer3",))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    coverage = load_backbone_weights(backbone, save(state, tmp_path / "file.pth"))
    assert coverage.sizes["missing"] == {"layer1.0.bn1.weight": 64}
    assert coverage.sizes["wrong shape"] == {"layer1.0.conv1.weight": 36_864}
    assert coverage.sizes["unexpected"] == {"attention.weight": 10}
    elements = {k: v.numel() for k, v in before.items() if not k.endswith("tracked")}
    assert sum(map(len, (coverage.sizes[k] for k in ("loaded", "missing", "wrong shape")))) == len(elements)
    share = 1 - (64 + 36_864) / sum(elements.values())
    assert coverage.share("loaded") == pytest.approx(share)
    assert re.search(rf"loaded +{len(elements) - 2} .* {100 * share:.2f}\n", coverage.table())
    assert re.search(r"wrong shape +1 +36,864 .*layer1\.0\.conv1\.weight", coverage.table())
    own = backbone.state_dict()
    left = {"layer1.0.bn1.weight", "layer1.0.conv1.weight"}
    assert all(torch.equal(own[k], (before if k in left else state)[k]) for k in own)


def test_less_than_90_percent_is_refused_and_loads_nothing(model, tmp_path):
    state = {k: v for k, v in model.items() if not k.startswith("layer4.1")}
    backbone = fresh()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(
        UserError, match=r"covers 57\.\d % of resnet18, at least 90 % .*missing: layer4\.1\.conv1\.weight"
    ):
        load_backbone_weights(backbone, save(state, tmp_path / "file.pth"))
    assert_holds(backbone, before)


def test_nan_in_a_file_is_refused(model, tmp_path):
    state = {**model, "layer2.0.conv1.weight": torch.full_like(model["layer2.0.conv1.weight"], torch.nan)}
    with pytest.raises(UserError, match=r"NaN or infinite values in layer2\.0\.conv1\.weight"):
        load_backbone_weights(fresh(), save(state, tmp_path / "file.pth"))


def test_batch_norm_file_in_a_group_norm_backbone_is_noted(model, tmp_path):
    coverage = load_backbone_weights(fresh(group_norm), save(model, tmp_path / "file.pth"))
    assert "no place in this norm" in coverage.notes[0] and "note: " in coverage.table()


def test_imagenet_asks_torchvision_for_hash_checked_v1(model, monkeypatch, capsys):
    asked = []

    def answer(url, **arguments):
        asked.append((url, arguments["check_hash"]))
        return dict(model)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", answer)
    backbone = build_resnet("resnet18", norm_layer=FrozenBatchNorm2d, weights="imagenet")
    assert_holds(backbone, model)
    assert asked == [(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url, True)]
    assert "100.00" in capsys.readouterr().out


def test_imagenet_that_cannot_be_fetched_is_a_users_error(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(
        UserError, match=r"backbone\.weights: cannot fetch https://.*resnet18.*checkpoints \(no network\)"
    ):
        load_backbone_weights(fresh(), "imagenet")


def test_c4_takes_layer4_from_the_same_file(model, tmp_path):
    backbone, head = build_resnet_c4("resnet18", weights=save(model, tmp_path / "file.pth"))
    assert_holds(backbone, model)
    assert_holds(head, {k.removeprefix("layer4."): v for k, v in model.items() if k.startswith("layer4.")})
