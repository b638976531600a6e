"""FusedMoEKernel: prepare, experts, finalize joined, over both formats, against a masked dense sum in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_fx.kernels.experts  # noqa: F401  registers the kernels
from moe_fx.hardware import detect
from moe_fx.kernels.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEConfig, biased_moe_quant_config
from moe_fx.kernels.libraries import LIBRARIES
from moe_fx.kernels.modular_kernel import (
    FusedMoEExperts,
    FusedMoEKernel,
    FusedMoEKernelModularImpl,
    FusedMoEKernelMonolithicImpl,
    FusedMoEPrepareAndFinalize,
)
from moe_fx.kernels.modular_kernel import workspace as buffers
from moe_fx.kernels.modular_kernel.workspace import size_of
from moe_fx.kernels.prepare_finalize import (
    BatchedPrepareAndFinalize,
    MonolithicPrepareAndFinalizeNoEP,
    PrepareAndFinalizeNoEP,
)
from moe_fx.kernels.registry import KERNELS, kernel
from moe_fx.reasons import MoEFxOptionError, MoEFxRuntimeError

from .cases import assert_as_exact

E, K, H, I, T = 6, 2, 16, 8, 13  # noqa: E741
INSTALLED = detect(torch.device("cpu")).installed
MODULAR = [
    k.name
    for k in KERNELS.values()
    if k.capability.packages <= INSTALLED and "cpu" in k.capability.devices and not k.capability.monolithic
    if k.name not in LIBRARIES  # they read packed weights
]
STANDARD = [name for name in MODULAR if not kernel(name).capability.batched]


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Layer:
    """Random weights of E experts in canonical storage, with biases; silu, gated."""

    def __init__(self, dtype: torch.dtype, experts: int = E):
        self.dtype = dtype
        self.w13, self.w2 = normal(experts, 2 * I, H, seed=1) * H**-0.5, normal(experts, H, I, seed=2) * I**-0.5
        self.b13, self.b2 = normal(experts, 2 * I, seed=3) * 0.5, normal(experts, H, seed=4) * 0.5
        for name in ("w13", "w2", "b13", "b2"):
            setattr(self, name, getattr(self, name).to(dtype))

    def experts(self, name: str, tokens: int = 64, k: int = K, **changes: Any) -> FusedMoEExperts:
        count = len(self.w2)
        config = FusedMoEConfig(count, k, H, count, in_dtype=self.dtype, has_bias=True, intermediate_size=I, **changes)
        quant, made = biased_moe_quant_config(self.b13, self.b2), kernel(name).experts
        if made.capability.batched:
            return made.make_batched_experts(config, quant, tokens, 1)
        return made.make_standard_experts(config, quant)

    def kernel(self, name: str, **changes: Any) -> FusedMoEKernel:
        experts = self.experts(name, k=changes.pop("k", K))
        return FusedMoEKernel(fitting(experts, len(self.w2)), experts, **changes)

    def dense(self, x: Tensor, ids: Tensor, weights: Tensor, on_input: bool = False) -> Tensor:
        """Every expert on every token in float64, those that a token does not name times zero."""
        x, weights, y = x.double(), weights.double(), torch.zeros(x.shape, dtype=torch.float64)
        w13, w2, b13, b2 = (t.double() for t in (self.w13, self.w2, self.b13, self.b2))
        for e in range(len(w2)):
            for k in range(ids.shape[1]):
                share = weights[:, k, None] * (ids[:, k, None] == e)
                up = (x * share if on_input else x) @ w13[e].t() + b13[e]
                out = up[:, :I] * torch.sigmoid(up[:, :I]) * up[:, I:] @ w2[e].t() + b2[e]
                y += (share != 0) * out if on_input else share * out
        return y


def fitting(experts: FusedMoEExperts, count: int = E, tokens: int | None = None) -> FusedMoEPrepareAndFinalize:
    if experts.capability.monolithic:
        return MonolithicPrepareAndFinalizeNoEP()
    return BatchedPrepareAndFinalize(tokens, count) if experts.capability.batched else PrepareAndFinalizeNoEP()


def routing(tokens: int = T, experts: int = E, k: int = K, ids: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """(ids, weights): outside [0, E), far outside, one token twice to one expert, one expert without tokens."""
    draw = torch.Generator().manual_seed(5)
    found = torch.randint(0, experts - 1, (tokens, k), generator=draw)
    if tokens > 3:
        found[0], found[1, 0], found[2, k - 1], found[3] = -1, experts, 2**31 - 1, 2
    return found.to(ids), torch.rand(tokens, k, generator=draw) + 0.1


def check(layer: Layer, y: Tensor, exact: Tensor, what: str) -> None:
    """The tolerance rule; the usual is the formula in the dtype of the layer's tensors."""
    usual = exact.to(layer.dtype)
    assert_as_exact(y, usual, exact, 3 * torch.finfo(layer.dtype).eps, what)  # three products in that dtype


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name == "torch_grouped" else torch.float32


def result(y: object) -> Tensor:
    assert isinstance(y, Tensor)
    return y


# --- one result, whatever the kernel and the format


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, T])
@pytest.mark.parametrize("name", MODULAR)
def test_kernel_is_the_dense_sum(name: str, tokens: int, ids_dtype: torch.dtype) -> None:
    layer, x = Layer(dtype_of(name)), normal(tokens, H, seed=7, dtype=dtype_of(name))
    ids, weights = routing(tokens, ids=ids_dtype)
    y = result(layer.kernel(name).apply(x, layer.w13, layer.w2, ids, weights, "silu"))
    check(layer, y, layer.dense(x, ids, weights), name)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", MODULAR)
def test_an_expert_map(name: str, ids_dtype: torch.dtype) -> None:
    """Ids of all ranks; experts that are elsewhere, and ids outside the map, add nothing."""
    layer, everyone = Layer(dtype_of(name)), 2 * E + 1
    places = torch.randperm(everyone, generator=torch.Generator().manual_seed(8))[:E]
    table = torch.full((everyone,), -1, dtype=torch.int32)
    table[places] = torch.arange(E, dtype=torch.int32)
    x, (ids, weights) = normal(T, H, seed=7, dtype=layer.dtype), routing(experts=everyone, ids=ids_dtype)
    y = layer.kernel(name).apply(
        x, layer.w13, layer.w2, ids, weights, "silu", global_num_experts=everyone, expert_map=table
    )
    local = torch.tensor([[int(table[i]) if 0 <= i < everyone else -1 for i in row] for row in ids.tolist()])
    assert int((local >= 0).sum()) not in (0, local.numel())
    check(layer, result(y), layer.dense(x, local, weights), name)


@pytest.mark.parametrize("name", MODULAR)
def test_weight_on_input(name: str) -> None:
    layer, x = Layer(dtype_of(name)), normal(T, H, seed=7, dtype=dtype_of(name))
    ids, weights = routing(k=1)
    y = layer.kernel(name, k=1).apply(x, layer.w13, layer.w2, ids, weights, "silu", apply_router_weight_on_input=True)
    check(layer, result(y), layer.dense(x, ids, weights, on_input=True), name)
    pair = routing()
    with pytest.raises(MoEFxRuntimeError, match="needs top_k = 1, got 2"):
        layer.kernel(name).apply(x, layer.w13, layer.w2, *pair, "silu", apply_router_weight_on_input=True)


@pytest.mark.parametrize("name", MODULAR)
def test_another_activation_than_the_configured(name: str) -> None:
    layer, x = Layer(dtype_of(name)), normal(T, H, seed=7, dtype=dtype_of(name))
    ids, weights = routing()
    chosen = layer.kernel(name)
    silu, gelu = (result(chosen.apply(x, layer.w13, layer.w2, ids, weights, a)) for a in ("silu", "gelu"))
    assert not torch.equal(silu, gelu)
    with pytest.raises(MoEFxOptionError, match="'sliu' is not one of silu"):
        chosen.apply(x, layer.w13, layer.w2, ids, weights, "sliu")


# --- who fits to whom


def test_members_of_different_formats_do_not_fit() -> None:
    layer = Layer(torch.float32)
    with pytest.raises(MoEFxOptionError, match=r"PrepareAndFinalizeNoEP hands over standard tokens.*batched_experts"):
        FusedMoEKernel(PrepareAndFinalizeNoEP(), layer.experts("batched_loop"))
    with pytest.raises(MoEFxOptionError, match=r"hands over batched_experts tokens.*takes standard ones"):
        FusedMoEKernel(BatchedPrepareAndFinalize(None, E), layer.experts("sorted_loop"))


def test_modular_and_monolithic_do_not_fit() -> None:
    layer = Layer(torch.float32)
    with pytest.raises(MoEFxOptionError, match="do not fit together"):
        FusedMoEKernel(PrepareAndFinalizeNoEP(), layer.experts("routed_loop"))
    with pytest.raises(MoEFxOptionError, match="do not fit together"):
        FusedMoEKernel(MonolithicPrepareAndFinalizeNoEP(), layer.experts("sorted_loop"))


def test_each_kind_has_its_call() -> None:
    layer, x = Layer(torch.float32), normal(T, H, dtype=torch.float32)
    ids, weights = routing()
    modular, whole = layer.kernel("sorted_loop"), layer.kernel("routed_loop")
    assert isinstance(modular.impl, FusedMoEKernelModularImpl)
    assert isinstance(whole.impl, FusedMoEKernelMonolithicImpl)
    with pytest.raises(MoEFxRuntimeError, match="call apply"):
        modular.apply_monolithic(x, layer.w13, layer.w2, weights, "silu")
    with pytest.raises(MoEFxRuntimeError, match="call apply_monolithic"):
        whole.apply(x, layer.w13, layer.w2, ids, weights, "silu")


def test_a_monolithic_kernel_refuses_shared_experts() -> None:
    """It would drop them in silence."""
    with pytest.raises(MoEFxOptionError, match="shared experts"):
        Layer(torch.float32).kernel("routed_loop", shared_experts=torch.neg)


def test_setup_is_called_once_with_the_experts() -> None:
    seen: list[object] = []

    class Watching(PrepareAndFinalizeNoEP):
        def post_init_setup(self, experts: FusedMoEExperts) -> None:
            seen.append(experts)

    experts = Layer(torch.float32).experts("sorted_loop")
    FusedMoEKernel(Watching(), experts)
    assert seen == [experts]


# --- chunks


class Recorder:
    """Wraps ``apply`` of experts: the first row and the number of rows of every call."""

    def __init__(self, experts: Any):
        self.rows: list[int] = []
        inner = experts.apply

        def apply(**given: Any) -> None:
            self.rows.append(given["hidden_states"].shape[-2])
            inner(**given)

        experts.apply = apply


def exact_layer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x, w13, w2, ids, weights) of small whole numbers: every sum is exact in every dtype, in any order."""
    draw = torch.Generator().manual_seed(9)

    def few(*shape: int, high: int = 1) -> Tensor:
        signs = torch.randint(-1, 2, shape, generator=draw)
        return (signs * torch.randint(0, 2, shape, generator=draw) * high).to(dtype)

    ids, _ = routing(40)
    return few(40, 8), few(E, 8, 8), few(E, 8, 8), ids, torch.randint(1, 3, ids.shape, generator=draw).to(dtype)


def exact_kernel(name: str, dtype: torch.dtype, room: int) -> tuple[FusedMoEKernel, Recorder]:
    config = FusedMoEConfig(E, K, 8, E, in_dtype=dtype, activation="relu_no_mul", intermediate_size=8)
    experts = kernel(name).experts.make_standard_experts(config, FUSED_MOE_UNQUANTIZED_CONFIG)
    return FusedMoEKernel(PrepareAndFinalizeNoEP(), experts, workspace_bytes=room), Recorder(experts)


def most_tokens(chosen: FusedMoEKernel, room: int, sizes: tuple[int, int], activation: str, dtype: torch.dtype) -> int:
    """Of a chunk that takes at most ``room`` bytes; sizes: N, K."""

    def cost(rows: int) -> int:
        shapes = chosen.experts.workspace_shapes(rows, *sizes, K, E, E, None, activation)[:2]
        return size_of([*shapes, *chosen.experts.temporary_shapes(rows, *sizes, K, activation)], dtype)

    return max((n for n in range(1, 1001) if cost(n) <= room), default=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STANDARD)
def test_chunked_is_unchunked_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """Where sums are exact.  Elsewhere a GEMM over fewer rows may add in another order."""
    if str(dtype).removeprefix("torch.") not in kernel(name).capability.dtypes:
        pytest.skip("not a dtype of this kernel")
    given = exact_layer(dtype)
    whole, once = exact_kernel(name, dtype, 1 << 30)
    expected = result(whole.apply(*given, "relu_no_mul"))
    assert once.rows == [40]
    assert expected.abs().sum() > 100
    sizes = []
    for room in (1, 1500, 2100, 2600, 4000, 6000, 9000):
        chunked, calls = exact_kernel(name, dtype, room)
        assert torch.equal(result(chunked.apply(*given, "relu_no_mul")), expected)
        most = most_tokens(whole, room, (8, 8), "relu_no_mul", dtype)
        assert (len(calls.rows), sum(calls.rows)) == (-(-40 // most), 40)
        assert calls.rows[:-1] == [calls.rows[0]] * (len(calls.rows) - 1)
        assert 0 < calls.rows[-1] <= calls.rows[0] <= most
        sizes.append(calls.rows[0])
    assert sizes[0] == 1
    assert len(set(sizes)) > 3


@pytest.mark.parametrize("name", STANDARD)
def test_chunked_stays_in_the_tolerance(name: str) -> None:
    layer, x = Layer(dtype_of(name)), normal(T, H, seed=7, dtype=dtype_of(name))
    ids, weights = routing()
    exact = layer.dense(x, ids, weights)
    for room in (1, 4096):
        y = layer.kernel(name, workspace_bytes=room).apply(x, layer.w13, layer.w2, ids, weights, "silu")
        check(layer, result(y), exact, f"{name} in {room} bytes")


@pytest.mark.parametrize("room", [1, 5000, 12345, 10**6, 1 << 40])
@pytest.mark.parametrize("tokens", [1, 2, 3, 40, 1000])
@pytest.mark.parametrize("name", STANDARD)
def test_chunk_info(name: str, tokens: int, room: int) -> None:
    """As few chunks as the room allows, of sizes that differ by less than one chunk; a token more would not fit."""
    layer = Layer(dtype_of(name))
    chosen = layer.kernel(name, workspace_bytes=room)
    impl = chosen.impl
    assert isinstance(impl, FusedMoEKernelModularImpl)
    best = min(tokens, most_tokens(chosen, room, (2 * I, H), "silu", layer.dtype))
    count, size = impl._chunk_info(tokens, (E, 2 * I, H, K), E, None, "silu", layer.dtype)
    assert (count - 1) * size < tokens <= count * size
    assert size <= best
    assert count == -(-tokens // best)
    assert impl._chunk_info(0, (E, 2 * I, H, K), E, None, "silu", layer.dtype) == (0, 0)


def test_batches_are_not_chunked() -> None:
    layer, x = Layer(torch.float32), normal(T, H, dtype=torch.float32)
    chosen = layer.kernel("batched_loop", workspace_bytes=1)
    calls = Recorder(chosen.experts)
    chosen.apply(x, layer.w13, layer.w2, *routing(), "silu")
    assert calls.rows == [T]


@pytest.mark.parametrize("name", MODULAR)
def test_no_tokens_no_chunk(name: str) -> None:
    layer = Layer(dtype_of(name))
    chosen = layer.kernel(name)
    calls = Recorder(chosen.experts)
    y = chosen.apply(normal(0, H, dtype=layer.dtype), layer.w13, layer.w2, *routing(0), "silu")
    assert (result(y).shape, result(y).dtype, calls.rows) == ((0, H), layer.dtype, [])


# --- what is written, and what is not


@pytest.mark.parametrize("name", MODULAR)
def test_inputs_are_not_written_and_results_stay(name: str) -> None:
    layer = Layer(dtype_of(name))
    ids, weights = routing()
    first, second = (normal(T, H, seed=s, dtype=layer.dtype) for s in (7, 8))
    given = (first, second, ids, weights, layer.w13, layer.w2, layer.b13, layer.b2)
    before = [t.clone() for t in given]
    chosen = layer.kernel(name)
    y = result(chosen.apply(first, layer.w13, layer.w2, ids, weights, "silu"))
    kept = y.clone()
    z = result(chosen.apply(second, layer.w13, layer.w2, ids, weights, "silu"))
    assert not torch.equal(y, z)
    assert torch.equal(y, kept), "the second call wrote over the first result"
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True)), "an input was written to"
    held = {b.untyped_storage().data_ptr() for b in buffers._BUFFERS.by_place.values()}
    own = {t.untyped_storage().data_ptr() for t in given}
    assert not {y.untyped_storage().data_ptr(), z.untyped_storage().data_ptr()} & (held | own)


def test_tokens_of_other_ranks_do_not_lie_in_the_output() -> None:
    """As many tokens may arrive as were sent: their results still are another tensor than the output."""
    layer, x = Layer(torch.float32), normal(T, H, seed=7, dtype=torch.float32)
    ids, weights = routing()

    class Travelling(PrepareAndFinalizeNoEP):
        def num_dispatchers(self) -> int:
            return 2

        def prepare(self, a1: Tensor, topk_weights: Tensor, topk_ids: Tensor, *rest: Any) -> Any:
            return a1.flip(0), None, None, topk_ids.flip(0), topk_weights.flip(0)

        def finalize(self, output: Tensor, fused_expert_output: Tensor, *rest: Any) -> None:
            output.zero_()
            output.index_add_(0, torch.arange(T).flip(0), fused_expert_output)

    y = FusedMoEKernel(Travelling(), layer.experts("sorted_loop")).apply(x, layer.w13, layer.w2, ids, weights, "silu")
    check(layer, result(y), layer.dense(x, ids, weights), "two dispatchers")


def test_more_tokens_than_a_batch_has_rows() -> None:
    layer, x = Layer(torch.float32), normal(T, H, dtype=torch.float32)
    experts = layer.experts("batched_loop", tokens=T - 1)
    chosen = FusedMoEKernel(fitting(experts, tokens=T - 1), experts)
    with pytest.raises(MoEFxRuntimeError, match="raise max_num_tokens"):
        chosen.apply(x, layer.w13, layer.w2, *routing(), "silu")
