"""Adapters to libraries that only multiply: in the place of their products stand the documented ones, on the host.

As test_library_meanings.py says: the result must be the block's, and no kernel runs.
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
from moe_fx.kernels.libraries import (
    deep_gemm,
    marlin,
    torch_scaled,
    vllm_cutlass,
)
from moe_fx.kernels.libraries.adapter import by_expert
from moe_fx.kernels.registry import kernel
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_GROUP,
    FP8_TENSOR,
    MXFP4,
    QuantKey,
    QuantSpec,
    int_group,
)
from moe_fx.reference.quantise import dequantise
from moe_fx.weights import WeightStore

from .library_cases import Block, check, make
from .library_signatures import (
    BASE,
    FP8_BLOCKS,
    FP8_ROWS,
    FP8_TENSORS,
    SCHEMAS,
    E,
    bound,
    fits,
    outside,
    quant,
)


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


def float_of(key: QuantKey, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Tensor:
    """[…, out, in] of what codes and scales stand for, in float32."""
    return dequantise(Quantised(key, codes, scale, None, whole), torch.float32)


def deepgemm_contiguous(**kwargs: Any) -> None:
    """Row m of d is row m of a times the matrix of expert layout[m]; rows of -1 stay."""
    a = bound("deep_gemm.m_grouped_fp8_gemm_nt_contiguous", **kwargs)
    assert a["disable_ue8m0_cast"]
    rows = float_of(FP8_GROUP, *a["a"])
    matrices, layout = float_of(FP8_BLOCK, *a["b"]), a["grouped_layout"]
    assert layout.dtype == torch.int32
    assert len(rows) == len(layout) == len(a["d"])
    for start in range(0, len(layout), deep_gemm.ALIGNMENT):  # a block is of one expert
        assert len(set(layout[start : start + deep_gemm.ALIGNMENT].tolist()) - {-1}) <= 1
    for m, e in enumerate(layout.tolist()):
        if e >= 0:
            a["d"][m] = (rows[m] @ matrices[e].t()).to(a["d"].dtype)


def deepgemm_masked(**kwargs: Any) -> None:
    a = bound("deep_gemm.m_grouped_fp8_gemm_nt_masked", **kwargs)
    codes, scale = a["a"]
    rows, matrices = float_of(FP8_GROUP, codes, scale), float_of(FP8_BLOCK, *a["b"])
    assert a["masked_m"].dtype == torch.int32
    for e, count in enumerate(a["masked_m"].tolist()):
        a["d"][e, :count] = (rows[e, :count] @ matrices[e].t()).to(a["d"].dtype)


@pytest.mark.parametrize(("name", "fake"), [("deepgemm", deepgemm_contiguous), ("batched_deepgemm", deepgemm_masked)])
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_deep_gemm(name: str, fake: Callable[..., None], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_gemm, "function", lambda called: fake)
    block = make(replace(BASE, quant=FP8_BLOCKS, tokens=tokens))
    check(name, outside(block) if tokens == 9 else block)


def test_rows_of_an_expert_start_at_a_multiple() -> None:
    ids = torch.tensor([[0, 3], [3, 1], [3, 0]], dtype=torch.int32)
    places, layout = deep_gemm.aligned(by_expert(ids, E))
    assert places.tolist() == [0, 1, 128, 256, 257, 258]
    assert layout[places].tolist() == [0, 0, 1, 3, 3, 3]
    assert int((layout >= 0).sum()) == 6
    assert len(layout) % deep_gemm.ALIGNMENT == 0


def cutlass_ops(block: Block) -> SimpleNamespace:
    """Sizes (rows, out, in) of an expert's product; up to 64 rows with out and rows changed."""

    def problem_sizes(*args: Any) -> None:
        a = bound("vllm._custom_ops.get_cutlass_moe_mm_problem_sizes_from_expert_offsets", *args)
        for e, rows in enumerate(a["expert_first_token_offset"].diff().tolist()):
            for sizes, n, k in ((a["problem_sizes1"], 2 * a["n"], a["k"]), (a["problem_sizes2"], a["k"], a["n"])):
                sizes[e] = torch.tensor([n, rows, k] if a["swap_ab"] else [rows, n, k])

    def moe_mm(*args: Any) -> None:
        a = bound("vllm._custom_ops.cutlass_moe_mm", *args)
        out, codes, weights = a["out_tensors"], a["a_tensors"].float(), a["b_tensors"].float()
        starts = [*a["expert_offsets"].tolist(), len(out)]
        assert a["expert_offsets"].dtype == torch.int64
        for e, sizes in enumerate(a["problem_sizes"].tolist()):
            rows, n, k = (sizes[1], sizes[0], sizes[2]) if len(out) <= 64 else sizes
            assert (n, k) == weights.shape[1:] == (int(a["c_strides"][e]), int(a["a_strides"][e]))
            part = slice(starts[e], starts[e] + rows)
            a_scale = a["a_scales"][part] if a["per_act_token"] else a["a_scales"].reshape(1, 1)
            b_scale = a["b_scales"][e].reshape(1, -1)
            assert b_scale.shape[1] == (n if a["per_out_ch"] else 1)
            out[part] = (codes[part] @ weights[e].t() * a_scale * b_scale).to(out.dtype)

    return SimpleNamespace(cutlass_moe_mm=moe_mm, get_cutlass_moe_mm_problem_sizes_from_expert_offsets=problem_sizes)


@pytest.mark.parametrize("tokens", [9, 50])
@pytest.mark.parametrize("scheme", [FP8_ROWS, FP8_TENSORS], ids=["rows", "tensors"])
def test_vllm_cutlass(scheme: QuantSpec, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = outside(make(replace(BASE, quant=scheme, tokens=tokens)))
    monkeypatch.setattr(vllm_cutlass, "ops", lambda *_: cutlass_ops(block))
    check("vllm_cutlass", block)


def test_torch_scaled_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled_grouped_mm(**kwargs: Any) -> Tensor:
        a = bound("torch.nn.functional.scaled_grouped_mm", **kwargs)
        assert a["mat_b"].stride(-2) == 1, "column-major"
        assert a["offs"].dtype == torch.int32
        out = torch.zeros(len(a["mat_a"]), a["mat_b"].shape[-1], dtype=a["output_dtype"])
        start = 0
        for e, end in enumerate(a["offs"].tolist()):
            rows = a["mat_a"][start:end].float() @ a["mat_b"][e].float()
            out[start:end] = (rows * a["scale_a"][start:end, None] * a["scale_b"][e]).to(out.dtype)
            start = end
        return out

    block = outside(make(replace(BASE, quant=FP8_ROWS)))
    monkeypatch.setattr(
        torch_scaled, "F", SimpleNamespace(scaled_grouped_mm=scaled_grouped_mm, ScalingType=F.ScalingType)
    )
    check("torch_scaled_grouped", block)


def marlin_gemm(matrices: dict[int, Tensor]) -> Callable[..., Tensor]:
    """Block i holds rows of expert expert_ids[i]: row r reads row r // top_k of a and is written to row r of c."""

    def gemm(*args: Any) -> Tensor:
        fits("_moe_C::moe_wna16_marlin_gemm", args)
        names = [
            a.name for a in torch._C.parse_schema("_moe_C::m" + SCHEMAS["_moe_C::moe_wna16_marlin_gemm"]).arguments
        ]
        a = dict(zip(names, args, strict=True))
        weights, out, size = matrices[a["b_q_weight"].data_ptr()], a["c_or_none"], a["moe_block_size"]
        assert tuple(weights.shape[1:]) == (a["size_n"], a["size_k"])
        assert a["size_m"] == len(a["a"])
        seen = []
        for i, e in enumerate(a["expert_ids"].tolist()):
            if i * size >= int(a["num_tokens_past_padded"]):
                break
            for r in a["sorted_token_ids"][i * size : (i + 1) * size].tolist():
                if r >= a["size_m"] * a["top_k"]:
                    continue
                result = a["a"][r // a["top_k"]].float() @ weights[e].t()
                out[r] = (result * (a["topk_weights"].reshape(-1)[r] if a["mul_topk_weights"] else 1)).to(out.dtype)
                seen.append(r)
        assert sorted(seen) == list(range(len(out)))
        return out

    return gemm


MARLIN = {
    "fp8_tensor": quant(FP8_TENSOR),
    "fp8_channel": quant(FP8_CHANNEL),
    "fp8_block": quant(FP8_BLOCK),
    "mxfp4": quant(MXFP4),
    **{f"int{b}_{g}": quant(int_group(b, g)) for b in (4, 8) for g in (-1, 32, 128)},  # type: ignore[arg-type]
}


@pytest.mark.parametrize("scheme", MARLIN)
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_marlin(scheme: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, store = make(replace(BASE, quant=MARLIN[scheme], tokens=tokens)), WeightStore()
    layout = kernel("marlin").experts.layout_for(block.spec)
    assert layout == f"marlin.{scheme.replace('-1', 'channel')}"
    packed = store.get(layout, block.binding, block.operands, E, block.spec.quant)
    stored = WeightStore().get("view", block.binding, block.operands, E, block.spec.quant)
    matrices = {
        p.codes.data_ptr(): dequantise(s, torch.float32)  # type: ignore[union-attr, arg-type]
        for p, s in ((packed.up[0], stored.up[0]), (packed.down, stored.down))
    }
    monkeypatch.setattr(marlin, "ops", lambda *_: SimpleNamespace(moe_wna16_marlin_gemm=marlin_gemm(matrices)))
    check("marlin", outside(block) if tokens == 9 else block, store)


@pytest.mark.parametrize("block", marlin.BLOCKS)
def test_blocks_of_marlin(block: int) -> None:
    ids = torch.randint(0, 5, (37, 3), generator=torch.Generator().manual_seed(block), dtype=torch.int32)
    rows, experts, used = marlin.blocks(ids, 7, block)
    found = [[r for r in part.tolist() if r < ids.numel()] for part in rows.split(block)]
    expected: list[tuple[int, list[int]]] = []
    flat = ids.flatten().tolist()
    for e in range(7):
        mine = [r for r, of in enumerate(flat) if of == e]
        expected += [(e, mine[i : i + block]) for i in range(0, len(mine), block)]
    assert int(used) == len(expected) * block
    assert list(zip(experts.tolist(), found, strict=True))[: len(expected)] == expected
