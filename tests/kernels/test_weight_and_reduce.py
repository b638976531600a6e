"""Each TopKWeightAndReduce against a loop over tokens and slots in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_fx.kernels.weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNaiveBatched,
    TopKWeightAndReduceNoOP,
    batched_places,
)
from moe_fx.reasons import MoEFxUnsupportedError

T, K, H, EL, RANKS = 9, 3, 5, 4, 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NAN = float("nan")


def routing(dtype: torch.dtype, ids: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """(ids over all ranks and outside of them, weights); one token twice to one expert."""
    draw = torch.Generator().manual_seed(0)
    found = torch.randint(0, EL * RANKS, (T, K), generator=draw)
    found[0], found[1], found[2, 0] = -1, EL * RANKS, found[2, 1]
    return found.to(ids), torch.rand(T, K, generator=draw, dtype=torch.float64).to(dtype)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def bound(dtype: torch.dtype) -> float:
    """Sums are taken in float32 or wider, so only the result is rounded; K products and sums before."""
    wide = torch.promote_types(dtype, torch.float32)
    return torch.finfo(dtype).eps / 2 + 2 * K * torch.finfo(wide).eps


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, dtype)
    size = torch.maximum(expected.abs(), torch.tensor(1.0, dtype=torch.float64)) * K
    assert bool(((actual.double() - expected).abs() <= bound(dtype) * size).all())


def into(impl: TopKWeightAndReduce, fused: Tensor, weights: Tensor, ids: Tensor, on_input: bool) -> Tensor:
    """With and without ``output``, which may hold anything; nothing else is written."""
    before = [t.clone() for t in (fused, weights, ids)]
    alone = impl.apply(None, fused, weights, ids, on_input)
    output = torch.full_like(alone, NAN)
    assert impl.apply(output, fused, weights, ids, on_input) is output
    assert torch.equal(output, alone)
    after = (fused, weights, ids)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
    return alone


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_contiguous(flat: bool, dtype: torch.dtype, on_input: bool) -> None:
    ids, weights = routing(dtype)
    rows = normal(T, K, H, dtype=dtype)
    expected = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            expected[t] += rows[t, k].double() * (1.0 if on_input else float(weights[t, k]))
    fused = rows.flatten(0, 1) if flat else rows
    close(into(TopKWeightAndReduceContiguous(), fused, weights, ids, on_input), expected, dtype)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_naive_batched(ids_dtype: torch.dtype, dtype: torch.dtype, rank: int, on_input: bool) -> None:
    """Row r of expert e is the r-th pair, in order, that names it; rows after the last of a batch are garbage."""
    ids, weights = routing(dtype, ids_dtype)
    rows, most = normal(T, K, H, dtype=dtype), T * K
    fused = torch.full((EL, most, H), NAN, dtype=dtype)
    used, expected = [0] * EL, torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            e = int(ids[t, k]) - rank * EL
            if 0 <= e < EL:
                fused[e, used[e]] = rows[t, k]
                used[e] += 1
                expected[t] += rows[t, k].double() * (1.0 if on_input else float(weights[t, k]))
    assert sum(used) > 3
    mine = (ids >= rank * EL) & (ids < (rank + 1) * EL)
    poisoned = weights.masked_fill(~mine, NAN)
    close(into(TopKWeightAndReduceNaiveBatched(rank), fused, poisoned, ids, on_input), expected, dtype)


def test_batched_places() -> None:
    ids = torch.tensor([[4, 5, 4], [7, -1, 5], [8, 3, 6]])
    place, local = batched_places(ids, 4, 1)
    assert local.tolist() == [[0, 1, 0], [3, -1, 1], [-1, -1, 2]]
    assert place.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_no_op() -> None:
    """A result that is there already is not touched; another place gets a copy."""
    ids, weights = routing(torch.float32)
    fused, output = normal(T, H, dtype=torch.float32), torch.empty(T, H)
    impl = TopKWeightAndReduceNoOP()
    assert impl.apply(None, fused, weights, ids, False) is fused
    assert impl.apply(fused, fused, weights, ids, False) is fused
    assert impl.apply(output, fused, weights, ids, False) is output
    assert torch.equal(output, fused)
    assert output.data_ptr() != fused.data_ptr()


def test_delegate_has_to_be_resolved() -> None:
    ids, weights = routing(torch.float32)
    with pytest.raises(MoEFxUnsupportedError, match="prepare/finalize, which has to choose one"):
        TopKWeightAndReduceDelegate().apply(None, normal(T, H, dtype=torch.float32), weights, ids, False)


EMPTY: dict[str, tuple[TopKWeightAndReduce, Callable[[], Tensor]]] = {
    "no op": (TopKWeightAndReduceNoOP(), lambda: torch.empty(0, H)),
    "contiguous": (TopKWeightAndReduceContiguous(), lambda: torch.empty(0, K, H)),
    "batched": (TopKWeightAndReduceNaiveBatched(), lambda: torch.empty(EL, 0, H)),
    "batched, empty batches": (TopKWeightAndReduceNaiveBatched(), lambda: torch.full((EL, 6, H), NAN)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_no_tokens(name: str) -> None:
    impl, fused = EMPTY[name]
    ids, weights = torch.empty((0, K), dtype=torch.int64), torch.empty(0, K)
    assert impl.apply(torch.empty(0, H), fused(), weights, ids, False).shape == (0, H)


def test_equal_ones_are_equal() -> None:
    """Two kernels can be asked whether they leave the same work."""
    assert TopKWeightAndReduceNaiveBatched(1) == TopKWeightAndReduceNaiveBatched(1)
    assert TopKWeightAndReduceNaiveBatched(1) != TopKWeightAndReduceNaiveBatched(0)
    assert TopKWeightAndReduceNoOP() != TopKWeightAndReduceContiguous()
