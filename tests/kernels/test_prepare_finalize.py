"""Prepare/finalize of one rank: what experts get and what comes back, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_fx import quant
from moe_fx.kernels.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig, FusedMoEQuantDesc
from moe_fx.kernels.modular_kernel import (
    FusedMoEActivationFormat,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
)
from moe_fx.kernels.prepare_finalize import (
    BatchedPrepareAndFinalize,
    MonolithicPrepareAndFinalizeNoEP,
    PrepareAndFinalizeNoEP,
)
from moe_fx.kernels.weight_and_reduce import TopKWeightAndReduceDelegate, TopKWeightAndReduceNoOP
from moe_fx.quant import QuantKey
from moe_fx.reasons import MoEFxRuntimeError, MoEFxUnsupportedError
from tests.reference.number_formats import NAMED, by_hand, codes_of

T, K, H, EL = 7, 3, 32, 4
PLAIN = FUSED_MOE_UNQUANTIZED_CONFIG
STATIC = {"FP8_TENSOR", "INT8_TENSOR"}  # of activations; other static keys are of weights
ACTIVATIONS = [n for n, key in NAMED.items() if not key.static or n in STATIC]


def tokens(count: int = T, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(0)).to(dtype)


def routing(count: int = T, ids: torch.dtype = torch.int64, experts: int = EL) -> tuple[Tensor, Tensor]:
    """(weights, ids): ids outside [0, E), one token twice to one expert."""
    draw = torch.Generator().manual_seed(1)
    found = torch.randint(0, experts, (count, K), generator=draw)
    if count > 2:
        found[0, 0], found[1, 2], found[2, 0] = -1, experts, found[2, 2]
    return torch.rand(count, K, generator=draw), found.to(ids)


def config(key: QuantKey, scale: Tensor | None = None, whole: Tensor | None = None) -> FusedMoEQuantConfig:
    desc = FusedMoEQuantDesc.of(key, scale, whole=whole)
    return FusedMoEQuantConfig(desc, desc)


def prepared(pf: Any, x: Tensor, weights: Tensor, ids: Tensor, **changes: Any) -> Any:
    given = dict(expert_map=None, apply_router_weight_on_input=False, quant_config=PLAIN) | changes
    return pf.prepare(x, weights, ids, EL, **given)


# --- what they are


def test_kinds() -> None:
    standard, batched, whole = PrepareAndFinalizeNoEP(), BatchedPrepareAndFinalize(8, EL, 2), None
    whole = MonolithicPrepareAndFinalizeNoEP()
    assert isinstance(standard, FusedMoEPrepareAndFinalizeModular)
    assert isinstance(batched, FusedMoEPrepareAndFinalizeModular)
    assert isinstance(whole, FusedMoEPrepareAndFinalizeMonolithic)
    formats = FusedMoEActivationFormat
    assert [p.activation_format for p in (standard, batched, whole)] == [
        formats.Standard,
        formats.BatchedExperts,
        formats.Standard,
    ]
    assert [p.max_num_tokens_per_rank() for p in (standard, batched, whole)] == [None, 8, None]
    assert [p.num_dispatchers() for p in (standard, batched, whole)] == [1, 2, 1]
    for p in (standard, batched, whole):
        assert p.topk_indices_dtype() is None
        assert not p.output_is_reduced()
        assert not p.supports_async()


@pytest.mark.parametrize("pf", [PrepareAndFinalizeNoEP(), BatchedPrepareAndFinalize(None, EL)], ids=["list", "batched"])
def test_without_async_the_two_steps_are_refused(pf: FusedMoEPrepareAndFinalizeModular) -> None:
    weights, ids = routing()
    with pytest.raises(MoEFxUnsupportedError, match="supports_async"):
        pf.prepare_async(tokens(), weights, ids, EL, None, False, PLAIN)
    with pytest.raises(MoEFxUnsupportedError, match="supports_async"):
        pf.finalize_async(tokens(), tokens(), weights, ids, False, TopKWeightAndReduceNoOP())


# --- a list of tokens


def test_standard_leaves_tokens_where_they_are() -> None:
    x, (weights, ids) = tokens(), routing()
    a1q, scale, meta, new_ids, new_weights = prepared(PrepareAndFinalizeNoEP(), x, weights, ids)
    assert a1q is x
    assert (scale, meta, new_ids, new_weights) == (None, None, None, None)


def test_standard_resolves_a_delegate() -> None:
    weights, ids = routing()
    rows = torch.randn(T, K, H, generator=torch.Generator().manual_seed(2))
    output = torch.empty(T, H)
    PrepareAndFinalizeNoEP().finalize(output, rows, weights, ids, False, TopKWeightAndReduceDelegate())
    expected = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            expected[t] += rows[t, k].double() * float(weights[t, k])
    torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=1e-6)


def test_monolithic_passes_logits_on() -> None:
    x, logits = tokens(), torch.randn(T, EL)
    pf = MonolithicPrepareAndFinalizeNoEP()
    a1q, scale, found = pf.prepare(x, logits, PLAIN)
    assert a1q is x
    assert scale is None
    assert found is logits
    assert pf.finalize(x) is x


# --- quantised tokens


def given_scale(name: str) -> Tensor | None:
    return torch.tensor([0.02]) if name in STATIC else None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_standard_quantises(name: str) -> None:
    """Codes and scales by hand, and the shape that the configuration announces."""
    key, x, (weights, ids) = NAMED[name], tokens(), routing()
    chosen = config(key, given_scale(name))
    a1q, scale, *_ = prepared(PrepareAndFinalizeNoEP(), x, weights, ids, quant_config=chosen)
    hand = by_hand(x.double().numpy(), key, 0.02 if name in STATIC else None)
    assert tuple(scale.shape) == chosen.scale_shape(T, H)
    found = codes_of(quant_of(key, a1q, scale))
    assert (found == hand.codes).all()
    torch.testing.assert_close(scale.double().reshape(-1), torch.from_numpy(hand.scale).reshape(-1), rtol=1e-7, atol=0)
    a1m, scale_m, _ = MonolithicPrepareAndFinalizeNoEP().prepare(x, weights, chosen)
    assert torch.equal(a1m.view(torch.uint8), a1q.view(torch.uint8))
    assert torch.equal(scale_m.view(torch.uint8), scale.view(torch.uint8))


def quant_of(key: QuantKey, codes: Tensor, scale: Tensor) -> Any:
    from moe_fx.binding import Quantised

    return Quantised(key, codes, scale)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_experts_that_quantise_get_tokens_as_they_are(name: str) -> None:
    x, (weights, ids) = tokens(), routing()
    chosen = config(NAMED[name], given_scale(name))
    for pf in (PrepareAndFinalizeNoEP(), BatchedPrepareAndFinalize(None, EL)):
        a1q, scale, *_ = prepared(pf, x, weights, ids, quant_config=chosen, defer_input_quant=True)
        plain, *_ = prepared(pf, x, weights, ids)
        assert scale is None
        assert torch.equal(a1q, plain)


def test_a_global_scale_that_is_given() -> None:
    x, (weights, ids) = tokens(), routing()
    chosen = config(quant.NVFP4_DYNAMIC, whole=torch.tensor([0.01]))
    a1q, scale, *_ = prepared(PrepareAndFinalizeNoEP(), x, weights, ids, quant_config=chosen)
    hand = by_hand(x.double().numpy(), quant.NVFP4_DYNAMIC, None, float(torch.tensor(0.01)))
    assert (codes_of(quant_of(quant.NVFP4_DYNAMIC, a1q, scale)) == hand.codes).all()


@pytest.mark.parametrize("count", [0, 1, T])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_batches_quantise_as_lists_do(name: str, count: int) -> None:
    """A token has the codes and scales that it has in a list, in the announced shapes."""
    key, x, (weights, ids) = NAMED[name], tokens(count), routing(count)
    chosen = config(key, given_scale(name))
    a1q, scale, meta, new_ids, _ = prepared(BatchedPrepareAndFinalize(None, EL), x, weights, ids, quant_config=chosen)
    assert tuple(scale.shape) == chosen.batched_scale_shape(EL, count, H)
    assert a1q.shape[:2] == (EL, count)
    own, own_scale, *_ = prepared(PrepareAndFinalizeNoEP(), x, weights, ids, quant_config=chosen)
    used = [0] * EL
    for t in range(count):
        for e in {int(e): None for e in new_ids[t] if 0 <= e < EL}:
            assert torch.equal(a1q[e, used[e]].view(torch.uint8), own[t].view(torch.uint8))
            row = used[e] if scale.shape[1] > 1 else 0
            at = t if own_scale.shape[0] > 1 else 0
            assert torch.equal(scale[e, row].view(torch.uint8), own_scale[at].view(torch.uint8))
            used[e] += 1
    assert meta.expert_num_tokens.tolist() == used


# --- batches


def by_tokens(x: Tensor, weights: Tensor, ids: Tensor, rank: int = 0) -> list[list[tuple[int, float]]]:
    """Of each local expert its (token, weight), in order of the first slot that names it; again: the weights' sum."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(EL)]
    for t in range(len(x)):
        for k in range(K):
            e = int(ids[t, k]) - rank * EL
            if 0 <= e < EL:
                before = [i for i, (token, _) in enumerate(found[e]) if token == t]
                if before:
                    found[e][before[0]] = (t, found[e][before[0]][1] + float(weights[t, k]))
                else:
                    found[e].append((t, float(weights[t, k])))
    return found


@pytest.mark.parametrize("most", [None, T, T + 3])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches(dtype: torch.dtype, ids_dtype: torch.dtype, rank: int, most: int | None) -> None:
    x = tokens(dtype=dtype)
    weights, ids = routing(ids=ids_dtype, experts=EL * 3)
    before = [t.clone() for t in (x, weights, ids)]
    pf = BatchedPrepareAndFinalize(most, EL, rank=rank)
    a1q, scale, meta, new_ids, new_weights = prepared(pf, x, weights, ids)
    expected = by_tokens(x, weights, ids, rank)
    assert sum(map(len, expected)) > 2
    assert a1q.shape == (EL, most or T, H)
    assert a1q.dtype == dtype
    assert scale is None
    assert meta.expert_num_tokens.dtype == torch.int32
    assert meta.expert_num_tokens.tolist() == [len(rows) for rows in expected]
    assert meta.expert_num_tokens_cpu.tolist() == [len(rows) for rows in expected]
    for e, rows in enumerate(expected):
        for r, (t, _) in enumerate(rows):
            assert torch.equal(a1q[e, r], x[t])
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weights, ids), strict=True)), "an input was written to"

    fused = torch.full_like(a1q, float("nan"))  # rows after a count are garbage
    y = torch.zeros(T, H, dtype=torch.float64)
    for e, rows in enumerate(expected):
        for r, (t, w) in enumerate(rows):
            fused[e, r] = (e + 1) * x[t]
            y[t] += w * fused[e, r].double()
    output = torch.full_like(x, float("nan"))
    pf.finalize(output, fused, new_weights, new_ids, False, TopKWeightAndReduceDelegate())
    torch.testing.assert_close(output.double(), y, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_duplicates_have_one_row() -> None:
    """A token that names one expert k times has one row with the sum of the weights: no expert overflows."""
    x, weights = tokens(3), torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.25, 0.125], [1.0, 2.0, 4.0]])
    ids = torch.tensor([[1, 1, 1], [2, 0, 2], [-1, 3, -1]])
    a1q, _, meta, new_ids, new_weights = prepared(BatchedPrepareAndFinalize(3, EL), x, weights, ids)
    assert new_ids.tolist() == [[1, -1, -1], [2, 0, -1], [-1, 3, -1]]
    assert meta.expert_num_tokens.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(new_weights[0, 0], torch.tensor(0.6))
    torch.testing.assert_close(new_weights[1, :2], torch.tensor([0.625, 0.25]))
    assert [int(torch.where((x == a1q[e, 0]).all(1))[0]) for e in range(EL)] == [1, 0, 1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_expert_map(rank: int) -> None:
    """Global ids in any order to local experts; ids outside the map, and those mapped to -1, are nobody's."""
    x = tokens()
    weights, ids = routing(experts=9)
    table = torch.tensor([-1, 2, -1, 0, 3, -1, 1, -1], dtype=torch.int32)  # id 8 is outside
    pf = BatchedPrepareAndFinalize(None, EL, rank=rank)
    a1q, _, meta, new_ids, _ = pf.prepare(x, weights, ids, 8, table, False, PLAIN)
    local = torch.tensor([[int(table[i]) if 0 <= i < 8 else -1 for i in row] for row in ids.tolist()])
    expected = by_tokens(x, weights, local)
    assert meta.expert_num_tokens.tolist() == [len(rows) for rows in expected]
    for e, rows in enumerate(expected):
        for r, (t, _) in enumerate(rows):
            assert torch.equal(a1q[e, r], x[t])
    assert set(new_ids.unique().tolist()) <= {-1, *range(rank * EL, (rank + 1) * EL)}


def test_more_tokens_than_rows_is_an_error_that_says_what_to_do() -> None:
    weights, ids = routing()
    with pytest.raises(MoEFxRuntimeError, match=f"{T} tokens for batches of at most {T - 1}: raise max_num_tokens"):
        prepared(BatchedPrepareAndFinalize(T - 1, EL), tokens(), weights, ids)


@pytest.mark.parametrize("most", [None, 5])
def test_no_tokens(most: int | None) -> None:
    weights, ids = routing(0)
    pf = BatchedPrepareAndFinalize(most, EL)
    a1q, scale, meta, new_ids, new_weights = prepared(pf, tokens(0), weights, ids)
    assert a1q.shape == (EL, most or 0, H)
    assert scale is None
    assert meta.expert_num_tokens.tolist() == [0] * EL
    assert (new_ids.shape, new_weights.shape) == ((0, K), (0, K))
    pf.finalize(torch.empty(0, H), a1q, new_weights, new_ids, False, TopKWeightAndReduceDelegate())


# --- the routing weight on the input


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_on_input(dtype: torch.dtype) -> None:
    x, weights = tokens(dtype=dtype), torch.rand(T, 1, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(T).remainder(EL).unsqueeze(1)
    expected = x.double() * weights.double()
    for pf in (PrepareAndFinalizeNoEP(), BatchedPrepareAndFinalize(None, EL)):
        a1q, *_ = prepared(pf, x, weights, ids, apply_router_weight_on_input=True)
        rows = a1q if a1q.dim() == 2 else torch.stack([a1q[t % EL, t // EL] for t in range(T)])
        assert rows.dtype == dtype
        torch.testing.assert_close(rows.double(), expected, rtol=1.5 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(x, tokens(dtype=dtype))


@pytest.mark.parametrize("pf", [PrepareAndFinalizeNoEP(), BatchedPrepareAndFinalize(None, EL)], ids=["list", "batched"])
def test_weight_on_input_needs_one_expert_a_token(pf: FusedMoEPrepareAndFinalizeModular) -> None:
    weights, ids = routing()
    with pytest.raises(MoEFxRuntimeError, match="needs top_k = 1, got 3"):
        prepared(pf, tokens(), weights, ids, apply_router_weight_on_input=True)


def test_weighted_tokens_are_what_is_quantised() -> None:
    x, weights = tokens(), torch.full((T, 1), 0.5)
    ids = torch.zeros((T, 1), dtype=torch.int64)
    chosen = config(replace(quant.INT8_TOKEN))
    _, scale, *_ = prepared(
        PrepareAndFinalizeNoEP(), x, weights, ids, quant_config=chosen, apply_router_weight_on_input=True
    )
    _, alone, *_ = prepared(PrepareAndFinalizeNoEP(), x * 0.5, weights, ids, quant_config=chosen)
    assert torch.equal(scale, alone)
