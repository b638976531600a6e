"""The router of a spec in one launch: logits [T, E] → ids and weights [T, k], in float32 and in registers.

``reference.router.route`` says what it means, ``kernels.routing.serves`` which specs it takes.  An expert stands as one
number of 64 bits, its rank: the value that it is chosen by, ordered as ``torch.topk`` orders (NaN above all), then its
id, so that of equal values the lowest id is first, then whether its group is kept.  k maxima of the ranks are the
choice; weights are computed from the chosen logits alone.

exp and log1p are written out: a device's own exp errs the more the further its argument is from 0, and what the
interpreter tests is then what a device computes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fx.kernels.triton import operands
from moe_fx.reference.router import weights_dtype
from moe_fx.spec import RouterSpec

MOST = 2048  # columns of all tokens of one program
MANY = 256  # programs from which on each takes several tokens
WARP = 512  # columns of one warp
LEAST = tl.constexpr(-(1 << 63))  # below the rank of every expert


class Router(NamedTuple):
    """A spec, as the kernel takes it.  bias, expert_scale: [E], or None.  The others: fields of ``RouterSpec``; one
    group where all are kept."""

    bias: Any
    expert_scale: Any
    fill: float
    eps: float
    scale: float
    experts: tl.constexpr
    top_k: tl.constexpr
    groups: tl.constexpr
    topk_groups: tl.constexpr
    group_score: tl.constexpr
    score: tl.constexpr
    order: tl.constexpr
    biased: tl.constexpr
    weights_from: tl.constexpr
    renormalise: tl.constexpr
    eps_form: tl.constexpr


def route(
    logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, spec: RouterSpec, top_k: int
) -> tuple[Tensor, Tensor]:
    """As ``reference.router.route``: logits [T, E] of any strides → (ids int64 [T, k], weights [T, k])."""
    tokens, experts = logits.shape
    kind = weights_dtype(logits.dtype, None if expert_scale is None else expert_scale.dtype, spec)
    ids = logits.new_empty((tokens, top_k), dtype=torch.int64)
    weights = logits.new_empty((tokens, top_k), dtype=kind)
    if not tokens:
        return ids, weights
    groups = spec.groups if spec.topk_groups < spec.groups else 1
    constants = (experts, top_k, groups, spec.topk_groups, spec.group_score, spec.score, spec.order, spec.bias)
    router = Router(
        None if bias is None else bias.contiguous(),
        None if expert_scale is None else expert_scale.contiguous(),
        *(spec.group_fill, spec.eps, spec.scale),
        *map(tl.constexpr, (*constants, spec.weights_from, spec.renormalise, spec.eps_form)),
    )
    member, group = triton.next_power_of_2(experts // groups), triton.next_power_of_2(groups)
    width = member * group
    rows = max(1, MOST // width)
    rows = rows if tokens >= MANY * rows else 1
    _route[(triton.cdiv(tokens, rows),)](
        *(operands.rows(logits), router, ids, weights, tokens),
        ROWS=rows,
        GROUPS=group,
        MEMBERS=member,
        SLOTS=triton.next_power_of_2(top_k),
        num_warps=min(4, max(1, rows * width // WARP)),
    )
    return ids, weights


@triton.jit(do_not_specialize=["tokens"])
def _route(
    logits, router, ids, weights, tokens,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """GROUPS, MEMBERS, SLOTS: groups, experts of one and k, each up to a power of two."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = token < tokens
    column = tl.arange(0, GROUPS * MEMBERS)
    size: tl.constexpr = router.experts // router.groups
    expert = column // MEMBERS * size + column % MEMBERS
    inside = (column // MEMBERS < router.groups) & (column % MEMBERS < size)
    at = logits.at + token * logits.row
    x = tl.load(
        at[:, None] + expert[None, :] * logits.col, mask=there[:, None] & inside[None, :], other=float("-inf")
    ).to(tl.float32)  # fmt: skip
    top, total = _norm(x)
    choice = x
    if router.order == "score_first" and router.biased != "logits":
        choice = _score(x, top, total, router)
    if router.bias is not None:
        choice += tl.load(router.bias + expert, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = (router.experts - 1 - expert) * 2
    rank = tl.where(inside[None, :], _rank(choice, place[None, :]), LEAST)
    if router.groups > 1:
        kept = _kept(rank, router, GROUPS, MEMBERS)
        choice = tl.where(kept, choice, router.fill)
        rank = tl.where(inside[None, :], _rank(choice, place[None, :] + kept.to(tl.int32)), LEAST)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((ROWS, SLOTS), tl.int64)
    for i in range(router.top_k):
        best = tl.max(rank, 1)
        chosen = tl.where((slot == i)[None, :], best[:, None], chosen)
        rank = tl.where(rank == best[:, None], LEAST, rank)
    chosen = chosen.to(tl.int32)  # places alone
    found = router.experts - 1 - (chosen >> 1)
    wanted = there[:, None] & (slot < router.top_k)[None, :]
    out = token[:, None] * router.top_k + slot[None, :]
    tl.store(ids + out, found.to(tl.int64), mask=wanted)
    picked = tl.load(at[:, None] + found * logits.col, mask=wanted, other=float("-inf")).to(tl.float32)
    if router.order == "topk_first":
        top, total = _norm(picked)
    w = _score(picked, top, total, router)
    if router.groups > 1 and router.weights_from == "masked":
        w = tl.where(chosen % 2 == 1, w, router.fill)
    if router.renormalise:
        whole = tl.sum(tl.where(wanted, w, 0.0), 1)
        if router.eps_form == "clamp":
            whole = tl.where(whole < router.eps, router.eps, whole)  # NaN stays NaN
        else:
            whole += router.eps
        w = tl.div_rn(w, tl.broadcast_to(whole[:, None], (ROWS, SLOTS)))
    w *= router.scale
    if router.expert_scale is not None:
        w *= tl.load(router.expert_scale + found, mask=wanted, other=0.0).to(tl.float32)
    tl.store(weights + out, w.to(weights.dtype.element_ty), mask=wanted)


@triton.jit
def _kept(rank, router, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    """bool, of the shape of the ranks: the expert's group is one of the best."""
    members = tl.reshape(rank, (rank.shape[0], GROUPS, MEMBERS))
    best = tl.max(members, 2)
    worth = _value(best)
    if router.group_score == "top2_sum":
        worth += _value(tl.max(tl.where(members == best[:, :, None], LEAST, members), 2))
    group = tl.arange(0, GROUPS)
    left = tl.where((group < router.groups)[None, :], _rank(worth, (GROUPS - 1 - group)[None, :]), LEAST)
    kept = tl.zeros(left.shape, tl.int1)
    for _ in range(router.topk_groups):
        found = left == tl.max(left, 1)[:, None]
        kept = kept | found
        left = tl.where(found, LEAST, left)
    return tl.reshape(tl.broadcast_to(kept[:, :, None], members.shape), rank.shape)


@triton.jit
def _rank(value, place):
    """int64: by value, NaN first and -0 as 0, then by place, the larger one first; places are at least 0."""
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    key = tl.where(value == value, key, 0x7FFFFFFF)
    return (key.to(tl.int64) << 32) | place.to(tl.int64)


@triton.jit
def _value(rank):
    """The value of a rank."""
    key = (rank >> 32).to(tl.int32)
    return tl.where(key < 0, -key | -2147483648, key).to(tl.float32, bitcast=True)


@triton.jit
def _norm(x):
    """(maximum, sum of exp(x - maximum)) of each row; -inf stands where there is nothing."""
    top = tl.max(x, 1)
    return top, tl.sum(_exp(x - top[:, None]), 1)


@triton.jit
def _score(x, top, total, router):
    """The score function on logits of rows with that norm, which softmax alone reads."""
    if router.score == "softmax":
        return tl.div_rn(_exp(x - top[:, None]), tl.broadcast_to(total[:, None], x.shape))
    elif router.score == "sigmoid":
        e = _exp(-tl.abs(x))
        return tl.div_rn(tl.where(x < 0, e, 1.0), 1 + e)
    else:
        tl.static_assert(router.score == "sqrtsoftplus")
        return tl.sqrt_rn(tl.maximum(x, 0) + _log1p(_exp(-tl.abs(x))))


@triton.jit
def _exp(x):
    """exp(x) for x <= 0, within one unit in the last place: 2^n times the series of what is left, |r| < 0.35."""
    x = tl.where(x < -104, -104.0, x)  # 0 in float32; NaN stays NaN
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, -0.693145751953125, x)  # log 2 in two parts, of which n times the first is exact
    r = tl.fma(n, -1.4286068203094172e-6, r)
    series = 1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040))))))
    n = n.to(tl.int32)
    half = n >> 1  # 2^n itself may be too small for the bits of a float
    return (1 + r * series) * _power(half) * _power(n - half)


@triton.jit
def _power(n):
    """2^n."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _log1p(a):
    """log(1 + a) for 0 <= a <= 1: 2 artanh(z) with z = a / (2 + a) <= 1/3, by its series."""
    z = tl.div_rn(a, 2 + a)
    s = z * z
    series = 1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15 + s * (1 / 17)))))
    return 2 * z * (1 + s * (1 / 3 + s * (1 / 5 + s * series)))
