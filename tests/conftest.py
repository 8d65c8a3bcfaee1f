"""What all tests share: one thread count, and where real data may be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on the thread count, and child processes inherit it

import pytest
import torch
from runs import shrink

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that in the end no process waits for another's long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def unsynced() -> Iterator[None]:
    """For tests that write many files and are not about power cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def thin_resnets() -> Iterator[None]:
    """For tests of what does not depend on how wide a network is: a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield


@pytest.fixture
def data_folder() -> Callable[[str], Path]:
    """`data_folder("bccd")`: that folder of real data, from $DETBB_DATA or beside the repository; skips without one."""

    def find(name: str) -> Path:
        repository = Path(__file__).resolve().parents[1]
        roots = (
            [Path(os.environ["DETBB_DATA"])] if "DETBB_DATA" in os.environ else [repository.parent / "shared" / "data"]
        )
        for root in roots:
            if (root / name).is_dir():
                return (root / name).resolve()
        pytest.skip(f"no data folder {name!r} in {roots[0]}; set DETBB_DATA to the folder that holds it")

    return find
