"""How weights are packed for vLLM's and AMD's experts for CPUs, and what the oracle thinks of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_fx.kernels.experts
import moe_fx.kernels.libraries  # noqa: F401  both register kernels
from moe_fx.binding import Operand, WeightBinding
from moe_fx.hardware import catalogue
from moe_fx.kernels.layouts import find_layout
from moe_fx.kernels.registry import KERNELS
from moe_fx.oracle import Request, choose
from moe_fx.oracle.price import seconds, workload
from moe_fx.reasons import MoEFxUnsupportedError
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec

from .library_cases import E, H, I
from .test_packed_layouts import Live

NAMES = {"vllm_cpu", "vllm_cpu_sgl", "vllm_cpu_int8", "vllm_cpu_mxfp4", "zentorch"}


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- layouts

OPERANDS = [
    *(
        Operand("w13", form, t, order)
        for form in ("stacked", "list", "flat")
        for t in (False, True)
        for order in ("gate_up", "up_gate", "interleaved")
    ),  # type: ignore[arg-type]
    *(Operand("w2", form, t) for form in ("stacked", "list", "flat") for t in (False, True)),  # type: ignore[arg-type]
    *(Operand("w13_bias", form, False, "interleaved") for form in ("stacked", "list")),  # type: ignore[arg-type]
]
LAYOUTS = [
    "vllm_cpu.vec",
    "vllm_cpu.vec_interleaved",
    "vllm_cpu.vnni",
    "vllm_cpu.vnni_interleaved",
    "zentorch",
    "zentorch.interleaved",
]


def stored(operand: Operand, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    rows, cols = (2 * I, H) if operand.role.startswith("w13") else (H, I)
    size = [rows] if operand.role.endswith("_bias") else [cols, rows] if operand.transposed else [rows, cols]
    if operand.form == "list":
        return [torch.randn(size).bfloat16() for _ in range(E)]
    whole = torch.randn(E, *size).bfloat16()
    return [whole.flatten(0, 1) if operand.form == "flat" else whole]


@pytest.mark.parametrize("operand", OPERANDS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_invert_and_keep_their_address(name: str, operand: Operand) -> None:
    chosen, tensors = find_layout(name), stored(operand)
    assert chosen.copies(operand)
    (packed,) = chosen.write(operand, tensors, E, [])
    assert packed.is_contiguous()
    assert packed.untyped_storage().nbytes() == chosen.bytes(operand, tensors, E)
    assert all(packed.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in tensors)
    back = chosen.unpack(operand, packed, [t.to("meta") for t in tensors], E)
    assert [t.shape for t in back] == [t.shape for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))
    fresh = stored(operand, 1)
    assert chosen.write(operand, fresh, E, [packed])[0] is packed
    assert torch.equal(packed, chosen.write(operand, fresh, E, [])[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_packing_streams(name: str) -> None:
    """Beside the copy, no more than the steps of one expert need."""
    tensors = [torch.randn(32, 2 * I, H).bfloat16()]
    one = tensors[0][0].numel() * 2
    with Live() as live:
        (packed,) = find_layout(name).write(Operand("w13", order="interleaved"), tensors, 32, [])
    assert live.peak <= packed.numel() * 2 + 4 * one


# --- what the oracle thinks of them

STACKED = WeightBinding((Operand("w13"), Operand("w2")))
ZEN5 = replace(catalogue()["zen5_epyc_2"], installed=frozenset({"torch.grouped_mm", "vllm_cpu", "zentorch"}))
COPY = Request("bfloat16", memory="copy")


def reasons(
    name: str, spec: MoESpec, request: Request = COPY, device: Any = ZEN5, binding: WeightBinding = STACKED
) -> set[str]:
    plan = choose(spec, binding, request, device, KERNELS)
    (verdict,) = [v for v in plan.verdicts if v.candidate.startswith(f"{name}/")]
    return {r.code for r in verdict.reasons}


def moe(
    experts: int = 8, k: int = 2, hidden: int = 64, inter: int = 32, combine: CombineSpec | None = None, **more: Any
) -> MoESpec:
    return MoESpec(k, ExpertSpec(experts, hidden, inter, **more), combine or CombineSpec())


SPLIT = WeightBinding((Operand("w1"), Operand("w3"), Operand("w2")))
OAI: dict[str, Any] = dict(act="swiglu_oai", act_params=(1.702, 7.0))


@pytest.mark.parametrize(
    ("name", "spec", "more", "expected"),
    [
        ("vllm_cpu", moe(), {}, set()),
        ("vllm_cpu", moe(), dict(request=Request("bfloat16")), {"veto.storage"}),
        ("vllm_cpu", moe(), dict(device=catalogue()["zen5_epyc_2"]), {"veto.package"}),
        ("vllm_cpu", moe(), dict(device=replace(ZEN5, arch="avx2")), {"veto.device"}),
        ("vllm_cpu", moe(), dict(request=replace(COPY, training=True)), {"veto.training", "veto.storage"}),
        ("vllm_cpu", moe(), dict(binding=SPLIT), {"veto.storage"}),
        ("vllm_cpu", moe(hidden=48), {}, {"veto.shape"}),
        ("vllm_cpu", moe(256, 8, 7168, 2048), {}, {"veto.shape", "veto.storage"}),  # and no room for two
        ("vllm_cpu", moe(**OAI), {}, set()),
        ("vllm_cpu", moe(act="swiglu_oai", act_params=(1.0, 7.0)), {}, {"veto.activation"}),
        ("vllm_cpu", moe(combine=CombineSpec("input")), {}, {"veto.combine"}),
        ("vllm_cpu", moe(k=1, combine=CombineSpec("input")), {}, set()),
        ("vllm_cpu", moe(w13_bias=True, w2_bias=True), {}, set()),
        ("vllm_cpu", moe(), dict(request=replace(COPY, dtype="float16")), set()),
        ("vllm_cpu_sgl", moe(), dict(request=replace(COPY, dtype="float16")), {"veto.dtype"}),
        ("vllm_cpu_sgl", moe(w13_bias=True), {}, {"veto.bias"}),
        ("vllm_cpu_sgl", moe(w13_bias=True, act="swiglu_oai", act_params=(2.0, 3.0)), {}, set()),
        ("vllm_cpu_sgl", moe(act="gelu"), {}, {"veto.activation"}),
        ("zentorch", moe(hidden=17, inter=19), {}, set()),
        ("zentorch", moe(), dict(request=replace(COPY, dtype="float32")), {"veto.dtype"}),
        ("zentorch", moe(8, 2, 4096, 14336), dict(device=replace(ZEN5, memory_bytes=12 << 30)), {"veto.storage"}),
    ],
)
def test_vetoes(name: str, spec: MoESpec, more: dict[str, Any], expected: set[str]) -> None:
    assert reasons(name, spec, **more) == expected


def test_a_request_that_cannot_be_met_says_why() -> None:
    for request in (replace(COPY, kernel="sorted_loop", layout="vllm_cpu.vec"), Request("bfloat16", kernel="vllm_cpu")):
        with pytest.raises(MoEFxUnsupportedError, match=r"vllm_cpu\.vec.*veto\.storage"):
            choose(moe(), STACKED, request, ZEN5, KERNELS)


# Layers of CPU.md, and where its medians cross: the second is best to that many tokens, zentorch from that many on.
QWEN3, OLMOE, GRANITE = moe(128, 8, 2048, 768), moe(64, 8, 2048, 1024), moe(32, 8, 1024, 512)
MEDIANS = {  # ms: T → (zentorch, sgl, vec)
    "qwen3": (QWEN3, {1: (1.73, 1.47, 1.72), 16: (19.5, 16.3, 18.8), 64: (30.2, 26.3, 31.4), 1024: (98.6, 124, 209)}),
    "olmoe": (OLMOE, {1: (2.04, 1.97, 2.29), 16: (15.8, 15.4, 17.9), 64: (20.5, 21.1, 25.8), 1024: (118, 143, 264)}),
    "granite": (GRANITE, {1: (0.435, 0.397, 0.537), 64: (3.27, 3.23, 5.72), 1024: (28.9, 31.2, 64.6)}),
}


@pytest.mark.parametrize("model", MEDIANS)
def test_prices_follow_the_measured_medians(model: str) -> None:
    """Within a third of each, and the faster of two is the cheaper wherever they differ by more than a tenth."""
    spec, medians = MEDIANS[model]
    work = workload(spec, COPY, ZEN5)
    for tokens, measured in medians.items():
        prices = [seconds(KERNELS[n].cost, work)(tokens) * 1e3 for n in ("zentorch", "vllm_cpu_sgl", "vllm_cpu")]
        for price, median in zip(prices, measured, strict=True):
            assert 0.67 < price / median < 1.5, (model, tokens, prices, measured)
        for (p, a), (q, b) in (
            (x, y) for x in zip(prices, measured, strict=True) for y in zip(prices, measured, strict=True)
        ):
            assert not (a < 0.9 * b and p > q), (model, tokens, prices, measured)


def test_price_chooses_them_where_they_are() -> None:
    plan = choose(QWEN3, STACKED, COPY, ZEN5, KERNELS)
    assert {r.kernel for r in plan.ranges} <= NAMES
    alone = choose(QWEN3, STACKED, COPY, replace(ZEN5, installed=frozenset({"torch.grouped_mm"})), KERNELS)
    assert not {r.kernel for r in alone.ranges} & NAMES
