"""The contract of every head in `HEADS`: a new one is tested by being listed there."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from head_cases import CLASSES, make_batch, make_features, make_head, make_spec
from torch.utils._pytree import tree_leaves

import detbb.distributed.collectives
from detbb.core.cli import Parser
from detbb.core.errors import UserError
from detbb.heads import HEADS, Head, HeadConfig, find_head
from detbb.heads.loading import config_from_dict
from detbb.structures.batch import Batch

pytestmark = pytest.mark.filterwarnings("error")
each_head = pytest.mark.parametrize("head_type", HEADS.values(), ids=HEADS)


def features_for(head_type, **arguments):
    return make_features(head_type.levels(head_type.Config(type="x", data="d")), **arguments)


def losses_of(head, features, batch):
    """As in a training step."""
    batch = batch.to(torch.device("cpu"))
    return head.loss(head(features, batch.sizes), batch)


@each_head
def test_losses_are_finite_scalars(head_type):
    head = make_head(head_type)
    losses = losses_of(head, features_for(head_type), make_batch())
    assert losses and all(name.startswith("loss_") for name in losses)
    assert all(loss.shape == () and torch.isfinite(loss) and loss > 0 for loss in losses.values())


@each_head
def test_loss_without_objects_is_finite_and_uses_all_parameters(head_type):
    head = make_head(head_type)
    losses = losses_of(head, features_for(head_type), make_batch(objects=0))
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@each_head
def test_batch_with_one_empty_image_is_finite(head_type):
    head, batch = make_head(head_type), make_batch()
    batch.targets[0] = make_batch(objects=0).targets[0]
    losses = losses_of(head, features_for(head_type), batch)
    assert all(torch.isfinite(loss) for loss in losses.values())


@each_head
def test_gradients_reach_exactly_what_is_trained(head_type):
    head, features = make_head(head_type), features_for(head_type)
    for name in head.class_tensors()[:1]:
        head.get_parameter(name).requires_grad_(False)
    sum(losses_of(head, features, make_batch()).values()).backward()
    trained = {n for n, p in head.named_parameters() if p.requires_grad}
    assert {n for n, p in head.named_parameters() if p.grad is not None} == trained
    assert all(f.grad is None for f in features.values())

    features = {level: f.requires_grad_() for level, f in features.items()}
    sum(losses_of(head, features, make_batch()).values()).backward()
    assert all(f.grad.abs().sum() > 0 for f in features.values())


@each_head
def test_predictions_lie_inside_each_image_and_are_sorted(head_type):
    head, batch = make_head(head_type).eval(), make_batch()
    with torch.no_grad():
        predictions = head.decode(head(features_for(head_type), batch.sizes), batch.sizes)
    assert len(predictions) == 2
    for prediction, size in zip(predictions, batch.sizes, strict=True):
        height, width = size.hw
        if prediction.boxes is not None:
            limit = torch.tensor([width, height, width, height])
            assert len(prediction.boxes) > 5
            assert (prediction.boxes >= 0).all() and (prediction.boxes <= limit).all()
            assert (prediction.boxes[:, :2] <= prediction.boxes[:, 2:]).all()
            assert ((prediction.scores >= 0) & (prediction.scores <= 1)).all()
            assert (prediction.scores.diff() <= 0).all()
            assert prediction.labels.dtype == torch.int64
            assert ((prediction.labels >= 0) & (prediction.labels < len(CLASSES))).all()
        if prediction.masks is not None:
            assert ((prediction.masks >= 0) & (prediction.masks <= 1)).all()
        if prediction.keypoints is not None:
            xy = prediction.keypoints[..., :2]
            assert (xy >= 0).all() and (xy <= torch.tensor([width, height])).all()
        if prediction.semantic is not None:
            assert prediction.semantic.shape == (len(CLASSES), height, width)
        if prediction.probabilities is not None:
            assert prediction.probabilities.shape == (len(CLASSES),)
            assert ((prediction.probabilities >= 0) & (prediction.probabilities <= 1)).all()
        floats = [x for x in vars(prediction).values() if x is not None and x is not prediction.labels]
        assert floats and all(x.dtype == torch.float32 for x in floats)


@each_head
def test_state_survives_saving_and_loading(head_type, tmp_path):
    head, features, sizes = make_head(head_type).eval(), features_for(head_type), make_batch().sizes
    torch.save(head.state_dict(), tmp_path / "head.pt")
    fresh = make_head(head_type).eval()
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    fresh.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    with torch.no_grad():
        pairs = zip(head.decode(head(features, sizes), sizes), fresh.decode(fresh(features, sizes), sizes), strict=True)
    for one, other in pairs:
        assert all(
            a is b is None or torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
        )


@each_head
def test_a_batch_gives_the_same_as_its_images_one_by_one(head_type):
    head, features = make_head(head_type).eval(), features_for(head_type)
    batch = make_batch(((96, 128), (96, 128)))
    with torch.no_grad():
        together = head.decode(head(features, batch.sizes), batch.sizes)
        alone = [
            head.decode(head({k: f[i : i + 1] for k, f in features.items()}, [size]), [size])[0]
            for i, size in enumerate(batch.sizes)
        ]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(vars(one), vars(other), atol=1e-4, rtol=1e-4)


@each_head
def test_two_ranks_together_have_the_loss_of_the_whole_batch(head_type, monkeypatch):
    head = make_head(head_type).double()
    features = {level: f.double() for level, f in features_for(head_type).items()}
    batch = make_batch()
    batch.targets[0] = replace(
        batch.targets[0],
        boxes=batch.targets[0].boxes[:1],
        labels=batch.targets[0].labels[:1],
        masks=batch.targets[0].masks[:1],
        keypoints=batch.targets[0].keypoints[:1],
    )

    def loss(rows):
        part = Batch(batch.images[rows], batch.targets[rows], batch.source)
        return losses_of(head, {level: f[rows] for level, f in features.items()}, part)

    whole = loss(slice(0, 2))
    counts: list[list[torch.Tensor]] = [[], []]
    monkeypatch.setattr(detbb.distributed.collectives, "is_distributed", lambda: True)
    monkeypatch.setattr(detbb.distributed.collectives, "world_size", lambda: 2)
    for rank in (0, 1):  # first hear what each rank counts, in order …
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, rank=rank: counts[rank].append(x.clone()))
        loss(slice(rank, rank + 1))
    assert counts[0] and len(counts[0]) == len(counts[1])
    parts = []
    for rank in (0, 1):  # … then answer with the sum
        others = iter(counts[1 - rank])
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, others=others: x.add_(next(others)))
        parts.append(loss(slice(rank, rank + 1)))
    for name, value in whole.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value, rtol=1e-6, atol=1e-9)


@each_head
def test_losses_are_fp32_under_autocast_and_fp64_in_double(head_type):
    head, features, batch = make_head(head_type), features_for(head_type), make_batch()
    exact = sum(losses_of(head, features, batch).values())
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(head, features, batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.testing.assert_close(sum(losses.values()), exact, rtol=0.1, atol=0.1)
    head.double()
    losses = losses_of(head, {level: f.double() for level, f in features.items()}, batch)
    assert all(loss.dtype == torch.float64 for loss in losses.values())
    torch.testing.assert_close(sum(losses.values()).float(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@each_head
def test_learns_two_images_in_seconds(head_type):
    head, features, batch = make_head(head_type), features_for(head_type), make_batch()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = sum(losses_of(head, features, batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@each_head
def test_class_tensors_are_those_that_depend_on_the_class_count(head_type):
    few, many = (
        {n: t.shape for n, t in make_head(head_type, make_spec(names)).state_dict().items()}
        for names in (CLASSES, (*CLASSES, "moon", "sun"))
    )
    named = make_head(head_type).class_tensors()
    assert set(named) <= set(few) == set(many)
    assert {n for n in few if few[n] != many[n]} <= set(named)


@each_head
def test_unknown_levels_are_refused_by_name(head_type):
    with pytest.raises(UserError, match=r"heads\.objects\.levels: .*'p9'.*valid are.*p3"):
        make_head(head_type, levels=["p9"])


@each_head
def test_every_config_key_is_documented_where_it_is_declared(head_type):
    assert all(field.description for field in head_type.Config.model_fields.values())
    assert issubclass(head_type.Config, HeadConfig) and head_type.Config.__doc__ and head_type.__doc__


@each_head
def test_says_what_data_it_needs_and_its_main_metric(head_type):
    assert head_type.needs in {"boxes", "masks", "keypoints", "semantic", "labels"}
    assert "/" in make_head(head_type).main_metric


@each_head
def test_output_is_on_one_device_and_of_the_batch(head_type):
    output = make_head(head_type)(features_for(head_type), make_batch().sizes)
    tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
    assert all(t.device.type == "cpu" for t in tensors)


def test_a_head_from_outside_is_found_by_module_and_class(monkeypatch):
    outside = types.ModuleType("outside_heads")
    outside.Mine = type("Mine", (Head,), {})
    outside.Other = int
    monkeypatch.setitem(sys.modules, "outside_heads", outside)
    assert find_head("outside_heads:Mine") is outside.Mine
    assert find_head("fcos") is HEADS["fcos"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fcoss", "'fcoss'.*retinanet.*did you mean 'fcos'"),
        ("no_such_package.heads:Mine", "cannot import 'no_such_package.heads'.*PYTHONPATH"),
        ("detbb.heads:Missing", "'Missing'.*no subclass of detbb.Head"),
        ("detbb.heads:find_head", "'find_head'.*no subclass"),
        (":Mine", "cannot import ''"),
        (".heads:Mine", "cannot import '.heads'.*TypeError"),
        ("broken_heads:Mine", "cannot import 'broken_heads'.*SyntaxError"),
    ],
)
def test_a_wrong_head_type_is_refused_in_one_line(tmp_path, monkeypatch, name, said):
    (tmp_path / "broken_heads.py").write_text("class")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        find_head(name)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_does_not_choose_what_is_imported(tmp_path, monkeypatch):
    code = "import pathlib; from detbb.heads.fcos import FcosHead as Mine; pathlib.Path(__file__ + '.ran').touch()"
    (tmp_path / "own_heads.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    values = {
        "data": {"made": {"format": "shapes", "train": {"images": "made"}}},
        "heads": {"objects": {"type": "own_heads:Mine", "data": "made"}},
        "backbone": {"norm": "bn"},
        "train": {"steps": 1},
    }
    with pytest.raises(UserError, match=r"heads\.objects\.type .*'own_heads' is not imported.*--import own_heads"):
        config_from_dict(values, "a checkpoint")
    assert not (tmp_path / "own_heads.py.ran").exists()
    parser = Parser("", "")
    parser.add_import()
    with pytest.raises(UserError, match="--import: cannot import 'own_head' "):
        parser.parse_args(["--import", "own_head"])
    assert not vars(parser.parse_args(["--import", "own_heads"]))
    assert config_from_dict(values, "a checkpoint").heads["objects"].type == "own_heads:Mine"
