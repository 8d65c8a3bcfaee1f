"""Parameter groups by module type and name, the learning rate as a pure function, and the phases of a run."""

from __future__ import annotations

import pytest
import torch
from learning import small_config, small_detector
from torch import nn

from detbb.config.phases import phase_at, plan_phases
from detbb.config.schema import OptimizerConfig, PhaseConfig, ScheduleConfig
from detbb.core.errors import UserError
from detbb.modeling.norm import is_norm
from detbb.training.optim import (
    build_optimizer,
    decay_by_name,
    load_state_by_name,
    lr_by_name,
    lr_factor,
    state_by_name,
)

pytestmark = pytest.mark.usefixtures("unsynced", "thin_resnets")


def test_every_trained_parameter_is_in_exactly_one_group():
    detector = small_detector(small_config()).freeze(["backbone.stem", "neck"])
    optimizer = build_optimizer(detector, OptimizerConfig(lr_mult={"backbone": 0.1}))
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(n for n, p in detector.named_parameters() if p.requires_grad)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in detector.parameters() if p.requires_grad}


def test_norms_and_biases_take_their_own_decay_by_module_type():
    detector = small_detector(small_config())
    decays = decay_by_name(detector, OptimizerConfig(weight_decay=0.1, norm_weight_decay=0.02))
    modules = dict(detector.named_modules())
    for name, decay in decays.items():
        owner, _, own = name.rpartition(".")
        weight = own == "weight" and isinstance(modules[owner], (nn.Conv2d, nn.Linear))
        assert decay == (0.1 if weight else 0.02), name
    assert any(is_norm(modules[n.rpartition(".")[0]]) for n in decays)
    # The names of downsample norms end in a number: a rule by name would miss them.
    assert decays["backbone.layer2.0.downsample.1.weight"] == 0.02


def test_the_longest_matching_name_gives_the_factor():
    factors = lr_by_name(
        small_detector(small_config()), {"backbone": 0.1, "backbone.layer4": 0.5, "backbone.stem": 0.01}
    )
    for name, factor in factors.items():
        if name.startswith("backbone."):
            part = name.split(".")[1]
            assert factor == {"layer4": 0.5, "conv1": 0.01, "bn1": 0.01}.get(part, 0.1), name
        else:
            assert factor == 1.0, name


def square_root(step, schedule, total_steps):
    return (step + 1) ** -0.5


def rmsprop(groups, optimizer, *, fused):
    return torch.optim.RMSprop(groups, lr=optimizer.lr, momentum=optimizer.momentum)


def test_a_schedule_and_an_optimizer_from_outside_are_found():
    schedule = ScheduleConfig(type=f"{__name__}:square_root", warmup_steps=2)
    assert lr_factor(3, schedule, 90) == 0.5 and lr_factor(0, schedule, 90) == 1e-3
    made = build_optimizer(small_detector(small_config()), OptimizerConfig(type=f"{__name__}:rmsprop"))
    assert isinstance(made, torch.optim.RMSprop) and made.defaults["momentum"] == 0.9
    assert {group["weight_decay"] for group in made.param_groups} == {0.0, 1e-4}


def test_multistep_with_warmup_is_detectron2s():
    schedule = ScheduleConfig(type="multistep", milestones=[60, 80], gamma=0.1, warmup_steps=10)
    factors = [lr_factor(step, schedule, 90) for step in range(90)]
    assert factors[0] == pytest.approx(1e-3) and factors[5] == pytest.approx(0.5005) and factors[10] == 1.0
    assert factors[59] == 1.0 and factors[60] == pytest.approx(0.1) and factors[80] == pytest.approx(0.01)


def test_cosine_and_constant():
    assert [lr_factor(s, ScheduleConfig(type="cosine"), 100) for s in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
    assert {lr_factor(s, ScheduleConfig(type="constant"), 100) for s in range(100)} == {1.0}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_state_by_name_survives_a_round_trip_to_the_bit(kind):
    config = OptimizerConfig(type=kind, lr=0.1)
    detector = small_detector(small_config())
    optimizer = build_optimizer(detector, config)
    for step in range(2):
        for parameter in detector.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
        optimizer.step()
    again = build_optimizer(detector, config)
    load_state_by_name(again, state_by_name(optimizer))
    before, after = state_by_name(optimizer), state_by_name(again)
    assert before.keys() == after.keys()
    for name, state in before.items():
        assert all(torch.equal(after[name][key], value) for key, value in state.items())
        assert all(after[name][key].data_ptr() != value.data_ptr() for key, value in state.items())


def test_phases_cover_the_run():
    config = small_config()
    config.phases = [
        PhaseConfig(steps=3, freeze=["backbone"]),
        PhaseConfig(steps=4, freeze=["neck"]),
        PhaseConfig(steps=None, freeze=[]),
    ]
    phases = plan_phases(config, 10)
    assert [(p.start, p.end, p.freeze) for p in phases] == [(0, 3, ("backbone",)), (3, 7, ("neck",)), (7, 10, ())]
    assert [phase_at(phases, step).index for step in range(10)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("lengths", [[3, 4], [3, 9, None], [5, 6], [10, None]])
def test_phases_that_do_not_fit_the_run_are_refused(lengths):
    config = small_config()
    config.phases = [PhaseConfig(steps=length, freeze=[]) for length in lengths]
    with pytest.raises(UserError, match="phases: the phases end at steps"):
        plan_phases(config, 10)
