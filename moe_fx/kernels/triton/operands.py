"""What kernels are given, as tuples that travel into them whole: pointers, strides in elements, and counts."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fx.kernels.triton.sorting import Tiles, sort


class Rows(NamedTuple):
    """A matrix [n, m]."""

    at: Any
    row: int
    col: int


class Matrices(NamedTuple):
    """E matrices [out, in].  at: their pointer, or where each lies apart a table of addresses, int64 [E]; like: a
    pointer of their dtype; aligned: all addresses are multiples of 16.  expert: stride, 0 with a table."""

    at: Any
    like: Any
    aligned: tl.constexpr
    expert: int
    out: int
    inner: int


class Vectors(NamedTuple):
    """E vectors; fields as in ``Matrices``."""

    at: Any
    like: Any
    aligned: tl.constexpr
    expert: int
    out: int


class Routed(NamedTuple):
    """Which rows a program multiplies.  ids [T, k] with strides; top_k; experts E.

    Sorted rows: order, ends, expert and first as in ``sorting.Tiles``.  Batches: ends holds their counts, most is the
    room of one, and each the tiles of one.  What a way of coming does not need is None or 0.
    """

    ids: Any
    ids_t: int
    ids_k: int
    top_k: int
    experts: int
    order: Any
    ends: Any
    expert: Any
    first: Any
    most: int
    each: int


@lru_cache(maxsize=1024)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [E]: the same for the same addresses, whatever lies there."""
    return torch.tensor(addresses, device=device)


def matrices(found: Tensor | list[Tensor]) -> Matrices:
    """[E, out, in], or E matrices [out, in] of one shape and stride."""
    return Matrices(*_held(found))


def vectors(found: Tensor | list[Tensor]) -> Vectors:
    """[E, n], or E vectors [n] of one stride."""
    return Vectors(*_held(found))


def _held(found: Tensor | list[Tensor]) -> tuple[Any, ...]:
    if isinstance(found, Tensor):
        return found, found, tl.constexpr(False), *found.stride()
    first, addresses = found[0], tuple(t.data_ptr() for t in found)
    aligned = tl.constexpr(all(address % 16 == 0 for address in addresses))
    return _table(addresses, first.device), first, aligned, 0, *first.stride()


def rows(found: Tensor) -> Rows:
    return Rows(found, *found.stride())


def by_expert(ids: Tensor, experts: int, block: int) -> tuple[Routed, int]:
    """(rows in tiles of ``block`` rows of one expert, how many tiles at most)."""
    tiles: Tiles = sort(ids, experts, block)
    found = Routed(
        *(ids, *ids.stride(), ids.shape[1], experts), tiles.order, tiles.ends, tiles.expert, tiles.first, 0, 0
    )  # fmt: skip
    return found, len(tiles.expert)


def apart(ids: Tensor, experts: int) -> Routed:
    """Every routed row a tile of its own."""
    return Routed(ids, *ids.stride(), ids.shape[1], experts, None, None, None, None, 0, 0)


def batches(counts: Tensor, most: int, block: int) -> tuple[Routed, int]:
    """(batches of at most ``most`` rows with their counts int32 [E], tiles of all of them)."""
    each = triton.cdiv(most, block)
    return Routed(None, 0, 0, 1, len(counts), None, counts, None, None, most, each), each * len(counts)


@triton.jit
def tile_of(pid, routed, HOW: tl.constexpr, BM: tl.constexpr):
    """(expert, first row, row after the last) of a tile; expert -1: there is nothing to do."""
    if HOW == "sorted":
        expert = tl.load(routed.expert + pid)
        first = tl.load(routed.first + pid)
        end = tl.minimum(first + BM, tl.load(routed.ends + tl.maximum(expert, 0)))
    elif HOW == "apart":
        at = (pid // routed.top_k).to(tl.int64) * routed.ids_t + (pid % routed.top_k).to(tl.int64) * routed.ids_k
        found = tl.load(routed.ids + at)
        expert = tl.where((found >= 0) & (found < routed.experts), found, -1).to(tl.int32)
        first = pid
        end = pid + 1
    else:
        batch = pid // routed.each
        row = (pid % routed.each) * BM
        count = tl.load(routed.ends + batch).to(tl.int32)
        first = batch * routed.most + row
        end = batch * routed.most + tl.minimum(row + BM, count)
        expert = tl.where(row < count, batch, -1)
    return expert, first, end


@triton.jit
def rows_in(first, end, routed, HOW: tl.constexpr, BM: tl.constexpr):
    """(row, whether it is one, flat position), [BM] each, of a tile with something to do; past its end the last row
    stands again."""
    row = first + tl.arange(0, BM)
    there = row < end
    row = tl.minimum(row, end - 1)
    return row, there, flat_of(row, routed, HOW)


@triton.jit
def weight_of(weights, flat, top_k):
    """float32: the routing weights [T, k] of flat positions."""
    at = (flat // top_k).to(tl.int64) * weights.row + (flat % top_k).to(tl.int64) * weights.col
    return tl.load(weights.at + at).to(tl.float32)


@triton.jit
def flat_of(row, routed, HOW: tl.constexpr):
    """The flat position of each row: where it stands when nothing is sorted."""
    if HOW == "sorted":
        return tl.load(routed.order + row)
    return row


@triton.jit
def swizzled(pid, tiles, columns, GROUP: tl.constexpr):
    """(tile, column block): GROUP tiles go through the columns together, so that they share what L2 holds."""
    width = GROUP * columns
    start = pid // width * GROUP
    height = tl.minimum(tiles - start, GROUP)
    within = pid % width
    return start + within % height, within // height


@triton.jit
def of_expert(held, expert):
    """Pointer to the expert's matrix or vector."""
    if held.at.dtype.element_ty == tl.int64:  # a table of addresses
        found = tl.load(held.at + expert).to(held.like.dtype)
        if held.aligned:
            found = tl.multiple_of(found, 16)
    else:
        found = held.at + expert.to(tl.int64) * held.expert
    return found
