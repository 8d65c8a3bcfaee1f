"""The feature cache: what the frozen prefix puts out, computed once for each image and view."""

from __future__ import annotations

from dataclasses import replace

import torch

from detbb.data.feature_store import Store
from detbb.feature_cache.frozen_prefix import FrozenPrefix
from detbb.structures.batch import Batch, PrecomputedFeatures

RELEASE_AFTER = 20  # batches in a row without a miss; then the prefix drops its copies, as large as its weights


class FeatureCache:
    """Gives batches their features: stored ones where there are any, else the prefix computes and stores them.

    On CPU images are computed one by one, so features do not depend on which images are in a batch or stored already.
    They differ from those of a whole batch by rounding alone, and a resumed run learns from the same bits.
    """

    def __init__(self, prefix: FrozenPrefix, stores: dict[str, Store]) -> None:
        self._prefix, self.stores = prefix, stores
        self._said = self._share()
        self._said_full = False
        self._hits = 0  # batches in a row without a miss

    def __call__(self, batch: Batch) -> Batch:
        store = self.stores.get(batch.source)
        if store is None:
            return self._prefix(batch)
        device, sizes = batch.images.device, batch.sizes
        missing = [i for i, entry in enumerate(batch.entries) if not entry.is_stored]
        assert len(missing) == len(batch.images) and len(batch.entries) == len(sizes)
        self._hits = 0 if missing else self._hits + 1
        if self._hits == RELEASE_AFTER:
            self._prefix.release()
        rows = {i: store.records[e.slot] for i, e in enumerate(batch.entries) if e.is_stored}
        at_once = 1 if device.type == "cpu" else max(len(missing), 1)
        for first in range(0, len(missing), at_once):
            group = missing[first : first + at_once]
            levels = self._prefix.levels(batch.images[first : first + at_once], [sizes[i] for i in group])
            for row, i in enumerate(group):
                rows[i] = store.put(batch.entries[i], {name: levels[name][row] for name in store.plan.levels})
        levels, end = {}, 0
        for name, (h, w, c) in store.plan.levels.items():
            start, end = end, end + h * w * c * store.plan.dtype.itemsize
            values = torch.stack([rows[i][start:end] for i in range(len(sizes))]).view(store.plan.dtype)
            features = values.view(-1, h, w, c).permute(0, 3, 1, 2).to(device, non_blocking=True)
            levels[name] = features.to(torch.promote_types(features.dtype, torch.float32))
        return replace(batch, precomputed=PrecomputedFeatures(self._prefix.after, levels))

    def new_messages(self) -> list[str]:
        """Lines for the log: each further quarter that is stored, and a full disk."""
        lines = []
        if self._said < 100 and (share := self._share()) // 25 > self._said // 25:
            self._said = share
            lines.append(f"feature cache: {share} % stored")
        if not self._said_full and any(store.full for store in self.stores.values()):
            self._said_full = True
            lines.append(
                "WARNING: feature cache: the disk is full or fails; what is not stored yet is computed at every step"
            )
        return lines

    def _share(self) -> int:
        slots = sum(s.plan.images * s.plan.variants for s in self.stores.values())
        return 100 * sum(s.filled for s in self.stores.values()) // max(slots, 1)
