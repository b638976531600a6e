"""Adapters to libraries that cannot run here: their calls mean what the libraries' authors say.

In the place of the library's function stands its documented meaning, on the host, from tensors packed for the library:
the result must be the block's.  This does not show that a kernel runs: none does, here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moe_fx.kernels.experts
import moe_fx.kernels.libraries  # noqa: F401  both register kernels
from moe_fx.binding import Quantised
from moe_fx.kernels.build import build
from moe_fx.kernels.layouts.packed import find_packed
from moe_fx.kernels.libraries import (
    flashinfer_cutlass,
    flashinfer_trtllm,
    rocm_aiter,
    triton_kernels,
)
from moe_fx.kernels.registry import kernel
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_GROUP,
    FP8_TENSOR,
    MXFP4,
    QuantKey,
)
from moe_fx.reference.quantise import dequantise, quantise
from moe_fx.spec import RouterSpec

from .library_cases import Block, Shape, check, make, truth
from .library_signatures import (
    BASE,
    FP8_BLOCKS,
    FP8_TENSORS,
    E,
    H,
    I,
    K,
    T,
    bound,
    held,
    outside,
    quant,
)


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- the libraries' functions, by what their documents say, on the host


def float_of(key: QuantKey, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Tensor:
    """[…, out, in] of what codes and scales stand for, in float32."""
    return dequantise(Quantised(key, codes, scale, None, whole), torch.float32)


def activated(gate: Tensor, up: Tensor, params: tuple[Any, Any, Any] = (None, None, None), kind: int = 3) -> Tensor:
    alpha, beta, limit = params
    if kind == 8:
        return F.gelu(gate, approximate="tanh") * up
    if alpha is None:
        return F.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def experts_sum(
    x: Tensor, ids: Tensor, weights: Tensor, one: Callable[[Tensor, int], Tensor], dtype: torch.dtype
) -> Tensor:
    """Σ_k w[t, k] · one(x[t], id[t, k])."""
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert ids.is_contiguous() and weights.is_contiguous()
    out = torch.zeros(len(ids), H)
    for t, row in enumerate(ids.tolist()):
        for slot, e in enumerate(row):
            assert 0 <= e < E, "a library would read past its weights"
            out[t] += weights[t, slot] * one(x[t : t + 1].float(), e)[0]
    return out.to(dtype)


def cutlass_fused_moe(name: str, key: QuantKey | None) -> Callable[..., Tensor]:
    """w1 [E, 2I, H], up rows first; float8 of one scale: four scales; of blocks: two, and it rounds its inputs."""

    def function(**kwargs: Any) -> Tensor:
        a = bound(name, **kwargs)
        w1, w2, scales = a["fc1_expert_weights"], a["fc2_expert_weights"], a["quant_scales"]
        b1, b2 = a["fc1_expert_biases"], a["fc2_expert_biases"]
        blocks = a["use_deepseek_fp8_block_scale"]
        if blocks:
            w1, w2 = float_of(FP8_BLOCK, w1, scales[0]), float_of(FP8_BLOCK, w2, scales[1])
        g1, to2, g2, a1 = scales if key == FP8_TENSOR else (torch.ones(E), torch.ones(()), torch.ones(E), None)
        if a1 is not None:
            assert a["input"].dtype == torch.float8_e4m3fn
            assert a["input_sf"] is None

        def rounded(rows: Tensor) -> Tensor:
            return dequantise(quantise(rows, FP8_GROUP), torch.float32) if blocks else rows

        def one(row: Tensor, e: int) -> Tensor:
            up, gate = (rounded(row) @ w1[e].float().t() * g1[e]).chunk(2, -1)
            if b1 is not None:
                first, second = b1[e].float().chunk(2)
                up, gate = up + first, gate + second
            swiglu = [None if v is None else v[e] for v in (a["swiglu_alpha"], a["swiglu_beta"], a["swiglu_limit"])]
            hidden = rounded(activated(gate, up, tuple(swiglu), int(a["activation_type"])))  # type: ignore[arg-type]
            if key == FP8_TENSOR:
                hidden = (hidden * to2).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            return hidden @ w2[e].float().t() * g2[e] + (0 if b2 is None else b2[e].float())

        ids, weights = a["token_selected_experts"], a["token_final_scales"]
        a["output"].copy_(experts_sum(a["input"], ids, weights, one, a["output_dtype"]))
        return a["output"]

    return function


def attributes(**functions: Any) -> Callable[[str, str], Any]:
    """In the place of ``adapter.attribute``."""
    return lambda module, name: functions[name]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("flashinfer_cutlass", BASE),
        ("flashinfer_cutlass", replace(BASE, order="interleaved", form="list")),
        ("flashinfer_cutlass", replace(BASE, act="gelu_tanh")),
        ("flashinfer_cutlass", replace(BASE, act="swiglu_oai")),
        ("flashinfer_cutlass", replace(BASE, quant=FP8_TENSORS)),
        ("flashinfer_cutlass_hopper", replace(BASE, quant=FP8_BLOCKS)),
    ],
)
def test_flashinfer_cutlass(name: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    function = cutlass_fused_moe("flashinfer.fused_moe.cutlass_fused_moe", shape.quant.key("w13"))
    monkeypatch.setattr(
        flashinfer_cutlass, "attribute", attributes(cutlass_fused_moe=function, ActivationType=lambda number: number)
    )
    check(name, outside(make(shape)))


def trtllm(block: Block, routed: bool) -> Callable[..., Tensor]:
    """Weights are shuffled in blocks of K; ids and weights come as a pair."""
    scheme = "bf16" if not block.spec.quant else "fp8_block"
    row = find_packed("flashinfer_trtllm", scheme)
    name = {
        ("bf16", True): "trtllm_bf16_routed_moe",
        ("bf16", False): "trtllm_bf16_moe",
        ("fp8_block", True): "trtllm_fp8_block_scale_routed_moe",
        ("fp8_block", False): "trtllm_fp8_block_scale_moe",
    }[scheme, routed]

    def function(**kwargs: Any) -> Tensor:
        a = bound(f"flashinfer.fused_moe.{name}", **kwargs)
        assert (a["use_shuffled_weight"], a["weight_layout"], a["num_experts"], a["top_k"]) == (True, 2, E, K)
        assert (a["intermediate_size"], a["local_expert_offset"], a["local_num_experts"]) == (I, 0, E)
        dtype = a["gemm1_weights"].dtype
        w1 = row.unpack("w13", a["gemm1_weights"], torch.empty(2 * I, H, dtype=dtype, device="meta")).float()
        w2 = row.unpack("w2", a["gemm2_weights"], torch.empty(H, I, dtype=dtype, device="meta")).float()
        x = a["hidden_states"].float()
        if scheme == "fp8_block":
            w1 = float_of(FP8_BLOCK, w1.to(dtype), a["gemm1_weights_scale"].roll(I // 128, 1))  # up first there
            w2 = float_of(FP8_BLOCK, w2.to(dtype), a["gemm2_weights_scale"])
            assert a["fp8_quantization_type"] == 1
            assert a["hidden_states_scale"].shape == (H // 128, T)
            x = float_of(FP8_GROUP, a["hidden_states"], a["hidden_states_scale"].t())
        params = [None if a[n] is None else a[n][0] for n in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")]

        def one(row_: Tensor, e: int) -> Tensor:
            hidden = activated(*(row_ @ w1[e].t()).chunk(2, -1), tuple(params))  # type: ignore[arg-type]
            if scheme == "fp8_block":
                hidden = dequantise(quantise(hidden, FP8_GROUP), torch.float32)
            return hidden @ w2[e].t()

        if routed:
            ids, weights = a["topk_ids"]
        else:  # softmax, top-k, renormalised
            assert a["routing_method_type"] == 4
            values, found = a["routing_logits"].float().softmax(-1).topk(K)
            ids, weights = found.int(), values / values.sum(-1, keepdim=True)
        return experts_sum(x, ids, weights.contiguous(), one, torch.bfloat16)

    return function


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
def test_flashinfer_trtllm(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = outside(make(BASE if scheme == "bf16" else replace(BASE, quant=FP8_BLOCKS)))
    monkeypatch.setattr(flashinfer_trtllm, "attribute", lambda module, name: trtllm(block, True))
    check("flashinfer_trtllm" + "_fp8" * (scheme == "fp8_block"), block)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
def test_flashinfer_trtllm_with_its_router(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make(BASE if scheme == "bf16" else replace(BASE, quant=FP8_BLOCKS))
    block.spec = replace(block.spec, router=RouterSpec(renormalise=True))
    monkeypatch.setattr(flashinfer_trtllm, "attribute", lambda module, name: trtllm(block, False))
    name = "flashinfer_trtllm" + "_fp8" * (scheme == "fp8_block") + "_monolithic"
    packed, logits = held(name, block), torch.randn(T, E, generator=torch.Generator().manual_seed(1))
    made = build(kernel(name), block.spec, packed, block.x.dtype)
    y = made.apply_monolithic(block.x, packed.up, packed.down, logits, "silu")
    values, block.ids = logits.softmax(-1).topk(K)
    block.weights = values / values.sum(-1, keepdim=True)
    exact = truth(block)
    assert float((y.double() - exact).norm() / exact.norm()) < (5e-2 if scheme == "fp8_block" else 1e-2)


# --- whole blocks of other libraries


def test_aiter(monkeypatch: pytest.MonkeyPatch) -> None:
    row = find_packed("aiter", "bf16")

    def fused_moe(**kwargs: Any) -> Tensor:
        a = bound("aiter.fused_moe.fused_moe", **kwargs)
        assert (a["activation"], a["quant_type"], a["doweight_stage1"]) == ("Silu!", "No!", False)
        w1 = row.unpack("w13", a["w1"], torch.empty(2 * I, H, dtype=torch.bfloat16, device="meta")).float()
        w2 = row.unpack("w2", a["w2"], torch.empty(H, I, dtype=torch.bfloat16, device="meta")).float()

        def one(x: Tensor, e: int) -> Tensor:
            return activated(*(x @ w1[e].t()).chunk(2, -1)) @ w2[e].t()

        return experts_sum(a["hidden_states"], a["topk_ids"], a["topk_weight"], one, torch.bfloat16)

    kinds = SimpleNamespace(Silu="Silu!", No="No!")
    fakes = attributes(fused_moe=fused_moe, ActivationType=kinds, QuantType=kinds)
    monkeypatch.setattr(rocm_aiter, "attribute", fakes)
    check("aiter", outside(make(BASE)))


def test_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """matmul_ogs by its documents: rows gathered by expert, and scattered back with a sum over k."""

    def matmul_ogs(**kwargs: Any) -> Tensor:
        a = bound("triton_kernels.matmul_ogs.matmul_ogs", **kwargs)
        w, scale = a["w"].transpose(-2, -1), a["precision_config"].weight_scale.transpose(-2, -1)
        assert a["w"].stride(-2) == 1
        matrices, data = (
            float_of(MXFP4, w.contiguous(), scale.contiguous().view(torch.float8_e8m0fnu)),
            a["routing_data"],
        )
        gather, scatter, k = a["gather_indx"], a["scatter_indx"], data.n_expts_act
        rows = a["x"] if gather is None else a["x"][gather.src_indx.long() // k]
        out, start = torch.zeros(len(rows), matrices.shape[1]), 0
        for e, count in enumerate(data.expt_hist.tolist()):
            part = slice(start, start + count)
            out[part] = rows[part].float() @ matrices[e].t() + (0 if a["bias"] is None else a["bias"][e])
            start += count
        if a["fused_activation"] is not None:
            alpha, limit = a["fused_activation"].fn_args
            out = activated(out[:, 0::2], out[:, 1::2], (alpha, 1.0, limit))
        if a["gammas"] is not None:
            out = out * a["gammas"][:, None]
        if scatter is None:
            return out.to(a["x"].dtype)
        total = torch.zeros(len(out) // k, out.shape[1])
        total.index_add_(0, scatter.dst_indx.long() // k, out)
        return total.to(a["x"].dtype)

    def record(*fields: str) -> Callable[..., SimpleNamespace]:
        return lambda *args, **kwargs: SimpleNamespace(**dict(zip(fields, args, strict=False)), **kwargs)

    members = dict(
        matmul_ogs=matmul_ogs,
        compute_expt_data=lambda hist, experts, rows: (hist, experts, rows),
        RoutingData=record("gate_scal", "expt_hist", "n_expts_tot", "n_expts_act", "expt_data"),
        GatherIndx=record(),
        ScatterIndx=record(),
        FnSpecs=record("name", "fn", "fn_arg_names"),
        FusedActivation=record("specs", "fn_args", "reduction_n"),
        PrecisionConfig=record(),
        swiglu_fn=None,
    )
    monkeypatch.setattr(triton_kernels, "member", lambda module, name: members[name])
    for bias in (False, True):
        check("triton_kernels", outside(make(replace(BASE, act="swiglu_oai", quant=quant(MXFP4), bias=bias))))
