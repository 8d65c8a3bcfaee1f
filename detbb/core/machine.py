"""What this machine has: cores, memory, shared memory."""

from __future__ import annotations

import os

from detbb.core.errors import UserError

BYTES_PER_PIXEL = 3 + 12 + 64  # of a batch, at least: uint8, float32, and the 64 channels that a stem puts out


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def shared_memory() -> int | None:
    """Free bytes of what processes hand batches over in; None where there is no such place."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def check_batch(images: int, hw: tuple[int, int], keys: str) -> None:
    """Refuse a batch that cannot fit into this machine's memory. Raises: UserError naming the `keys` to lower."""
    needed = images * hw[0] * hw[1] * BYTES_PER_PIXEL
    if max(hw) > 32_767 or needed > memory():  # OpenCV resizes to no more than that
        raise UserError(
            f"{keys}: {images} x {hw[1]} x {hw[0]} pixels take {needed / 1e9:,.0f} GB at least, this machine has "
            f"{memory() / 1e9:,.0f} GB (and a side may have 32,767 pixels); lower {keys}"
        )
