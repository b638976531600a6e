"""What the PyTorch experts kernels share: rows in order of expert, the step between the products, the combination.

A routed row is one (token, slot) pair.  Its flat position is ``token * k + slot``; S = T * k rows in all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.binding import Experts, Matrices, Quantised, Vectors, split_gate_up
from moe_fx.kernels.experts.codes import matrix, numbers, scaled_after, scales
from moe_fx.reference.activations import activation
from moe_fx.reference.experts import dtype_of, rounding_of
from moe_fx.spec import ExpertSpec, MoESpec

Segment = tuple[int, int, int]  # expert, first sorted row, row after the last
FEW = 64  # rows that are sorted on the host
CHUNK = 256  # rows that share one activation call: few calls at small T, inside the L2 cache at large T
PIECE = 2048  # rows of one expert at a time: bounds the memory when all tokens go to one
LAUNCH = 1 << 16  # rows that a device takes at a time where a CPU takes PIECE: there a launch costs more than memory
INDICES = 20  # numbers of 16 bits for every routed row, at most, that its indices take while it is sorted or placed


@dataclass(slots=True)
class SortedRows:
    """order [S] int64: flat position of each row, by expert, rows of ids outside [0, E) last.

    segments: the experts that have rows, ascending.  used: rows of ids inside [0, E).
    """

    order: Tensor
    segments: list[Segment]
    used: int

    def pieces(self, most: int) -> SortedRows:
        """The same rows in segments of at most ``most``: several in a row may be of one expert."""
        cut = [(e, at, min(at + most, stop)) for e, start, stop in self.segments for at in range(start, stop, most)]
        return SortedRows(self.order, cut, self.used)

    def chunks(self, rows: int) -> Iterator[list[Segment]]:
        """Consecutive segments of at least ``rows`` rows together, except the last."""
        chunk: list[Segment] = []
        for segment in self.segments:
            chunk.append(segment)
            if segment[2] - chunk[0][1] >= rows:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def places(self, k: int) -> Tensor:
        """[T, k] int64: the sorted row of each (token, slot)."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(self.order.numel(), device=self.order.device)
        return places.view(-1, k)


def sort_rows(ids: Tensor, experts: int) -> SortedRows:
    """ids [T, k], any integers → rows by expert.  Synchronises with the device once for the counts."""
    flat = ids.reshape(-1)
    if flat.numel() <= FEW and flat.device.type == "cpu":
        return _sort_few(flat, experts)
    key = flat.where(inside(flat, experts), experts)
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=experts + 1).tolist()
    segments, start = [], 0
    for expert, count in enumerate(counts[:experts]):
        if count:
            segments.append((expert, start, start + count))
            start += count
    return SortedRows(order, segments, start)


def _sort_few(flat: Tensor, experts: int) -> SortedRows:
    """``sort_rows`` on the host: a handful of rows is sorted before six ops are launched."""
    found = flat.tolist()
    order = sorted(range(len(found)), key=lambda i: found[i] if 0 <= found[i] < experts else experts)
    segments: list[Segment] = []
    used = 0
    for expert, group in itertools.groupby(order, key=found.__getitem__):
        if 0 <= expert < experts:
            start, used = used, used + len(list(group))
            segments.append((expert, start, used))
    return SortedRows(torch.tensor(order), segments, used)


@dataclass(frozen=True, slots=True)
class ByExpert:
    """order: int64 [S], flat positions of the routed rows in order of expert.  ends: int32 [E], after each expert's
    last row.  expert: [S], of each row."""

    order: Tensor
    ends: Tensor
    expert: Tensor


def by_expert(ids: Tensor, experts: int) -> ByExpert:
    """ids [T, k], an expert's each or ``experts`` where none is meant → rows sorted, those of none last.  Waits for no
    device."""
    expert, order = ids.reshape(-1).sort(stable=True)
    bins = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    return ByExpert(order, torch.searchsorted(expert, bins, right=True, out_int32=True), expert)


def inside(ids: Tensor, experts: int) -> Tensor:
    """bool, shape of ids: the id names an expert."""
    return (ids >= 0) & (ids < experts)


def blocks(rows: Tensor, width: int = 1) -> Sequence[Tensor]:
    """Parts of ``rows``, to be worked on one after the other: what that allocates does not grow with their number.

    width: how many routed rows each of them stands for.
    """
    most = max(1, (PIECE if rows.device.type == "cpu" else LAUNCH) // width)
    return (rows,) if len(rows) <= most else rows.split(most)


def gather_rows(
    x: Tensor, weights: Tensor, flat: Tensor, spec: MoESpec, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Rows [n, H] of the flat positions [n] in ``dtype``, times their routing weight if that is on the input."""
    k = weights.shape[1]
    if out is None:
        out = x.new_empty((len(flat), x.shape[1]), dtype=dtype)
    if spec.combine.weight_on == "output" and x.dtype == dtype:
        return torch.index_select(x, 0, flat // k, out=out)
    for part, place in zip(blocks(flat), blocks(out), strict=True):
        rows = x.index_select(0, part // k)
        if spec.combine.weight_on == "input":
            rows = rows * weights.reshape(-1).index_select(0, part).unsqueeze(1)
        place.copy_(rows)
    return out


def room(scratch: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor with undefined values: of the workspace where it fits, else a new one."""
    size = math.prod(shape) * dtype.itemsize
    if scratch is None or scratch.nbytes < size:
        return like.new_empty(shape, dtype=dtype)
    return scratch.view(-1).view(torch.uint8)[:size].view(dtype).view(shape)


def rounded(
    rows: Tensor, operand: Literal["a1", "a2"], experts: Experts, spec: MoESpec, chunk: list[Segment]
) -> Tensor:
    """Inputs [n, in] of the chunk's products as quantised products see them; every row has scales of its own, or given
    ones (``capability.RowSchemes``)."""
    rounding = rounding_of(operand, experts, spec)
    if rounding.key is None:
        return rows
    if not rounding.by_expert:
        return rounding(rows, 0)
    parts = rows.split([stop - start for _, start, stop in chunk])
    return torch.cat([rounding(part, expert) for part, (expert, _, _) in zip(parts, chunk, strict=True)])


def products(
    inputs: Tensor, matrices: Matrices, chunk: list[Segment], out: Tensor | None = None, back: bool = False
) -> Tensor:
    """inputs [n, in] of the chunk's rows times each row's own matrix [out, in] → [n, out], in the dtype of inputs.

    back: times the matrix from the other side, [n, out] → [n, in].  Matrices are read where they lie.
    """
    if out is None:
        out = inputs.new_empty((inputs.shape[0], sizes_of(matrices)[1 if back else 0]))
    sizes = [stop - start for _, start, stop in chunk]
    after = not back and scaled_after(matrices, inputs.dtype)
    if isinstance(matrices, Tensor) and matrices.dtype == inputs.dtype:
        whole = matrices if back else matrices.transpose(1, 2)
        chosen: Iterable[Tensor] = [whole.select(0, expert) for expert, _, _ in chunk]
    elif after:
        chosen = (numbers(matrices, expert, inputs.dtype).t() for expert, _, _ in chunk)
    else:  # one at a time: a cast or dequantised matrix lives for one product
        space = inputs.new_empty(sizes_of(matrices)) if isinstance(matrices, Quantised) else None
        found = (matrix(matrices, expert, inputs.dtype, space) for expert, _, _ in chunk)
        chosen = found if back else (m.t() for m in found)
    for (expert, _, _), rows, one, result in zip(chunk, inputs.split(sizes), chosen, out.split(sizes), strict=True):
        torch.mm(rows, one, out=result)
        if after:
            result.mul_(scales(matrices, expert))
    return out


def sizes_of(matrices: Matrices) -> tuple[int, int]:
    """(out, in) of the matrices."""
    rows, cols = matrices[0].shape
    return rows, cols


def up_products(
    inputs: Tensor, experts: Experts, chunk: list[Segment], out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """inputs [n, H] of the chunk's rows → the results of the up products with their biases, in ``out`` if given."""
    places = out or [None] * len(experts.up)
    up = [products(inputs, matrices, chunk, place) for matrices, place in zip(experts.up, places, strict=True)]
    for result, biases in zip(up, experts.up_bias, strict=False):
        _add_biases(result, biases, chunk)
    return up


def down_products(hidden: Tensor, experts: Experts, chunk: list[Segment], out: Tensor | None = None) -> Tensor:
    """hidden [n, I] of the chunk's rows → the results of the down products with their biases [n, H]."""
    result = products(hidden, experts.down, chunk, out)
    if experts.down_bias is not None:
        _add_biases(result, experts.down_bias, chunk)
    return result


def _add_biases(rows: Tensor, biases: Vectors, chunk: list[Segment]) -> None:
    sizes = [stop - start for _, start, stop in chunk]
    for (expert, _, _), part in zip(chunk, rows.split(sizes), strict=True):
        part.add_(biases[expert].to(rows.dtype))


def gate_and_up(up: list[Tensor], experts: Experts, spec: ExpertSpec) -> tuple[Tensor, Tensor | None]:
    """Results of the up products → (gate, up), each [n, I] in ``act_dtype``; up is None for an ungated expert."""
    inner = dtype_of(spec.act_dtype, up[0].dtype)
    if not spec.gated:
        return up[0].to(inner), None
    gate, second = (up[0], up[1]) if len(up) == 2 else split_gate_up(up[0], experts.order)
    return gate.to(inner), second.to(inner)


def activate(up: list[Tensor], experts: Experts, spec: ExpertSpec) -> Tensor:
    """Results of the up products → hidden [n, I] in their dtype."""
    gate, second = gate_and_up(up, experts, spec)
    return activation(spec.act, spec.gated).forward(gate, second, *spec.act_params).to(up[0].dtype)


def combine(out: Tensor, rows: Tensor, places: Tensor, weights: Tensor | None, accumulate: torch.dtype) -> Tensor:
    """out [T, H] = sum over k of weights[t, k] * rows[places[t, k]], rounded once; weights None counts as ones.

    At least as exact as ``accumulate`` asks for.  EmbeddingBag is this sum in one pass: on a CPU 10 to 50 times faster
    than index_add_, everywhere deterministic and, for 16-bit rows, in fp32.  Its result is always a new tensor, so it
    sums a block of tokens at a time.
    """
    k = places.shape[1]
    parts = itertools.repeat(None) if weights is None else blocks(weights, k)
    for place, part, given in zip(blocks(out, k), blocks(places, k), parts, strict=False):
        place.copy_(_sums(rows, part, given, accumulate))
    return out


def _sums(rows: Tensor, places: Tensor, weights: Tensor | None, accumulate: torch.dtype) -> Tensor:
    """The sums of some tokens, in rows' dtype or a wider one."""
    if accumulate == rows.dtype == torch.bfloat16:  # the rest of a float16 may be too small for one
        if weights is not None and weights.dtype != rows.dtype:
            # A wider weight is the sum of two 16-bit ones: exact enough, and rows need no copy in fp32.
            high = weights.to(rows.dtype)
            weights = torch.cat([high, (weights - high).to(rows.dtype)], dim=1)
            places = torch.cat([places, places], dim=1)
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)
    wide = torch.promote_types(rows.dtype, accumulate)
    if weights is not None:
        wide = torch.promote_types(wide, weights.dtype)
        weights = weights.to(wide)
    if rows.dtype != wide and places.numel() < len(rows):  # a wider copy of these tokens' rows alone
        rows = rows.index_select(0, places.flatten())
        places = torch.arange(places.numel(), device=places.device).view_as(places)
    return F.embedding_bag(places, rows.to(wide), mode="sum", per_sample_weights=weights)


def finish(
    out: Tensor, rows: SortedRows, weights: Tensor, spec: MoESpec, dtype: torch.dtype, result: Tensor | None = None
) -> Tensor:
    """Expert outputs [S, H] in sorted order, weights [T, k] → y [T, H] in ``out_dtype``, in ``result`` where given;
    ``dtype`` is that of x."""
    on_output = spec.combine.weight_on == "output"
    if result is None:
        result = out.new_empty((len(weights), out.shape[1]), dtype=dtype_of(spec.combine.out_dtype, dtype))
    if len(weights) == 1:
        return result.copy_(_combine_one(out, weights[0].index_select(0, rows.order) if on_output else None))
    accumulate = dtype_of(spec.combine.accumulate, dtype)
    return combine(result, out, rows.places(weights.shape[1]), weights if on_output else None, accumulate)


def _combine_one(rows: Tensor, weights: Tensor | None) -> Tensor:
    """``combine`` for one token: rows [k, H] → [1, H] in float32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if weights is not None:
        wide = torch.promote_types(wide, weights.dtype)
        rows = rows.to(wide) * weights.to(wide).unsqueeze(1)
    return rows.sum(0, keepdim=True, dtype=wide)


def empty_result(x: Tensor, spec: MoESpec, result: Tensor | None = None) -> Tensor:
    """y of zeros [T, H], for when no row is routed; in ``result`` where given."""
    if result is not None:
        return result.zero_()
    return torch.zeros(x.shape, dtype=dtype_of(spec.combine.out_dtype, x.dtype), device=x.device)
