"""Freezing, the average and the synchronized norm on any module, in a loop of one's own."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from processes import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import detbb
from detbb.core.errors import UserError
from detbb.detector import view
from detbb.freeze import changed, explain

PAGE = Path(__file__).resolve().parents[1] / "docs" / "library.md"


class Net(nn.Module):
    """A user's own: norm, dropout, a bare parameter, a name of its own for freezing, and a `train` of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.rest = nn.Sequential(nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
        self.scale = nn.Parameter(torch.tensor([1.3]))
        self.frozen = "the user's"

    def freeze(self):
        return "the user's"

    def train(self, mode=True):
        super().train(mode)
        self.first.train(mode)  # after all that `super` did
        return self

    def forward(self, x):
        return self.rest(self.first(x)) * self.scale


MODELS = {
    "torchvision": (
        partial(torchvision.models.mobilenet_v3_small, num_classes=3),
        ["features.0", "features.4", "classifier"],
    ),
    "own": (Net, ["first"]),
}


def made(name):
    """With norm statistics, weights and biases that are neither 0 nor 1: a drift of those would not show."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.copy_(torch.rand_like(tensor) * 0.2 + 0.9)
    return model


def learn(model, *, steps=50):
    """In train mode, called anew at each step, and with every parameter in an optimizer with decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        loss = model.train()(torch.randn(2, 3, 32, 32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def moved(model, before):
    return set(changed(model, before))


def below(model, names):
    return {n for n in model.state_dict() if n.startswith(tuple(f"{name}." for name in names))}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("of", ["itself", "a deepcopy", "a pickle", "a deepcopy of a view"])
def test_frozen_is_bit_exact_in_any_loop_and_the_rest_moved(name, of, tmp_path):
    names = MODELS[name][1]
    model = detbb.freeze(made(name), names)
    if of.startswith("a deepcopy"):
        model = copy.deepcopy(view(model) if of.endswith("view") else model)
        detbb.freeze(model, names)
    elif of == "a pickle":
        torch.save(model, tmp_path / "model.pt")
        model = torch.load(tmp_path / "model.pt", weights_only=False)
    frozen = below(model, names)
    assert set(detbb.frozen_names(model)) == frozen == set(detbb.digests(model))
    before = detbb.digests(model.state_dict())
    learn(model, steps=50 if of == "itself" else 5)
    assert moved(model, before) == set(model.state_dict()) - frozen


def test_a_frozen_module_is_what_it_was_but_for_its_mode():
    model, twin = made("own"), made("own")
    ids = {n: id(m) for n, m in model.named_modules()}
    detbb.freeze(model, ["first"])
    assert ids == {n: id(m) for n, m in model.named_modules()} and isinstance(model, Net)
    assert repr(model) == repr(twin) and list(model.state_dict()) == list(twin.state_dict())
    assert model.frozen == model.freeze() == "the user's"
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.train().first(x), model.first(x))  # dropout rests
    model.rest.eval()
    detbb.freeze(model, [])
    assert model.first[2].training and not model.rest.training  # only what was frozen changes its mode


# The mutants: what is written instead elsewhere, each on a model and on its copy.


def by_requires_grad(model):
    for name in MODELS["torchvision"][1]:
        model.get_submodule(name).requires_grad_(False)


def woken(model):
    detbb.freeze(model, MODELS["torchvision"][1])
    train = model.train
    model.train = lambda mode=True: (train(mode), model.features[0][1].train())[0]


def pinned_by_a_bound_function(model):
    """`train` replaced on the instance: its deepcopy still pins the original."""
    by_requires_grad(model)

    def train(mode=True):
        nn.Module.train(model, mode)
        for name in MODELS["torchvision"][1]:
            model.get_submodule(name).eval()
        return model

    model.train = train


@pytest.mark.parametrize(
    ("plant", "copied"), [(by_requires_grad, False), (woken, False), (pinned_by_a_bound_function, True)]
)
def test_mutants_of_a_freeze_are_caught_by_digests(plant, copied):
    model = made("torchvision")
    plant(model)
    learned = copy.deepcopy(model) if copied else model
    before = detbb.digests(learned, below(learned, MODELS["torchvision"][1]))
    learn(learned, steps=2)
    if copied:  # its `train` gives the original
        nn.Module.train(learned)
        learned(torch.randn(2, 3, 32, 32))
    found = moved(learned, before)
    assert found and all(n.endswith(("running_mean", "running_var", "num_batches_tracked")) for n in found)
    if plant is woken:
        assert "features.0.1 is in train mode" in explain(learned, sorted(found))


def test_names_are_asked_without_touching_anything():
    model = made("torchvision")
    before = copy.deepcopy(model.__dict__), type(model), [p.requires_grad for p in model.parameters()]
    for names in (["features.1", "classifier"], []):
        asked = detbb.frozen_names(model, names)
        assert (type(model), [p.requires_grad for p in model.parameters()]) == before[1:]
        assert model.__dict__.keys() == before[0].keys() and all(m.training for m in model.modules())
        assert asked == detbb.frozen_names(detbb.freeze(copy.deepcopy(model), names))
        assert set(asked) == below(model, names) if names else not asked
    with pytest.raises(
        UserError, match=r"freeze: 'feature' is not a submodule; valid are features, .*did you mean 'features'"
    ):
        detbb.freeze(model, ["classifier", "feature"])
    assert type(model) is before[1] and model.classifier[0].weight.requires_grad


def test_a_tied_tensor_is_frozen_under_each_of_its_names():
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 4)})
    model["decoder"].weight = model["encoder"].weight
    detbb.freeze(model, ["decoder"])
    assert detbb.frozen_names(model) == ["encoder.weight", "decoder.weight", "decoder.bias"]


def test_a_frozen_module_inside_another_stays_frozen():
    outer = nn.Sequential(detbb.freeze(made("own"), ["first"]), nn.Linear(3, 3))
    assert set(detbb.frozen_names(outer)) == below(outer, ["0.first"])
    detbb.freeze(outer, ["1"])
    assert set(detbb.frozen_names(outer)) == below(outer, ["0.first", "1"])
    before = detbb.digests(outer)
    learn(outer, steps=3)
    assert not changed(outer, before)


def nested():
    """A model with a backbone of stem and body, and a head."""
    backbone = nn.ModuleDict({"stem": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    return nn.ModuleDict({"backbone": backbone, "head": nn.Linear(2, 2)})


def test_an_outer_freeze_keeps_what_an_inner_one_holds():
    model = detbb.freeze(nested(), ["backbone"])
    detbb.freeze(model["backbone"], ["stem"])
    asked = detbb.frozen_names(model, [])
    detbb.freeze(model, [])
    assert asked == detbb.frozen_names(model) == ["backbone.stem.weight", "backbone.stem.bias"]
    assert not any(p.requires_grad for p in model["backbone"]["stem"].parameters())
    assert not model["backbone"]["stem"].training and model["backbone"]["body"].training
    detbb.freeze(model["backbone"], [])
    assert detbb.frozen_names(detbb.freeze(model, [])) == []


def test_digests_see_what_an_inner_freeze_released():
    model = nested()
    detbb.freeze(model["backbone"], ["stem"])
    detbb.freeze(model, ["backbone"])
    before = detbb.digests(model)
    detbb.freeze(model["backbone"], [])
    assert detbb.digests(model) == before and len(before) == 4
    with torch.no_grad():
        model["backbone"]["stem"].weight += 1
    assert changed(model, before) == ["backbone.stem.weight"]


def test_a_frozen_part_that_is_gone_keeps_no_other_at_rest():
    model = detbb.freeze(nested(), ["backbone.stem", "head"])
    del model["head"]
    detbb.freeze(model, [])
    assert model["backbone"]["stem"].training and model["backbone"]["stem"].weight.requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
def test_a_module_that_cannot_change_class_is_refused():
    model = nn.utils.parametrizations.orthogonal(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"the module itself is parametrized; freeze it first"):
        detbb.freeze(model, [])
    nn.utils.parametrize.remove_parametrizations(model, "weight")
    frozen = detbb.freeze(nn.Linear(2, 2), [])
    nn.utils.parametrizations.orthogonal(frozen)
    nn.utils.parametrize.remove_parametrizations(detbb.freeze(frozen, []), "weight")
    assert type(model) is nn.Linear and isinstance(frozen, nn.Linear)
    with pytest.raises(UserError, match=r"freeze it before torch\.jit\.script"):
        detbb.freeze(torch.jit.script(nn.Linear(2, 2)), [])


def test_digests_skip_extra_state_that_is_no_tensor():
    class Counted(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    model = nn.Sequential(Counted(2, 2))
    assert list(detbb.digests(model.state_dict())) == ["0.weight", "0.bias"]


def _under_ddp():
    model = detbb.freeze(made("torchvision"), MODELS["torchvision"][1])
    ddp = DistributedDataParallel(model)
    with pytest.raises(UserError, match=r"freeze its \.module, and wrap that anew"):
        detbb.freeze(ddp, [])
    before = detbb.digests(model.state_dict())
    frozen = {f"module.{name}" for name in detbb.frozen_names(model)}
    learn(ddp)
    assert set(detbb.frozen_names(ddp)) == frozen  # also asked of the DDP
    return moved(model, before), detbb.digests(model.state_dict())


@pytest.mark.slow
def test_frozen_is_bit_exact_under_ddp_and_ranks_stay_equal():
    (first, same), (second, other) = run_ranks(_under_ddp, 2)
    model = made("torchvision")
    assert first == second == set(model.state_dict()) - below(model, MODELS["torchvision"][1]) and same == other


@pytest.mark.slow
def test_the_loop_of_the_page_runs_on_two_processes(tmp_path):
    """As it is written, but for a last line that compares the processes."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    check = """
found = [None, None]
dist.all_gather_object(found, detbb.digests(model.state_dict()) | detbb.digests(ema.tensors))
if found[0] != found[1] or not ema.updates == 10:
    sys.exit("the processes differ")
"""
    (tmp_path / "loop.py").write_text(code.replace("dist.destroy", check + "dist.destroy"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "loop.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGE.parents[1])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("averaged: torch.Size([1, 3])") == 2
