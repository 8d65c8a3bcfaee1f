"""One optimizer step: forward, backward, one check on all ranks, clip, step, average."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detbb.config.schema import TrainConfig
from detbb.core.files import save_tensors
from detbb.detector import Detector
from detbb.distributed.collectives import all_gather_objects, maximum, mean, rank, world_size
from detbb.modeling.norm import average_statistics, moving_norms
from detbb.modeling.precision import AUTOCAST
from detbb.structures.batch import Batch
from detbb.training import optim
from detbb.training.ema import Ema


class NonFinite(RuntimeError):
    """A loss or gradient was not finite; the message names step, ranks, loss terms, images and the saved batch."""

    same_on_all_ranks = True  # as in errors.UserError


@dataclass
class TrainState:
    """What learns: the detector, its average and its optimizer. Everything else is a function of the step."""

    detector: Detector
    ema: Ema | None
    config: TrainConfig
    device: torch.device
    scaler: torch.amp.GradScaler
    optimizer: torch.optim.Optimizer = field(init=False)
    model: nn.Module = field(init=False)  # the detector, in DDP where there are several processes
    prefix: Callable[[Batch], Batch] | None = None  # computes what is frozen; the detector goes on from there
    skipped_in_row: int = 0
    _difference: Tensor | None = None

    def statistics_difference(self) -> float:
        """The largest difference between ranks' running statistics since the last call; every rank calls it."""
        seen, self._difference = self._difference, None
        return 0.0 if seen is None else float(maximum(seen))

    def share_statistics(self) -> None:
        """Average moving statistics over ranks, at every step: so no rank holds a state that could be lost."""
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
    learner: TrainState, batches: list[Batch], *, lr: float, stop: Callable[[], int], folder: Path, step: int
) -> StepResult:
    """Learn from this rank's share of one step, given as `accumulate` batches of one source.

    stop: gives the signal that this process received so far, or 0. folder: where an offending batch is saved.
    Raises: NonFinite: on all ranks together.
    """
    detector, optimizer = learner.detector, learner.optimizer
    may_skip = learner.config.on_nonfinite == "skip" or learner.scaler.is_enabled()
    statistics = _moving_statistics(detector) if may_skip else []
    optim.set_lr(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    trained = detector.trainable_parameters()
    used = torch.zeros(len(trained), device=learner.device)  # which a loss of any rank depends on
    for index, batch in enumerate(batches):
        batch = batch.to(learner.device)
        if learner.prefix is not None:
            batch = learner.prefix(batch)
        with _reduced_once(learner.model, last=index == len(batches) - 1):
            with torch.autocast(learner.device.type, *_autocast(learner.config)):
                losses = learner.model(batch)
            total = torch.stack([v.to(torch.promote_types(v.dtype, torch.float32)) for v in losses.values()]).sum()
            learner.scaler.scale(total / len(batches)).backward()
        if world_size() > 1:
            used += used.new_tensor(detector.used_parameters)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach() / len(batches)
    bad_images = [path for batch in batches for path in batch.bad_images]
    learner.scaler.unscale_(optimizer)
    gradients = [p.grad for p in trained if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    loss_ok = torch.stack(list(sums.values())).isfinite().all()
    # The one synchronisation of a step: all ranks learn whether anything is not finite, whether anybody must stop or
    # left out an image, and which parameters the losses of any rank depend on.
    noted, flags = [stop(), len(bad_images)], torch.stack([~loss_ok, ~norm.isfinite()]).float()
    if world_size() > 1:
        flags = maximum(torch.cat([flags, used.new_tensor(noted), used]))
    bad_loss, bad_gradient, *others = map(int, flags.tolist())
    signal, bad_image, *seen = others or noted
    result = StepResult(
        sums, norm, sum(len(b.targets) for b in batches), signal, skipped=bool(bad_loss or bad_gradient)
    )
    if bad_image:
        result.bad_images = tuple(path for paths in all_gather_objects(bad_images) for path in paths)
    if world_size() > 1:
        for parameter, anywhere in zip(trained, seen, strict=True):
            if not anywhere:
                parameter.grad = None  # the zero was for DDP; momentum and decay must not see it
    if not result.skipped:
        _update(learner, gradients, norm)
        return result
    for buffer, before in statistics:
        buffer.copy_(before)
    learner.scaler.update()
    # fp16 finds its scale by overflowing gradients now and then; what overflows without any scale is not finite
    if bad_loss or not learner.scaler.is_enabled() or learner.scaler.get_scale() < 1:
        _refuse(learner, batches, sums, folder=folder, step=step)
    return result


def _reduced_once(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """DDP reduces gradients in the last of a step's backward passes."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def _autocast(config: TrainConfig) -> tuple[torch.dtype | None, bool]:
    return AUTOCAST.get(config.precision), config.precision in AUTOCAST


def _update(learner: TrainState, gradients: list[Tensor], norm: Tensor) -> None:
    if learner.config.grad_clip is not None:
        torch._foreach_mul_(gradients, (learner.config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.skipped_in_row = 0
    learner.share_statistics()
    if learner.ema is not None:
        learner.ema.update()


def _refuse(learner: TrainState, batches: list[Batch], sums: dict[str, Tensor], *, folder: Path, step: int) -> None:
    """Keep the batch and stop, or count a skipped step."""
    learner.optimizer.zero_grad(set_to_none=True)
    learner.skipped_in_row += 1
    terms = {name: float(value) for name, value in sums.items()}
    images = [t.image_id for b in batches for t in b.targets]
    everyone = all_gather_objects((terms, images))
    if learner.config.on_nonfinite == "skip" and learner.skipped_in_row <= learner.config.max_skipped:
        return
    blamed = [r for r, (t, _) in enumerate(everyone) if not all(map(math.isfinite, t.values()))] or [
        *range(len(everyone))
    ]
    saved = f"{folder}/nonfinite_step_{step:07d}_rank_{{}}.pt"
    if rank() in blamed:
        content = {"step": step, "losses": terms, "batches": [_plain(b) for b in batches]}
        save_tensors(Path(saved.format(rank())), content)
    details = "; ".join(f"rank {r}: losses {everyone[r][0]}, image ids {everyone[r][1]}" for r in blamed)
    raise NonFinite(
        f"step {step}: a loss or gradient is not finite ({details}); no weight was changed, "
        f"the batch is saved in {saved.format(blamed[0] if len(blamed) == 1 else '*')}"
    )


def _moving_statistics(detector: Detector) -> list[tuple[Tensor, Tensor]]:
    return [(b, b.clone()) for _, m in moving_norms(detector) for b in m.buffers(recurse=False)]


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
