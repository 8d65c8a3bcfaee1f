"""The average is exact where it must be, right where it moves, and small."""

from __future__ import annotations

import math

import pytest
import torch
from learning import bits_differ, copy_state, learn, make_state, small_config, small_detector
from torch import nn

from detbb.config.schema import EmaConfig
from detbb.core.errors import UserError
from detbb.detector import view
from detbb.training.ema import Ema

pytestmark = pytest.mark.usefixtures("unsynced", "thin_resnets")

STEM = ["backbone.stem", "backbone.layer1"]


def test_ema_equals_a_float64_loop_over_the_weights():
    config = small_config()
    config.ema = EmaConfig(decay=0.97, warmup_steps=10)
    state = make_state(config, small_detector(config), STEM)
    wide = {n: state.detector.state_dict()[n].double() for n in state.ema.tensors}
    for step in range(60):
        learn(state, 1, first=step)
        d = 0.97 * (1 - math.exp(-(step + 1) / 10))
        now = state.detector.state_dict()
        wide = {n: d * e + (1 - d) * now[n].double() for n, e in wide.items()}
    assert any(n.endswith("running_mean") for n in wide) and not any(n.endswith("num_batches_tracked") for n in wide)
    for name, e in wide.items():
        error = (state.ema.tensors[name].double() - e).norm() / e.norm().clamp(min=1e-12)
        assert error <= 1e-6, (name, float(error))


def test_10000_updates_leave_frozen_tensors_alone_and_unstored():
    detector = small_detector(small_config()).freeze(["backbone", "neck"])
    before = copy_state(detector)
    ema = Ema(detector, decay=0.9999)
    for _ in range(10_000):
        ema.update()
    assert ema.updates == 10_000
    averaged = view(detector, ema.tensors).state_dict()
    frozen = {n for n in before if n.startswith(("backbone.", "neck."))}
    assert not frozen & set(ema.tensors)
    assert not bits_differ(before, averaged)  # the trained ones did not move either, so lerp must be exact on them
    trained = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    assert sum(t.numel() for t in ema.tensors.values()) == trained


def test_mutant_multiply_add_drifts_where_lerp_does_not():
    weight = torch.randn(4096) * 0.05
    lerped, drifting = weight.clone(), weight.clone()
    for _ in range(1000):
        torch._foreach_lerp_([lerped], [weight], 1 - 0.9999)
        drifting = 0.9999 * drifting + (1 - 0.9999) * weight
    assert torch.equal(lerped, weight)
    assert (drifting != weight).float().mean() > 0.1


def test_ema_of_newly_frozen_and_newly_trained_is_live_value():
    config = small_config()
    config.ema = EmaConfig(decay=0.99, warmup_steps=0)
    state = make_state(config, small_detector(config), STEM)
    learn(state, 5)
    live = copy_state(state.detector)
    assert not torch.equal(state.ema.tensors["neck.inner.layer2.0.weight"], live["neck.inner.layer2.0.weight"])
    state.freeze(["neck"], config.optimizer)
    assert state.ema.updates == 5
    averaged = view(state.detector, state.ema.tensors).state_dict()
    assert all(torch.equal(averaged[n], live[n]) for n in live if n.startswith("neck."))
    assert torch.equal(state.ema.tensors["backbone.conv1.weight"], live["backbone.conv1.weight"])
    learn(state, 1, first=5)
    assert state.ema.updates == 6
    assert not torch.equal(state.ema.tensors["backbone.conv1.weight"], state.detector.backbone.conv1.weight)


def test_a_skipped_step_is_not_an_update(tmp_path):
    config = small_config()
    config.train.on_nonfinite = "skip"
    config.ema = EmaConfig(decay=0.9, warmup_steps=0)
    state = make_state(config, small_detector(config), [])
    learn(state, 1)
    before, averaged = copy_state(state.detector), {n: t.clone() for n, t in state.ema.tensors.items()}
    weight = state.detector.heads["objects"].loss
    state.detector.heads["objects"].loss = lambda *a: {k: v * float("nan") for k, v in weight(*a).items()}
    learn(state, 1, first=1, folder=tmp_path)
    assert state.ema.updates == 1 and not bits_differ(before, copy_state(state.detector))
    assert not bits_differ(averaged, state.ema.tensors)


def test_averages_are_kept_in_fp32_at_least():
    detector = small_detector(small_config()).to(torch.bfloat16)
    ema = Ema(detector.freeze([]), decay=0.999)
    assert {t.dtype for t in ema.tensors.values()} == {torch.float32}


def test_a_view_shares_all_memory_but_the_averages():
    detector = small_detector(small_config())
    seen = view(detector)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(detector.parameters(), seen.parameters(), strict=True))
    assert detector.training and not any(m.training for m in seen.modules())
    assert all(p.requires_grad for p in detector.parameters()) and not any(p.requires_grad for p in seen.parameters())


@pytest.mark.parametrize("warmup", [0, 100])
def test_the_decay_rises_to_its_value(warmup):
    ema = Ema(nn.Linear(2, 2), decay=0.999, warmup_steps=warmup)
    decays = [ema.decay_at(u) for u in range(1, 2000)]
    assert decays == sorted(decays) and decays[-1] == pytest.approx(0.999, abs=1e-6)
    assert (decays[0] == 0.999) is (warmup == 0)


def test_saved_and_loaded_the_average_goes_on_to_the_bit():
    config = small_config()
    config.ema = EmaConfig(decay=0.95, warmup_steps=7)
    whole = make_state(config, small_detector(config), STEM)
    learn(whole, 6)
    half = make_state(config, small_detector(config), STEM)
    learn(half, 3)
    state = half.ema.state_dict()
    again = Ema(half.detector, decay=0.95, warmup_steps=7)
    again.load_state_dict(state)
    half.ema = again
    learn(half, 3, first=3)
    assert not bits_differ(whole.ema.tensors, half.ema.tensors) and whole.ema.updates == half.ema.updates


def test_a_loaded_average_goes_where_its_weights_are():
    """`meta` stands for a GPU: checkpoints are read onto the CPU."""
    config = small_config()
    saved = make_state(config, small_detector(config), []).ema.state_dict()
    detector = small_detector(config).freeze([])
    ema = Ema(detector, decay=0.9)
    detector.to("meta")
    ema.load_state_dict(saved)
    assert {t.device.type for t in view(detector, saved["tensors"]).state_dict().values()} == {"meta"}
    assert {t.device.type for t in ema.tensors.values()} == {"meta"} and set(ema.tensors) == set(saved["tensors"])
    ema.update()


def test_ema_follows_replaced_tensors_and_refuses_misfits():
    module = nn.BatchNorm2d(3)
    ema = Ema(module, decay=0.5)
    module.double()  # replaces every buffer
    with torch.no_grad():
        module.running_mean.fill_(4.0), module.weight.fill_(3.0)
    ema.update()
    assert ema.tensors["running_mean"].eq(2).all() and ema.tensors["weight"].eq(2).all()
    for tensors in ({"scale": torch.ones(3)}, {"weight": torch.ones(2)}):
        with pytest.raises(UserError, match="does not fit the module"):
            ema.load_state_dict({"updates": 1, "tensors": tensors})


@pytest.mark.parametrize(
    "arguments", [{"decay": 1.0}, {"decay": -0.1}, {"decay": math.nan}, {"decay": 0.9, "warmup_steps": -1}]
)
def test_a_decay_or_warmup_that_cannot_work_is_refused(arguments):
    with pytest.raises(UserError, match=r"ema\.(decay|warmup_steps): \S+ is not valid; valid is"):
        Ema(nn.Linear(1, 1), **arguments)
