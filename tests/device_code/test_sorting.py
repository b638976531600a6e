"""Rows by expert and their tiles, against PyTorch's own stable sort."""

from __future__ import annotations

import pytest
import torch

from .here import DEVICE, needs_device

pytestmark = needs_device
SIZES = [(1, 1, 2), (1, 2, 6), (13, 3, 6), (64, 8, 64), (500, 8, 128), (300, 4, 300), (1100, 1, 3)]  # T, k, E


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["any", "one", "outside", "strided", "int32"])
def test_sort(sizes: tuple[int, int, int], rows: int, kind: str) -> None:
    from moe_fx.kernels.triton.sorting import most_tiles, sort

    tokens, k, experts = sizes
    ids = torch.randint(-1, experts + 1, (tokens, k), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if kind == "one":
        ids.fill_(experts - 1)
    if kind == "outside":
        ids = torch.where(ids % 2 == 0, -1, 2**40)
    if kind == "strided":
        ids = ids.t().contiguous().t()
    if kind == "int32":
        ids = ids.int()
    found = sort(ids, experts, rows)
    key = torch.where((ids >= 0) & (ids < experts), ids, experts).flatten()
    counts = torch.bincount(key, minlength=experts + 1)[:experts]
    ends = counts.cumsum(0)
    assert torch.equal(found.order.long(), key.argsort(stable=True))
    assert torch.equal(found.ends[:experts].long(), ends)
    tiles = [
        (e, first) for e in range(experts) for first in range(int(ends[e] - counts[e]), int(ends[e]), rows)
    ]  # fmt: skip
    assert len(tiles) <= most_tiles(ids.numel(), experts, rows) == len(found.expert)
    got = list(zip(found.expert.tolist(), found.first.tolist(), strict=True))
    assert got[: len(tiles)] == tiles
    assert all(expert == -1 for expert, _ in got[len(tiles) :])
