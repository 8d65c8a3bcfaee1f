"""Number formats: what autocast computes in, and what never goes below float32."""

from __future__ import annotations

import torch
from torch import Tensor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32 at least: losses and scores are never computed in half precision."""
    return x if x.dtype == torch.float64 else x.float()
