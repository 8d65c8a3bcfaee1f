"""One optimizer step: forward, backward, one check on all ranks, clip, step, average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detbb.config.schema import OptimizerConfig, TrainConfig
from detbb.core.errors import RunFailed
from detbb.core.files import save_tensors
from detbb.detector import Detector
from detbb.distributed.collectives import all_gather_objects, maximum, mean, rank, world_size
from detbb.distributed.processes import wrap
from detbb.modeling.norm import average_statistics, moving_norms
from detbb.modeling.precision import AUTOCAST
from detbb.structures.batch import Batch
from detbb.training import optim
from detbb.training.ema import Ema

CURES = "try a lower optimizer.lr, a longer schedule.warmup_steps, train.grad_clip, or train.on_nonfinite: skip"


class NonFinite(RunFailed):
    """A loss or gradient was not finite; the message names step, ranks, loss terms, images and the saved batch."""

    same_on_all_ranks = True  # as in errors.UserError


@dataclass
class TrainState:
    """What training changes: the detector, its average and its optimizer. The rest follows from the step."""

    detector: Detector
    ema: Ema | None
    config: TrainConfig
    device: torch.device
    scaler: torch.amp.GradScaler
    optimizer: torch.optim.Optimizer = field(init=False)
    model: nn.Module = field(init=False)  # the detector, in DDP where there are several processes
    prefix: Callable[[Batch], Batch] | None = None  # computes what is frozen; the detector goes on from there
    optimizer_state: dict[str, dict[str, Any]] = field(default_factory=dict)  # by parameter name, for the next `freeze`
    skipped_in_row: int = 0
    _difference: Tensor | None = None  # see `statistics_difference`

    def freeze(self, names: Sequence[str], config: OptimizerConfig) -> None:
        """Freeze exactly these submodules, everywhere; what goes on being trained keeps its momentum and average."""
        if hasattr(self, "optimizer"):
            self.optimizer_state = optim.state_by_name(self.optimizer)
        self.detector.freeze(names).train()
        self.optimizer = optim.build_optimizer(self.detector, config, fused=self.config.precision != "fp16")
        optim.load_state_by_name(self.optimizer, self.optimizer_state)
        self.optimizer_state = {}  # frees the tensors of the phase before
        if self.ema is not None:
            self.ema.follow()
        self.model = wrap(self.detector)

    def statistics_difference(self) -> float:
        """The largest difference between ranks' running statistics since the last call; every rank calls it."""
        seen, self._difference = self._difference, None
        return 0.0 if seen is None else float(maximum(seen))

    def share_statistics(self) -> None:
        """Average moving statistics over ranks, at every step, so that a checkpoint of rank 0 holds them all."""
        difference = average_statistics(self.detector)
        if difference is not None:
            self._difference = difference if self._difference is None else torch.maximum(self._difference, difference)


@dataclass
class StepResult:
    """What one step did. Tensors stay on the device until somebody logs them."""

    losses: dict[str, Tensor]
    grad_norm: Tensor
    images: int  # of this rank
    stop: int  # the signal that a rank received, or 0
    skipped: bool
    bad_images: tuple[str, ...] = ()  # of all ranks: files that were left out


def train_step(
    state: TrainState, batches: list[Batch], *, lr: float, stop: Callable[[], int], folder: Path, step: int
) -> StepResult:
    """Learn from this rank's share of one step, given as `accumulate` batches of one source.

    stop: gives the signal that this process received so far, or 0. folder: where an offending batch is saved.
    Raises: NonFinite: on all ranks together.
    """
    statistics = []
    if state.config.on_nonfinite == "skip" or state.scaler.is_enabled():
        statistics = [(b, b.clone()) for _, norm in moving_norms(state.detector) for b in norm.buffers(recurse=False)]
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
    state.optimizer.zero_grad(set_to_none=True)
    trained = [p for p in state.detector.parameters() if p.requires_grad]
    losses, used = _backward(state, batches, trained)
    bad_images = [path for batch in batches for path in batch.bad_images]
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in trained if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    loss_ok = torch.stack(list(losses.values())).isfinite().all()
    # The one synchronisation of a step tells all ranks whether anything is not finite, whether any rank must stop or
    # left out an image, and which parameters the losses of any rank depend on.
    noted, flags = [stop(), len(bad_images)], torch.stack([~loss_ok, ~norm.isfinite()]).float()
    if world_size() > 1:
        flags = maximum(torch.cat([flags, used.new_tensor(noted), used]))
    bad_loss, bad_gradient, *others = map(int, flags.tolist())
    signal, bad_image, *seen = others or noted
    images = sum(len(b.targets) for b in batches)
    result = StepResult(losses, norm, images, signal, skipped=bool(bad_loss or bad_gradient))
    if bad_image:
        result.bad_images = tuple(path for paths in all_gather_objects(bad_images) for path in paths)
    if world_size() > 1:
        for parameter, anywhere in zip(trained, seen, strict=True):
            if not anywhere:
                parameter.grad = None  # a zero, for DDP alone, would let momentum and decay move it
    if not result.skipped:
        _update(state, gradients, norm)
        return result
    for buffer, before in statistics:
        buffer.copy_(before)
    state.scaler.update()
    # fp16 finds its scale by letting gradients overflow; those that overflow at a scale below 1 are not finite
    if bad_loss or not state.scaler.is_enabled() or state.scaler.get_scale() < 1:
        _refuse(state, batches, losses, folder=folder, step=step)
    return result


def _backward(state: TrainState, batches: list[Batch], trained: list[nn.Parameter]) -> tuple[dict[str, Tensor], Tensor]:
    """The mean losses of the batches, and 1 for each of `trained` they depend on (only on several processes).

    The gradients are left in the parameters.
    """
    means: dict[str, Tensor] = {}
    precision = state.config.precision
    used = torch.zeros(len(trained), device=state.device)
    for index, batch in enumerate(batches):
        batch = batch.to(state.device)
        if state.prefix is not None:
            batch = state.prefix(batch)
        waits = index < len(batches) - 1  # DDP reduces gradients in the last backward pass of a step
        with state.model.no_sync() if waits and isinstance(state.model, DistributedDataParallel) else nullcontext():
            with torch.autocast(state.device.type, AUTOCAST.get(precision), precision in AUTOCAST):
                losses = state.model(batch)
            total = torch.stack([v.to(torch.promote_types(v.dtype, torch.float32)) for v in losses.values()]).sum()
            if world_size() > 1:
                total, is_used = _with_all(total, trained)
                used += used.new_tensor(is_used)
            state.scaler.scale(total / len(batches)).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach() / len(batches)
    return means, used


def _with_all(total: Tensor, trained: list[nn.Parameter]) -> tuple[Tensor, list[bool]]:
    """`total` with a gradient for every trained parameter, and which of them it depended on before.

    DDP waits for every parameter, so those that this rank's losses do not depend on get a gradient of zero.
    (DDP's find_unused_parameters does the same, but warns in every run that leaves nothing unused.)
    """
    ends: set[int] = set()
    todo, seen = [total.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ends.add(id(getattr(node, "variable", None)))
            todo += [after for after, _ in node.next_functions]
    used = [id(parameter) in ends for parameter in trained]
    absent = [p.flatten()[0] for p, is_used in zip(trained, used, strict=True) if not is_used]
    return (total + torch.stack(absent).sum() * 0 if absent else total), used


def _update(state: TrainState, gradients: list[Tensor], norm: Tensor) -> None:
    if state.config.grad_clip is not None:
        torch._foreach_mul_(gradients, (state.config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.skipped_in_row = 0
    state.share_statistics()
    if state.ema is not None:
        state.ema.update()


def _refuse(state: TrainState, batches: list[Batch], losses: dict[str, Tensor], *, folder: Path, step: int) -> None:
    """Save the batch and raise NonFinite, or count a skipped step."""
    state.optimizer.zero_grad(set_to_none=True)
    state.skipped_in_row += 1
    terms = {name: float(value) for name, value in losses.items()}
    images = [t.image_id for b in batches for t in b.targets]
    everyone = all_gather_objects((terms, images))
    if state.config.on_nonfinite == "skip" and state.skipped_in_row <= state.config.max_skipped:
        return
    blamed = [r for r, (t, _) in enumerate(everyone) if not all(map(math.isfinite, t.values()))]
    if not blamed and world_size() > 1:  # DDP has averaged the gradients: each rank computes its own again
        finite = all_gather_objects(_own_gradient_is_finite(state, batches))
        blamed = [r for r, is_finite in enumerate(finite) if not is_finite]
    everybody = "" if blamed or world_size() == 1 else "on all ranks: "
    blamed = blamed or [*range(len(everyone))]
    saved = f"{folder}/nonfinite_step_{step:07d}_rank_{{}}.pt"
    if rank() in blamed:
        content = {"step": step, "losses": terms, "batches": [_plain(b) for b in batches]}
        save_tensors(Path(saved.format(rank())), content)
    details = "; ".join(f"rank {r}: losses {everyone[r][0]}, image ids {everyone[r][1]}" for r in blamed)
    raise NonFinite(
        f"step {step}: a loss or gradient is not finite ({everybody}{details}); no weight was changed, "
        f"the batch is saved in {saved.format(blamed[0] if len(blamed) == 1 else '*')}; {CURES}"
    )


def _own_gradient_is_finite(state: TrainState, batches: list[Batch]) -> bool:
    """Whether the gradient of this rank's batches alone is finite; every rank calls it, and no gradient is left."""
    model, state.model = state.model, state.detector
    try:
        _backward(state, batches, [p for p in state.detector.parameters() if p.requires_grad])
    finally:
        state.model = model
    gradients = [p.grad for p in state.detector.parameters() if p.grad is not None]
    state.optimizer.zero_grad(set_to_none=True)
    return bool(torch.nn.utils.get_total_norm(gradients).isfinite())


def _plain(batch: Batch) -> dict[str, Any]:
    return {
        "images": batch.images,
        "targets": [{"image_id": t.image_id, "boxes": t.boxes, "labels": t.labels} for t in batch.targets],
    }


def read_losses(result: StepResult) -> dict[str, float]:
    """The step's losses and gradient norm as numbers, over all ranks; every rank calls it."""
    values = mean(torch.stack([v.double() for v in result.losses.values()])).tolist()
    losses = dict(zip(result.losses, values, strict=True))
    return {"loss": sum(values), **losses, "grad_norm": float(result.grad_norm)}
