"""Tile sizes: from rows of one expert, sizes of the matrix and the shared memory of the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

DESCRIBED = 100 << 10  # shared memory of a block where no device says: the least of sm80 and later


@dataclass(frozen=True, slots=True)
class Config:
    """rows, columns and inner: of a tile.  group: tiles that go through the columns together."""

    rows: int
    columns: int
    inner: int
    group: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int, matrices: int) -> int:
        """Of the stages: a tile of the rows and one of each matrix."""
        return self.stages * (self.rows + matrices * self.columns) * self.inner * itemsize


# rows of one expert, up to → config for two bytes: not measured yet, after the published defaults of comparable kernels
# (few rows: bound by memory, so many loads in flight; many: two warpgroups on 128 rows)
_BY_ROWS = (
    (16, Config(16, 64, 128, 1, 4, 4)),
    (32, Config(32, 64, 128, 1, 4, 3)),
    (64, Config(64, 128, 64, 8, 4, 3)),
)
_MANY = Config(128, 128, 64, 8, 8, 3)


def choose(rows: int, experts: int, device: torch.device, itemsize: int, matrices: int, width: int = 0) -> Config:
    """rows: routed rows; matrices: 2 where gate and up are multiplied in one pass; width: columns in all, 0 many."""
    busy = max(1, min(experts, rows))
    each = -(-rows // busy)
    found = next((config for most, config in _BY_ROWS if each <= most), _MANY)
    if itemsize > 2:
        found = replace(found, columns=min(64, found.columns), inner=max(16, found.inner * 2 // itemsize))
    shared = _shared(device)
    while found.stages > 2 and found.shared_bytes(itemsize, matrices) > shared:
        found = replace(found, stages=found.stages - 1)
    while found.columns > 32 and found.shared_bytes(itemsize, matrices) > shared:
        found = replace(found, columns=found.columns // 2)
    programs = busy * -(-each // found.rows) * -(-width // found.columns)
    if 0 < programs < 2 * _units(device):  # too few to keep all of the memory busy
        found = replace(found, columns=min(32, found.columns))
    return found


@lru_cache(maxsize=64)
def _units(device: torch.device) -> int:
    """Multiprocessors; of an H200 where no device says."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 132


@lru_cache(maxsize=64)
def _shared(device: torch.device) -> int:
    """Bytes that one block may have."""
    if device.type != "cuda":
        return DESCRIBED
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)
