"""Norm layers by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.ops.misc
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as CudaSyncBatchNorm

from detbb.core.errors import unknown_name
from detbb.distributed.collectives import mean as mean_over_ranks
from detbb.distributed.collectives import world_size


class FrozenBatchNorm2d(torchvision.ops.misc.FrozenBatchNorm2d):
    """Batch norm whose statistics and affine are constants: to the bit what `nn.BatchNorm2d` computes in eval mode.

    It keeps `num_batches_tracked` (unlike torchvision's), so its state dict and a BatchNorm2d's are interchangeable.
    """

    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)  # torchvision's files lack it
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)  # not torchvision's, which drops it


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batch of all processes, on CPU and CUDA; on one process and in eval mode plain BatchNorm2d.

        model = torchvision.models.resnet18(norm_layer=detbb.SyncBatchNorm)

    Shares may be of different size and empty: statistics are weighted by count, and the running variance is the
    unbiased variance of the whole batch. In training, all processes must run it, forward and backward, in the same
    order. Eval mode communicates nothing. (Not a subclass of `nn.SyncBatchNorm`: DDP refuses that on CPU.)

    Raises: ValueError: all processes together hold one value per channel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, ...); N may be 0 on some processes."""
        if self.training and world_size() > 1:
            return self._forward_synced(x)
        if self.training and not x.is_cuda and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            # PyTorch's CPU kernel for this layout sums with ten times the rounding of its other one, and of ours
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), got {tuple(input.shape)}")

    @torch.compiler.disable
    def _forward_synced(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        running_mean, running_var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        momentum = self.momentum or 0.0
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            if self.momentum is None:
                momentum = 1.0 / self.num_batches_tracked.item()
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        if x.is_cuda:
            # torch's kernel exchanges float32 statistics, but an empty share would send its own half precision
            share = x if x.numel() else x.to(wide)
            arguments = (self.weight, self.bias, running_mean, running_var, self.eps, momentum)
            return CudaSyncBatchNorm.apply(share, *arguments, dist.group.WORLD, world_size()).to(x.dtype)
        mean, var, count = _statistics_of_all(x.detach().to(wide))
        if count == 1:
            raise ValueError(f"expected more than 1 value per channel over all processes, got {tuple(x.shape)} here")
        if running_mean is not None and running_var is not None and count:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        return _Normalize.apply(x, self.weight, self.bias, (mean.to(wide), var.to(wide), count, self.eps))


def _statistics_of_all(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance (C,) float64 of all processes' x, and the count of values per channel.

    Shares are joined by their means and variances (Chan et al. 1979), so no large squares cancel.
    """
    channels, count = x.shape[1], x.numel() // x.shape[1]
    share = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if count:
        var, mean = torch.var_mean(x, _dims(x), correction=0)
        share = torch.cat([mean.double(), var.double(), share.new_tensor([count])])
    shares = [torch.empty_like(share) for _ in range(world_size())]
    dist.all_gather(shares, share)
    means, variances, counts = torch.stack(shares).split([channels, channels, 1], dim=1)
    total = counts.sum().item()
    weights = counts / max(total, 1)
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean) ** 2)).sum(0), total


class _Normalize(torch.autograd.Function):
    """Normalise by statistics of all processes; the gradient goes through the statistics too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: tuple) -> Tensor:
        mean, var, ctx.count, eps = statistics
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        column = [1, -1] + [1] * (x.dim() - 2)
        grad = grad.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(column)) * inverse.view(column)
        grad_bias, grad_weight = grad.sum(_dims(x)), (grad * normal).sum(_dims(x))
        grad_x = None
        if ctx.needs_input_grad[0]:
            totals = torch.cat([grad_bias, grad_weight])
            dist.all_reduce(totals)
            mean_grad, mean_slope = (totals / max(ctx.count, 1)).view(2, *column).unbind()
            scale = inverse if weight is None else inverse * weight
            grad_x = ((grad - mean_grad - normal * mean_slope) * scale.view(column)).to(x.dtype)
        needed = ctx.needs_input_grad
        return grad_x, grad_weight if needed[1] else None, grad_bias if needed[2] else None, None


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups (arXiv:1803.08494), or fewer, so that each has at least two channels.

    A group of one channel would have nothing to normalise over on a level of one cell.
    """
    return nn.GroupNorm(math.gcd(32, max(channels // 2, 1)), channels)


NormLayer = Callable[[int], nn.Module]  # channels -> module
NORM_TYPES: dict[str, NormLayer] = {
    "bn": nn.BatchNorm2d,
    "frozen_bn": FrozenBatchNorm2d,
    "sync_bn": SyncBatchNorm,
    "gn": group_norm,
}


def norm_layer(norm: str | None) -> NormLayer | None:
    """The callable channels -> module for `bn`, `frozen_bn`, `sync_bn` or `gn`; None for None."""
    if norm is not None and norm not in NORM_TYPES:
        raise unknown_name("norm", norm, NORM_TYPES)
    return NORM_TYPES[norm] if norm else None


def is_norm(module: nn.Module) -> bool:
    """True for every batch, sync, frozen, instance, group, layer and RMS norm."""
    batch_and_instance, frozen = nn.modules.batchnorm._NormBase, torchvision.ops.misc.FrozenBatchNorm2d
    return isinstance(module, batch_and_instance | frozen | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)


def norm_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of all norms in `module`."""
    return ((name, norm) for name, norm in module.named_modules() if is_norm(norm))


def has_running_stats(module: nn.Module) -> bool:
    """True for a norm whose statistics move when it runs in train mode (so not for a frozen one)."""
    frozen = isinstance(module, torchvision.ops.misc.FrozenBatchNorm2d)
    return is_norm(module) and not frozen and getattr(module, "running_mean", None) is not None


def moving_norms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Norms whose running statistics move in training as the modules stand now."""
    return ((name, norm) for name, norm in norm_modules(module) if norm.training and has_running_stats(norm))


@torch.no_grad()
def average_statistics(module: nn.Module) -> Tensor | None:
    """Replace running statistics that move by their mean over ranks, which all have the same number of images.

    The result () is the largest difference between this rank's and the mean; None on a single process.
    """
    if world_size() == 1:
        return None
    norms = [m for _, m in moving_norms(module) if type(m) is not SyncBatchNorm]
    buffers = [b for norm in norms for b in norm.buffers(recurse=False) if b.is_floating_point()]
    if not buffers:
        return None
    own = torch.cat([b.flatten() for b in buffers])
    average = mean_over_ranks(own.clone())
    for buffer, part in zip(buffers, average.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
    return (own - average).abs().max()
