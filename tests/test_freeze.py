"""What is frozen keeps every bit, what is not moves, and each classic mistake is caught."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from learning import bits_differ, copy_state, learn, made_batch, make_state, small_config, small_detector
from processes import run_ranks
from runs import shrink
from torch import nn

from detbb.config.schema import EmaConfig
from detbb.core.errors import UserError
from detbb.detector import view
from detbb.freeze import Freezable, changed, digests, explain, frozen_names
from detbb.modeling.norm import norm_modules
from detbb.training import optim

pytestmark = pytest.mark.usefixtures("unsynced", "thin_resnets")

STEM = ["backbone.stem", "backbone.layer1"]
ALL_SHARED = ["backbone", "neck"]


def expected_frozen(detector, names):
    """Independent of frozen_names: by prefix of the state-dict key."""
    prefixes = []
    for name in names:
        prefixes += ["backbone.conv1.", "backbone.bn1."] if name == "backbone.stem" else [name + "."]
    return {key for key in detector.state_dict() if key.startswith(tuple(prefixes))}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_stem_and_layer1_are_exactly_their_tensors(arch):
    detector = small_detector(small_config(arch)).freeze(STEM)
    frozen = {n for n, p in detector.named_parameters() if not p.requires_grad}
    assert frozen == expected_frozen(detector, STEM) & set(dict(detector.named_parameters()))
    assert set(frozen_names(detector)) == expected_frozen(detector, STEM)


CASES = [
    # arch, frozen, optimizer, precision, ema decay, accumulate, clip, evaluation
    ("resnet18", STEM, "sgd", "fp32", 0.9999, 1, None, False),
    ("resnet18", ALL_SHARED, "sgd", "fp32", 0.9, 2, 1.0, True),
    ("resnet18", ALL_SHARED, "adamw", "fp32", 0.9999, 1, None, True),
    ("resnet18", STEM, "adamw", "fp32", 0.9, 2, None, True),
]
MORE_CASES = [
    ("resnet18", STEM, "adamw", "bf16", 0.9, 1, 1.0, True),
    ("resnet18", ALL_SHARED, "sgd", "bf16", 0.9999, 1, 1.0, False),
    ("resnet50", STEM, "adamw", "fp32", 0.9999, 1, 1.0, False),
    ("resnet50", ALL_SHARED, "sgd", "fp32", 0.9, 1, None, False),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES]


@pytest.mark.parametrize(("arch", "frozen", "kind", "precision", "decay", "accumulate", "clip", "evaluate"), CASES)
def test_frozen_is_bit_exact_after_50_steps_and_the_rest_moved(
    arch, frozen, kind, precision, decay, accumulate, clip, evaluate
):
    config = small_config(arch)
    config.optimizer.type, config.optimizer.weight_decay, config.optimizer.norm_weight_decay = kind, 0.1, 0.1
    config.train.precision, config.train.accumulate, config.train.grad_clip = precision, accumulate, clip
    config.ema = EmaConfig(decay=decay, warmup_steps=0)
    detector = small_detector(config)
    before = copy_state(detector)
    state = make_state(config, detector, frozen)
    for step in range(0, 50, 2):
        learn(state, 2, first=step, lr=1e-3)
        if evaluate:
            batch = made_batch(0)
            view(detector, state.ema.tensors).predict(batch.images, batch.sizes)
            view(detector).predict(batch.images, batch.sizes)
    after = copy_state(detector)
    assert bits_differ(before, after) == set(before) - expected_frozen(detector, frozen)
    assert not set(state.ema.tensors) & expected_frozen(detector, frozen)
    optimized = {name for group in state.optimizer.param_groups for name in group["names"]}
    assert optimized == {n for n, p in detector.named_parameters()} - expected_frozen(detector, frozen)
    assert set(optim.state_by_name(state.optimizer)) <= optimized


def _two_ranks():
    shrink()
    moved, finals = {}, {}
    for frozen in (STEM, ALL_SHARED):
        config = small_config()
        config.optimizer.weight_decay = 0.1
        config.ema = EmaConfig(decay=0.9, warmup_steps=0)
        detector = small_detector(config)
        before = copy_state(detector)
        state = make_state(config, detector, frozen)
        learn(state, 50, lr=1e-3)
        moved[str(frozen)] = bits_differ(before, copy_state(detector))
        finals[str(frozen)] = digests(detector.state_dict())
    return moved, finals


@pytest.mark.slow
def test_two_processes_keep_frozen_bits_and_stay_equal():
    (changed0, final0), (changed1, final1) = run_ranks(_two_ranks, 2)
    detector = small_detector(small_config())
    for frozen in (STEM, ALL_SHARED):
        assert changed0[str(frozen)] == set(detector.state_dict()) - expected_frozen(detector, frozen)
        assert changed1 == changed0
    assert final0 == final1


def test_train_output_of_a_frozen_stage_is_its_eval_output():
    detector = small_detector(small_config()).freeze(ALL_SHARED)
    batch = made_batch(0)
    trained = detector.train().features(batch.images, batch.sizes)
    evaluated = detector.eval().features(batch.images, batch.sizes)
    assert all(torch.equal(trained[level], evaluated[level]) for level in evaluated)


def test_evaluation_changes_nothing_of_the_run():
    finals = []
    for evaluate in (False, True):
        config = small_config()
        config.ema = EmaConfig(decay=0.9, warmup_steps=0)
        state = make_state(config, small_detector(config), STEM)
        torch.manual_seed(3)
        for step in range(6):
            learn(state, 1, first=step)
            if evaluate:
                random = torch.get_rng_state()
                batch = made_batch(99)
                view(state.detector, state.ema.tensors).predict(batch.images, batch.sizes)
                assert torch.equal(random, torch.get_rng_state())
                assert state.detector.training and not state.detector.backbone.bn1.training
        finals.append((copy_state(state.detector), state.ema.tensors))
    assert not bits_differ(finals[0][0], finals[1][0])
    assert not bits_differ(finals[0][1], finals[1][1])


def test_nothing_is_replaced_and_freezing_is_reversible():
    detector = small_detector(small_config())
    modules = {n: id(m) for n, m in detector.named_modules()}
    tensors = {n: id(p) for n, p in detector.named_parameters()}
    keys = list(detector.state_dict())
    detector.train().freeze(ALL_SHARED)
    assert modules == {n: id(m) for n, m in detector.named_modules()}
    assert tensors == {n: id(p) for n, p in detector.named_parameters()} and keys == list(detector.state_dict())
    for again in (detector, copy.deepcopy(detector)):
        assert not again.backbone.training and again.train().backbone.layer2[0].bn1.training is False
    detector.freeze([])
    assert all(p.requires_grad for p in detector.parameters()) and all(m.training for m in detector.modules())


class Odd(nn.Module):
    """A bare parameter, an instance norm with statistics, group norm, dropout, and a constant of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.3]))
        self.fixed = nn.Parameter(torch.tensor([0.7]), requires_grad=False)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.group = nn.GroupNorm(2, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.group(self.instance(x))) * self.scale * self.fixed


def test_parameters_instance_norm_dropout_and_constants_freeze():
    detector = small_detector(small_config())
    detector.heads["objects"].odd = Odd()
    odd = detector.heads["objects"].odd
    detector.freeze(["heads.objects.odd"]).train()
    state = copy_state(detector)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(odd(x), odd(x))
    assert not bits_differ(state, copy_state(detector))
    assert not any(p.requires_grad for p in odd.parameters())
    assert "heads.objects.odd.instance.running_mean" in frozen_names(detector)
    detector.freeze([])
    assert odd.scale.requires_grad and not odd.fixed.requires_grad
    odd(x)
    assert "heads.objects.odd.instance.running_mean" in bits_differ(state, copy_state(detector))


def test_what_a_user_switched_off_stays_off_until_switched_on():
    config = small_config()
    detector = small_detector(config)
    name = "backbone.layer4.0.conv1.weight"
    weight = detector.get_parameter(name)
    weight.requires_grad_(False)
    for other in (detector, copy.deepcopy(detector), view(detector)):
        other.freeze(["backbone.layer4"]).freeze([])  # freezing what holds it does not make it freeze's own
        assert frozen_names(other) == list(digests(other)) == [name] == frozen_names(other, [])
    state = make_state(config, detector, [])
    before = copy_state(detector)
    learn(state, 2)
    assert bits_differ(before, copy_state(detector)) == set(before) - {name} and name not in state.ema.tensors
    weight.requires_grad_(True)
    assert frozen_names(detector.freeze(["neck"]).freeze([])) == []


def test_active_heads_are_asked_without_freezing():
    detector = small_detector(small_config()).freeze(STEM)
    before = [p.requires_grad for p in detector.parameters()]
    assert detector.active_heads("made", frozen=ALL_SHARED) == detector.active_heads() == ["objects"]
    assert detector.active_heads(frozen=[*ALL_SHARED, "heads.objects"]) == detector.active_heads("other") == []
    with pytest.raises(UserError, match=r"'backbone.layer5' is not a submodule"):
        detector.active_heads(frozen=["backbone.layer5"])
    assert before == [p.requires_grad for p in detector.parameters()] and detector.frozen == tuple(STEM)


@pytest.mark.parametrize("part", ["backbone", "neck", "heads.objects"])
@pytest.mark.parametrize(("statistics", "affine"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_two_norm_switches_are_independent(part, statistics, affine):
    """norm_eval fixes statistics, norm_affine: false fixes weight and bias; Table 6 of arXiv:1906.07155."""
    config = small_config(norm="bn")
    config.neck.norm = "bn"
    chosen = {"backbone": config.backbone, "neck": config.neck, "heads.objects": config.heads["objects"]}[part]
    chosen.norm_eval, chosen.norm_affine = statistics, affine
    state = make_state(config, small_detector(config), [])
    before = copy_state(state.detector)
    learn(state, 3, lr=0.3, boxes=6)
    moved = bits_differ(before, copy_state(state.detector))
    norms = {n for n, _ in norm_modules(state.detector.get_submodule(part))}
    assert norms
    for name in norms:
        assert (f"{part}.{name}.running_mean" in moved) is not statistics
        assert (f"{part}.{name}.weight" in moved) is affine
    expected = set(before) - set(frozen_names(state.detector))
    assert any(f"{part}.{name}.weight" in moved for name in norms) is affine
    assert moved <= expected  # random norms elsewhere may meet gradients below half a last place


def test_an_unknown_name_lists_the_valid_ones():
    detector = small_detector(small_config())
    with pytest.raises(
        UserError, match=r"'backbone.layer5' is not a submodule; valid are backbone, backbone.stem.*layer"
    ):
        detector.freeze(["backbone.layer5"])


def test_a_switch_that_changes_nothing_equals_no_switch():
    finals = []
    for switches in (False, True):
        config = small_config()
        config.optimizer.type = "adamw"
        config.ema = EmaConfig(decay=0.9, warmup_steps=5)
        state = make_state(config, small_detector(config), STEM)
        learn(state, 4)
        if switches:
            state.freeze(STEM, config.optimizer)
        learn(state, 4, first=4)
        finals.append((copy_state(state.detector), state.ema.tensors, state.ema.updates))
    assert not bits_differ(finals[0][0], finals[1][0])
    assert not bits_differ(finals[0][1], finals[1][1]) and finals[0][2] == finals[1][2]


def test_momentum_is_kept_by_name_through_a_real_switch():
    config = small_config()
    state = make_state(config, small_detector(config), ALL_SHARED)
    learn(state, 3)
    kept = {n: s["momentum_buffer"].clone() for n, s in optim.state_by_name(state.optimizer).items()}
    state.freeze(STEM, config.optimizer)
    now = optim.state_by_name(state.optimizer)
    assert kept and all(torch.equal(now[n]["momentum_buffer"], kept[n]) for n in kept)
    newly = set(now) - set(kept)
    assert "backbone.layer2.0.conv1.weight" in newly and not any(now[n]["momentum_buffer"].any() for n in newly)


# The mutants: each is what another trainer does, and the check that guards against it must see it.


def changed_after(plant, *, frozen=ALL_SHARED, steps=3):
    config = small_config()
    config.optimizer.weight_decay = 0.1
    state = make_state(config, small_detector(config), [])
    learn(state, 2)  # momentum and gradients are there when freezing comes
    state.freeze(frozen, config.optimizer)
    known = digests(state.detector, expected_frozen(state.detector, frozen))
    plant(state, config)
    learn(state, steps, first=2)
    return state.detector, changed(state.detector, known)


def test_without_a_mutant_nothing_changes():
    assert changed_after(lambda state, config: None)[1] == []


def test_mutant_bn_train_is_caught_and_named():
    detector, names = changed_after(lambda state, _: state.detector.backbone.layer2[0].bn1.train())
    assert {n.rpartition(".")[0] for n in names} == {"backbone.layer2.0.bn1"}
    assert "backbone.layer2.0.bn1 is in train mode" in explain(detector, names)


def test_mutant_eval_once_at_the_start_is_caught(monkeypatch):
    def plant(state, _):
        monkeypatch.setattr(sys.modules[Freezable.__module__], "set_frozen_eval", lambda detector: None)
        state.detector.backbone.eval()
        state.detector.train()  # as every loop does after an evaluation

    names = changed_after(plant)[1]
    assert names and all(n.endswith(("running_mean", "running_var", "num_batches_tracked")) for n in names)


def test_mutant_decay_on_all_parameters_is_caught():
    def plant(state, config):
        everything = list(state.detector.parameters())
        for parameter in everything:
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.AdamW(everything, lr=1e-3, weight_decay=0.1).step()

    assert len(changed_after(plant)[1]) > 20


def test_mutant_zeroed_gradients_are_caught():
    """A gradient of zero instead of None: momentum and decay still move what was frozen."""

    def plant(state, config):
        optimizer = torch.optim.SGD(state.detector.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        for parameter in state.detector.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()

    assert len(changed_after(plant)[1]) > 20


def test_a_gradient_from_before_the_freeze_is_dropped():
    detector = small_detector(small_config())
    for parameter in detector.parameters():
        parameter.grad = torch.ones_like(parameter)
    detector.freeze(ALL_SHARED)
    assert all((p.grad is None) is (not p.requires_grad) for p in detector.parameters())


def _unfreeze(rewrap):
    config = small_config()
    state = make_state(config, small_detector(config), STEM)
    learn(state, 2)
    model = state.model
    state.freeze([], config.optimizer)
    if not rewrap:
        state.model = model
    learn(state, 2, first=2)
    return digests(state.detector.state_dict())


def _unfreeze_both_ways():
    shrink()
    return _unfreeze(True), _unfreeze(False)


@pytest.mark.slow
def test_ranks_stay_equal_after_unfreezing_only_if_rewrapped():
    (good, mutant), (other, other_mutant) = run_ranks(_unfreeze_both_ways, 2)
    assert good == other and mutant != other_mutant
