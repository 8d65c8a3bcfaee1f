"""The frozen prefix: found by itself, the same results, nothing of the detector changed, and never outside training."""

from __future__ import annotations

import copy
import functools
import importlib

import pytest
import torch
from learning import bits_differ, copy_state, learn, made_batch, make_state, small_config, small_detector
from runs import tiny_config
from torch import nn
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from detbb.config.schema import TrainConfig
from detbb.detector import view
from detbb.feature_cache.frozen_prefix import FrozenPrefix, folded, last_frozen
from detbb.modeling.norm import SyncBatchNorm
from detbb.structures.batch import PrecomputedFeatures

pytestmark = pytest.mark.usefixtures("unsynced")

training = importlib.import_module("detbb.training.loop")
STEM = ["backbone.stem", "backbone.layer1"]
ALL = ["backbone", "neck"]


def detector_with(frozen, *, arch="resnet18", norm="bn", **config):
    made = small_config(arch)
    made.backbone.norm = norm
    for key, value in config.items():
        setattr(made.backbone, key, value)
    return small_detector(made).freeze(frozen).train()


def losses_and_gradients(detector, batch):
    detector.zero_grad(set_to_none=True)
    losses = detector(batch)
    sum(losses.values()).backward()
    gradients = {n: p.grad.clone() for n, p in detector.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in losses.items()}, gradients


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize(
    ("frozen", "last"),
    [
        ([], None),
        (["neck"], None),
        (["backbone.conv1"], None),  # bn1 is trained
        (["backbone.stem"], "stem"),
        (["backbone.conv1", "backbone.bn1"], "stem"),
        (STEM, "layer1"),
        ([*STEM, "backbone.layer3"], "layer1"),  # layer2 lies between
        ([*STEM, "backbone.layer2.0"], "layer1"),
        (["backbone"], "layer4"),
        (["backbone", "neck.inner"], "layer4"),
        (ALL, "neck"),
    ],
)
def test_the_prefix_ends_before_the_first_trained_part(frozen, last):
    assert last_frozen(detector_with(frozen)) == last


def test_statistics_that_move_end_the_prefix():
    """Constant weights alone are not enough: BN in train mode is another function, and its statistics must move."""
    detector = detector_with([])
    for part in (*detector.backbone.stage_modules("stem"), detector.backbone.layer1):
        part.requires_grad_(False)
    assert last_frozen(detector) is None
    assert last_frozen(detector, STEM) == "layer1" == last_frozen(detector.freeze(STEM))


NORMS = ["bn", "frozen_bn", "sync_bn", "gn"]


@pytest.mark.parametrize(
    ("arch", "norm", "frozen"),
    [
        *(("resnet18", norm, ALL) for norm in NORMS),
        ("resnet50", "frozen_bn", STEM),
        ("resnext50_32x4d", "bn", ["backbone"]),
    ],
)
def test_folded_losses_and_gradients_agree_no_tensor_changes(arch, norm, frozen):
    detector = detector_with(frozen, arch=arch, norm=norm)
    before = copy_state(detector)
    plain, plain_gradients = losses_and_gradients(detector, made_batch(0))
    prefix = FrozenPrefix(detector, TrainConfig())
    batch = prefix(made_batch(0))
    assert not any(level.requires_grad for level in batch.precomputed.levels.values())
    fast, gradients = losses_and_gradients(detector, batch)
    assert gradients.keys() == plain_gradients.keys()
    assert max(relative(fast[n], plain[n]) for n in plain) < 1e-5
    assert max(relative(gradients[n], plain_gradients[n]) for n in gradients) < 1e-4
    assert bits_differ(before, detector.state_dict()) == set()


def test_fold_frozen_off_gives_the_very_bits():
    for frozen in (STEM, ["backbone"], ALL):
        detector = detector_with(frozen)
        plain = losses_and_gradients(detector, made_batch(0))
        batch = FrozenPrefix(detector, TrainConfig(fold_frozen="off"))(made_batch(0))
        for expected, got in zip(plain, losses_and_gradients(detector, batch), strict=True):
            assert bits_differ(expected, got) == set()


def test_copies_exist_while_needed_and_return_with_same_bits():
    detector, batch = detector_with(ALL), made_batch(0)
    prefix = FrozenPrefix(detector, TrainConfig())
    assert not prefix._stages
    first = prefix(batch).precomputed.levels
    assert prefix._stages and prefix._neck is not None
    prefix.release()
    assert not prefix._stages and prefix._neck is None
    assert bits_differ(first, prefix(batch).precomputed.levels) == set()


def conv_norm(norm, *, bias=False, **conv):
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=bias, **conv), norm)


def statistics(norm):
    """Values far from 0 and 1, variances near eps too."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(norm, name, None) is not None:
            tensor = getattr(norm, name).data
            tensor.copy_(torch.rand(tensor.shape) * 2e-3 if name == "running_var" else torch.randn(tensor.shape))
    return norm


FOLDABLE = {
    "eps 1e-3": lambda: nn.BatchNorm2d(16, eps=1e-3),
    "no affine": lambda: nn.BatchNorm2d(16, affine=False),
    "torchvision's frozen": lambda: TorchvisionFrozenBatchNorm2d(16),
    "sync": lambda: SyncBatchNorm(16),
}


@pytest.mark.parametrize("kind", FOLDABLE)
@pytest.mark.parametrize("conv", [{"bias": True}, {"groups": 4}, {"stride": 2}, {"dilation": 2}])
def test_every_norm_with_statistics_is_folded(kind, conv):
    torch.manual_seed(0)
    part = conv_norm(statistics(FOLDABLE[kind]()), **conv).eval()
    fast = folded(part, torch.float32)
    assert isinstance(fast[1], nn.Identity) and not isinstance(part[1], nn.Identity)
    assert folded(copy.deepcopy(part).double(), torch.float64)[0].weight.dtype == torch.float64
    with torch.no_grad():
        x = torch.randn(2, 8, 12, 10).contiguous(memory_format=torch.channels_last)
        assert relative(fast(x), part(x)) < 1e-5


class NormFirst(nn.Module):
    """Defines the convolution first and runs the norm first."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3), statistics(nn.BatchNorm2d(8))

    def forward(self, x):
        return self.conv(torch.relu(self.norm(x)))


class DoublingConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class NormOfRelu(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(torch.relu(x))


class Reversed(nn.Sequential):
    def forward(self, x):
        return self[0](self[1](x))


UNKNOWN = {
    "norm before convolution": NormFirst,
    "convolution of one's own": lambda: nn.Sequential(DoublingConv(8, 8, 3), statistics(nn.BatchNorm2d(8))),
    "norm of one's own": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), statistics(NormOfRelu(8))),
    "sequence of one's own": lambda: Reversed(nn.Conv2d(8, 8, 3), statistics(nn.BatchNorm2d(8))),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_may_run_in_another_order_is_not_folded(kind):
    torch.manual_seed(0)
    part = UNKNOWN[kind]().eval()
    with torch.no_grad():
        x = torch.randn(2, 8, 12, 10)
        assert relative(folded(part, torch.float32)(x), part(x)) < 1e-6


def test_a_norm_without_statistics_stays():
    for norm in (nn.BatchNorm2d(16, track_running_stats=False), nn.GroupNorm(4, 16)):
        part = conv_norm(norm).eval()
        x = torch.randn(2, 8, 6, 6)
        with torch.no_grad():
            assert type(folded(part, torch.float32)[1]) is type(norm)
            assert relative(folded(part, torch.float32)(x), part(x)) < 1e-6


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"), [("bf16", torch.bfloat16, 0.05), ("fp64", torch.float64, 1e-10)]
)
def test_other_precisions_compute_in_theirs(precision, dtype, tolerance):
    detector = detector_with(ALL)
    if precision == "fp64":
        detector.double()
    config = TrainConfig(precision=precision)
    batch = made_batch(0)
    fast = FrozenPrefix(detector, config)(batch).precomputed.levels
    config.fold_frozen = "off"
    plain = FrozenPrefix(detector, config)(batch).precomputed.levels
    for name in ("p3", "p4", "p5"):
        assert fast[name].dtype == plain[name].dtype == dtype
        assert relative(fast[name], plain[name]) < tolerance


def test_nothing_of_it_is_in_the_detector_or_its_predictions():
    detector = detector_with(ALL)
    batch = made_batch(0)
    keys, modules = list(detector.state_dict()), len(list(detector.modules()))
    before = view(detector).predict(batch.images, batch.sizes)["objects"]
    state = make_state(small_config(), detector, ALL)
    state.prefix = FrozenPrefix(detector, state.config)
    learn(state, 1, lr=0.0)
    assert list(detector.state_dict()) == keys and len(list(detector.modules())) == modules
    for seen in (detector, view(detector)):
        for a, b in zip(before, seen.predict(batch.images, batch.sizes)["objects"], strict=True):
            assert torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores)


@pytest.mark.parametrize("frozen", [STEM, ALL])
def test_frozen_is_bit_exact_with_the_prefix_and_the_rest_moves(frozen):
    detector = detector_with(frozen)
    state = make_state(small_config(), detector, frozen)
    state.prefix = FrozenPrefix(detector, state.config)
    before = copy_state(detector)
    learn(state, 5)
    moved = bits_differ(before, detector.state_dict())
    assert moved and {n for n, p in detector.named_parameters() if p.requires_grad} <= moved
    prefixes = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.") if frozen is STEM else ("backbone.", "neck.")
    assert not [name for name in moved if name.startswith(prefixes)]


def test_a_run_makes_it_anew_at_each_phase(monkeypatch, tmp_path):
    made = []

    class Spy(FrozenPrefix):
        def __call__(self, batch):
            made.append(self.after)
            return super().__call__(batch)

    monkeypatch.setattr(training, "FrozenPrefix", Spy)
    phases = "phases=[{steps: 2, freeze: [backbone, neck]}, {steps: 2, freeze: [backbone.stem]}, {freeze: [neck]}]"
    training.train(tiny_config(tmp_path, phases, "train.steps=6", "data.shapes.train.size=8", "eval.batch_size=2"))
    assert made == ["neck", "neck", "stem", "stem"]


def test_compile_falls_back_with_one_line(monkeypatch):
    def broken(function, **options):
        def fail(*args):
            raise RuntimeError("no compiler\nat all")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    detector, said = detector_with(ALL), []
    prefix = FrozenPrefix(detector, TrainConfig(compile=True), log=said.append)
    expected = FrozenPrefix(detector, TrainConfig())(made_batch(0)).precomputed.levels
    for _ in range(2):
        got = prefix(made_batch(0)).precomputed.levels
        assert max(relative(got[n], expected[n]) for n in expected) < 1e-5
    assert said == ["WARNING: train.compile: the frozen prefix runs uncompiled: RuntimeError: no compiler at all"]


def test_many_shapes_and_phases_stay_compiled(monkeypatch, tmp_path):
    """PyTorch compiles a function anew eight times by default, over all phases, and then raises."""
    compile_, said, graphs = torch.compile, [], []
    eager = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=eager))
    torch._dynamo.reset()
    run = training.compiled(lambda x, kind: x + len(kind), "this", said.append)
    for number in range(1, 21):
        assert run(torch.zeros(1), "a" * number) == number
    assert len(graphs) == 20 and said == []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: said.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    phases = "phases=[{steps: 1, freeze: [backbone]}, {freeze: [neck]}]"
    options = ("train.steps=2", "schedule.warmup_steps=0", "data.shapes.val=null", "train.compile=true")
    training.train(tiny_config(tmp_path, phases, *options))
    assert said == ["reset", "reset"]


def test_prefix_and_trained_part_are_one_graph_each(monkeypatch):
    """So that torch.compile gets all of it, and nothing has run when it fails."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    said: list[str] = []
    detector = detector_with(STEM)
    plain, _ = losses_and_gradients(copy.deepcopy(detector), made_batch(0))
    batch = FrozenPrefix(detector, TrainConfig(compile=True), log=said.append)(made_batch(0))
    detector.compiled = training.compiled(detector.forward_from, "what is trained", said.append)
    losses, gradients = losses_and_gradients(detector, batch)
    assert said == [] and len(gradients) == sum(p.requires_grad for p in detector.parameters())
    assert max(relative(losses[n], plain[n]) for n in plain) < 1e-5
    predicted = detector.eval().forward_from(
        PrecomputedFeatures("", {"": detector.normalize(batch.images, batch.sizes)})
    )
    assert set(predicted) >= {"p3", "p4", "p5"}
