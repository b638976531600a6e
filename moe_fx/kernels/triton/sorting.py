"""Rows by expert, on the device alone: two or three launches, deterministic, stable.

A routed row is one (token, slot) pair with the flat position ``token * k + slot``; an id outside [0, E) is of nobody,
and such rows come last.  A tile is up to ``rows`` consecutive sorted rows of one expert: what one program multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # rows that one program counts and places
PART = 128  # rows of which each is compared with each
TILES = 32  # tiles that one program describes
ALIGNED = 4  # numbers after which a part begins: the compiler asks whether a pointer is a multiple of 16 bytes
# Numbers that change with the tokens are not specialised either: nothing is compiled anew for another count.


@dataclass(frozen=True, slots=True)
class Tiles:
    """order: int32 [S], flat positions by expert.  ends: int32 [bins], after each expert's last row; bins > E.
    expert, first: int32 [most], of each tile, expert -1 for those that are not needed."""

    order: Tensor
    ends: Tensor
    expert: Tensor
    first: Tensor


def most_tiles(size: int, experts: int, rows: int) -> int:
    """Tiles that ``size`` rows of any routing can need."""
    return (size + min(experts, size) * (rows - 1)) // rows


def sort(ids: Tensor, experts: int, rows: int) -> Tiles:
    """ids [T, k], any integers → tiles of ``rows`` rows.  Waits for no device."""
    size, k = ids.numel(), ids.shape[1]
    bins = max(triton.next_power_of_2(experts + 1), PART)
    blocks, count = triton.cdiv(size, BLOCK), most_tiles(size, experts, rows)
    sizes = (size, count, count, bins, bins, blocks * bins)
    rooms = [triton.cdiv(n, ALIGNED) * ALIGNED for n in sizes]
    parts = torch.empty(sum(rooms), dtype=torch.int32, device=ids.device).split(rooms)
    order, expert, first, ends, total, before = (part[:n] for part, n in zip(parts, sizes, strict=True))
    strides, shape = ids.stride(), dict(E=experts, BINS=bins)
    if blocks > 1:
        _count[(blocks,)](ids, before, size, k, *strides, **shape, BLOCK=BLOCK)
        _scan[(bins // PART,)](before, total, blocks, BINS=bins, PART=PART)
    grid = (blocks + triton.cdiv(count, TILES),)
    _place[grid](
        *(ids, before, total, order, ends, expert, first, size, blocks, count, k, *strides),
        **shape, BLOCK=BLOCK, PART=PART, ROWS=rows, TILES=TILES,
    )  # fmt: skip
    return Tiles(order, ends, expert, first)


@triton.jit
def _bins(ids, flat, size, k, stride_t, stride_k, E: tl.constexpr):
    """Of each row its expert; E of rows of nobody and of those past the end."""
    there = flat < size
    token = (flat // k).to(tl.int64)
    found = tl.load(ids + token * stride_t + (flat % k).to(tl.int64) * stride_k, mask=there, other=-1)
    return tl.where((found >= 0) & (found < E), found, E).to(tl.int32)


@triton.jit
def _histogram(key, there, E: tl.constexpr, BINS: tl.constexpr):
    """int32 [BINS]: rows of each bin, without those that are not there."""
    extra = tl.sum(tl.where(there, 0, 1))  # they stand in bin E
    return tl.histogram(key, BINS) - tl.where(tl.arange(0, BINS) == E, extra, 0)


@triton.jit(do_not_specialize=["size"])
def _count(ids, counts, size, k, stride_t, stride_k, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts [blocks, BINS]."""
    block = tl.program_id(0)
    flat = block * BLOCK + tl.arange(0, BLOCK)
    found = _histogram(_bins(ids, flat, size, k, stride_t, stride_k, E), flat < size, E, BINS)
    tl.store(counts + block * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=["blocks"])
def _scan(counts, total, blocks, BINS: tl.constexpr, PART: tl.constexpr):
    """counts become, in key, those of the blocks before; total [BINS]: of all blocks."""
    key = tl.program_id(0) * PART + tl.arange(0, PART)
    found = tl.zeros((PART,), tl.int32)
    for block in range(blocks):
        here = tl.load(counts + block * BINS + key)
        tl.store(counts + block * BINS + key, found)
        found += here
    tl.store(total + key, found)


@triton.jit(do_not_specialize=["size", "tiles"])
def _place(
    ids, before, total, order, ends, tile_expert, tile_first, size, blocks, tiles, k, stride_t, stride_k,
    E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """The first ``blocks`` programs key a block of rows each, the others describe TILES tiles each."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    if blocks == 1:
        rows = tl.arange(0, BLOCK)
        counts = _histogram(_bins(ids, rows, size, k, stride_t, stride_k, E), rows < size, E, BINS)
    else:
        counts = tl.load(total + bins)
    end = tl.cumsum(counts, 0)
    if program < blocks:
        at = end - counts
        if blocks > 1:
            at += tl.load(before + program * BINS + bins)
        if program == 0:
            tl.store(ends + bins, end)
        i = tl.arange(0, PART)
        for start in range(0, BLOCK, PART):
            flat = program * BLOCK + start + i
            there = flat < size
            key = _bins(ids, flat, size, k, stride_t, stride_k, E)
            earlier = (key[:, None] == key[None, :]) & (i[None, :] < i[:, None])
            tl.store(order + tl.gather(at, key, 0) + tl.sum(earlier.to(tl.int32), 1), flat, mask=there)
            at += _histogram(key, there, E, BINS)
    else:
        needed = tl.where(bins < E, (counts + ROWS - 1) // ROWS, 0)
        tile_end = tl.cumsum(needed, 0)
        tile = (program - blocks) * TILES + tl.arange(0, TILES)
        expert = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), 1)
        used = expert < BINS
        expert = tl.minimum(expert, BINS - 1)
        first = tl.gather(end - counts, expert, 0) + (tile - tl.gather(tile_end - needed, expert, 0)) * ROWS
        tl.store(tile_expert + tile, tl.where(used, expert, -1), mask=tile < tiles)
        tl.store(tile_first + tile, first, mask=tile < tiles)
