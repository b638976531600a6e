"""The orders and rules of the seed's oracles and of today's, written by hand from the texts that define them: nothing
here was produced by the code.  Every row: where, with what taken away, what must be chosen.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_fx.kernels.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from moe_fx.oracle.conditions import Asked
from moe_fx.oracle.fp8 import CUTLASS_OUT, FP8, Fp8MoeBackend
from moe_fx.oracle.int8 import INT8
from moe_fx.oracle.int_wna16 import INT_WNA16
from moe_fx.oracle.mxfp4 import MX4
from moe_fx.oracle.mxfp8 import MX8
from moe_fx.oracle.nvfp4 import NV
from moe_fx.oracle.unquantized import UNQUANTIZED, UnquantizedMoeBackend
from moe_fx.oracle.w4a8 import W4A8
from moe_fx.reasons import MoEFxUnsupportedError

from .golden_selection import CANDIDATES, DEVICES, SCHEMES

FI, DG, OURS, VLLM = "flashinfer", "deep_gemm", "moe_fx.triton", "vllm"
ONE = FusedMoEParallelConfig()


def ranks(tp: int = 1, dp: int = 1, ep: bool = False, via: str = "allgather_reducescatter") -> FusedMoEParallelConfig:
    return FusedMoEParallelConfig.make(tp_size=tp, dp_size=dp, use_ep=ep, all2all_backend=via)


EP = ranks(tp=2, ep=True)
DP_EP = ranks(dp=2, ep=True)
LL, PPLX, HT = (ranks(dp=2, ep=True, via=v) for v in ("deepep_low_latency", "pplx", "deepep_high_throughput"))
V2 = ranks(dp=2, ep=True, via="deepep_v2")


def asked(
    device: str, scheme: str, gone: tuple[str, ...] = (), parallel: FusedMoEParallelConfig = ONE, **more
) -> Asked:
    """Sixteen experts of 1024 x 512, softmax then top-2 renormalised."""
    found = DEVICES[device]
    fields = dict(routing_method=RoutingMethodType.RenormalizeNaive, intermediate_size=512) | more
    config = FusedMoEConfig(16, 2, 1024, 16 // parallel.ep_size, parallel, **fields)
    return Asked(config, replace(found, installed=found.installed - {*gone}), SCHEMES[scheme])


def test_the_enumerations_are_the_seed_s() -> None:
    assert [m.name for m in Fp8MoeBackend][:10] == [
        "NONE", "FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "DEEPGEMM", "BATCHED_DEEPGEMM", "MARLIN", "TRITON",
        "BATCHED_TRITON", "AITER", "VLLM_CUTLASS",
    ]  # fmt: skip
    later = {
        "HUMMING",
        "BATCHED_VLLM_CUTLASS",
        "XPU",
        "CPU",
        "CPU_W8A8",
        "HPC",
        "EMULATION",
        "TRITON_MXFP8",
        "AITER_MXFP8",
    }
    assert {m.name for m in Fp8MoeBackend} - {m.name for m in [*Fp8MoeBackend][:10]} == later
    assert {m.name for m in UnquantizedMoeBackend} == {
        "FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "AITER", "TRITON", "BATCHED_TRITON", "CPU", "XPU", "TPU", "OOT",
    }  # fmt: skip


# --- orders, as the texts write them ("A > B > …"); the table may know more, never in another order

FP8_TODAY = (
    "AITER > FLASHINFER_TRTLLM > FLASHINFER_CUTLASS > DEEPGEMM > VLLM_CUTLASS > TRITON > MARLIN > HUMMING > "
    "BATCHED_DEEPGEMM > BATCHED_VLLM_CUTLASS > BATCHED_TRITON > XPU > CPU_W8A8 > CPU > HPC"
)
ORDERS = [
    (
        FP8,
        "seed",
        asked("a100", "fp8 block"),
        (
            "AITER > FLASHINFER_TRTLLM > FLASHINFER_CUTLASS > DEEPGEMM > BATCHED_DEEPGEMM > VLLM_CUTLASS > TRITON > "
            "BATCHED_TRITON > MARLIN"
        ),
    ),
    (FP8, "today", asked("a100", "fp8 block"), FP8_TODAY),
    (FP8, "today", asked("b200", "fp8 block"), FP8_TODAY),
    (FP8, "today", asked("h100", "fp8 tensor"), FP8_TODAY.replace("MARLIN > HUMMING", "HUMMING > MARLIN")),
    (
        FP8,
        "today",
        asked("h100", "fp8 block"),
        (
            "TRITON > AITER > FLASHINFER_TRTLLM > FLASHINFER_CUTLASS > DEEPGEMM > VLLM_CUTLASS > HUMMING > MARLIN > "
            "BATCHED_DEEPGEMM"
        ),
    ),
    (
        FP8,
        "today",
        asked("h100", "fp8 block", parallel=EP),
        "FLASHINFER_CUTLASS > AITER > FLASHINFER_TRTLLM > DEEPGEMM > VLLM_CUTLASS > TRITON > HUMMING > MARLIN",
    ),
    (
        FP8,
        "today",
        asked("b200", "fp8 block", parallel=V2),
        "FLASHINFER_TRTLLM > AITER > FLASHINFER_CUTLASS > DEEPGEMM",
    ),
    (FP8, "today", asked("xe2", "fp8 block"), "XPU > AITER > FLASHINFER_TRTLLM"),
    (FP8, "today", asked("xeon_amx", "fp8 block"), "CPU_W8A8 > CPU > AITER > FLASHINFER_TRTLLM"),
    (
        UNQUANTIZED,
        "today",
        asked("b200", "bf16"),
        "FLASHINFER_TRTLLM > FLASHINFER_CUTLASS > TRITON > BATCHED_TRITON",
    ),
    (UNQUANTIZED, "today", asked("h100", "bf16"), "TRITON > BATCHED_TRITON > FLASHINFER_TRTLLM > FLASHINFER_CUTLASS"),
    (UNQUANTIZED, "today", asked("mi300x", "bf16"), "AITER > TRITON > BATCHED_TRITON"),
    (UNQUANTIZED, "today", asked("xe2", "bf16"), "XPU > TRITON"),
    (UNQUANTIZED, "today", asked("b200", "bf16", parallel=DP_EP), "FLASHINFER_TRTLLM > TRITON > FLASHINFER_CUTLASS"),
    (
        UNQUANTIZED,
        "today",
        asked("b200", "bf16", activation="swigluoai"),
        "TRITON > BATCHED_TRITON > FLASHINFER_TRTLLM > FLASHINFER_CUTLASS",
    ),
    (
        MX8,
        "today",
        asked("b200", "mxfp8"),
        "FLASHINFER_TRTLLM > DEEPGEMM > MARLIN > XPU > AITER_MXFP8 > HUMMING > TRITON_MXFP8 > EMULATION",
    ),
    (MX8, "today", asked("h100", "mxfp8"), "FLASHINFER_TRTLLM > DEEPGEMM > HUMMING > MARLIN > XPU > AITER_MXFP8"),
    (INT8, "today", asked("a100", "int8"), "TRITON > HUMMING > CPU"),
    (
        INT_WNA16,
        "today",
        asked("a100", "int4"),
        "FLASHINFER_TRTLLM > MARLIN > BATCHED_MARLIN > TRITON > HUMMING > EMULATION",
    ),
    (INT_WNA16, "today", asked("zen5_epyc_64", "int4"), "ZEN_CPU > CPU"),
    (INT_WNA16, "today", asked("h100", "int4"), "HUMMING > MARLIN > BATCHED_MARLIN > TRITON > EMULATION"),
    (
        MX4,
        "today",
        asked("b200", "mxfp4"),
        (
            "FLASHINFER_TRTLLM_BF16 > FLASHINFER_TRTLLM_MXFP8 > AITER_MXFP4_BF16 > AITER_TRITON_BF16 > AITER_FP8 > "
            "AITER_MXFP4 > TRITON > FLASHINFER_CUTLASS_BF16 > FLASHINFER_CUTLASS_MXFP8 > CUTLASS_MXFP4 > MARLIN > "
            "BATCHED_MARLIN > HUMMING > XPU > CPU > EMULATION"
        ),
    ),
    (MX4, "today", asked("rtx5090", "mxfp4"), "FLASHINFER_CUTLASS_BF16 > MARLIN > BATCHED_MARLIN > TRITON > HUMMING"),
    (
        MX4,
        "deepseek_v4",
        asked("b200", "mxfp4"),
        "FLASHINFER_TRTLLM_MXFP8 > DEEPGEMM_MXFP4 > MARLIN > BATCHED_MARLIN > HUMMING",
    ),
    (
        NV,
        "today",
        asked("b200", "nvfp4"),
        (
            "FLASHINFER_TRTLLM > FLASHINFER_CUTEDSL > FLASHINFER_CUTEDSL_BATCHED > FLASHINFER_CUTLASS > VLLM_CUTLASS > "
            "MARLIN > HUMMING > EMULATION"
        ),
    ),
    (W4A8, "today", asked("h100", "w4a8"), "CUTLASS > HUMMING"),
]


@pytest.mark.parametrize(("oracle", "order", "case", "text"), ORDERS, ids=range(len(ORDERS)))
def test_the_order_is_that_of_the_text(oracle, order: str, case: Asked, text: str) -> None:
    wanted = text.split(" > ")
    assert [m.name for m in oracle.ordered(case, order) if m.name in wanted] == wanted


def test_the_order_of_fp8_has_nothing_before_or_between_the_seed_s() -> None:
    assert [m.name for m in FP8.ordered(asked("a100", "fp8 block"), "seed")][:9] == ORDERS[0][3].split(" > ")


# --- choices: fp8 by the seed's order

CHOICES = [
    (FP8, "seed", asked("mi300x", "fp8 block"), "AITER"),
    (FP8, "seed", asked("mi300x", "fp8 tensor"), "AITER"),
    (FP8, "seed", asked("mi300x", "fp8 block", ("aiter",)), "TRITON"),
    (FP8, "seed", asked("b200", "fp8 block"), "FLASHINFER_TRTLLM"),
    (FP8, "seed", asked("b200", "fp8 tensor"), "FLASHINFER_TRTLLM"),
    (FP8, "seed", asked("b200", "fp8 block", (FI,)), "DEEPGEMM"),
    (FP8, "seed", asked("b200", "fp8 block", (FI, DG)), "TRITON"),
    (FP8, "seed", asked("b200", "fp8 block", (FI, DG, OURS)), "MARLIN"),
    (FP8, "seed", asked("h100", "fp8 block"), "FLASHINFER_CUTLASS"),
    (FP8, "seed", asked("h100", "fp8 block", (FI,)), "DEEPGEMM"),
    (FP8, "seed", asked("h100", "fp8 block", (FI, DG)), "TRITON"),
    (FP8, "seed", asked("h100", "fp8 block", (FI, DG, OURS)), "MARLIN"),
    (FP8, "seed", asked("h200", "fp8 tensor"), "FLASHINFER_CUTLASS"),
    (FP8, "seed", asked("h200", "fp8 tensor", (FI,)), "VLLM_CUTLASS"),
    (FP8, "seed", asked("h200", "fp8 tensor", (FI, VLLM)), "TRITON"),
    (FP8, "seed", asked("h200", "fp8 channel"), "VLLM_CUTLASS"),
    (FP8, "seed", asked("h200", "fp8 channel", (VLLM,)), "TRITON"),
    (FP8, "seed", asked("a100", "fp8 block"), "MARLIN"),  # no fp8 products before sm89
    (FP8, "seed", asked("a100", "fp8 tensor"), "MARLIN"),
    (FP8, "seed", asked("tpu_v5p", "fp8 block"), "NONE"),
    (FP8, "seed", asked("xe2", "fp8 block"), "XPU"),
    (FP8, "seed", asked("zen5_epyc_64", "fp8 block"), "CPU_W8A8"),
    # batched format iff DeepEP's low-latency kernels or pplx carry the tokens
    (FP8, "seed", asked("h100", "fp8 block", parallel=LL), "BATCHED_DEEPGEMM"),
    (FP8, "seed", asked("h100", "fp8 block", parallel=PPLX), "BATCHED_DEEPGEMM"),
    (FP8, "seed", asked("h100", "fp8 block", (DG,), LL), "BATCHED_TRITON"),
    (FP8, "seed", asked("h100", "fp8 block", (FI,), HT), "DEEPGEMM"),
    (FP8, "seed", asked("h100", "fp8 tensor", parallel=LL), "BATCHED_TRITON"),
    (FP8, "seed", asked("b200", "fp8 block", parallel=LL), "BATCHED_DEEPGEMM"),
    (FP8, "seed", asked("h100", "fp8 channel", (FI,), HT), "TRITON"),  # vLLM's CUTLASS not behind DeepEP-HT
    # LoRA
    (FP8, "seed", asked("b200", "fp8 block", is_lora_enabled=True), "TRITON"),
    (FP8, "seed", asked("mi300x", "fp8 block", is_lora_enabled=True), "TRITON"),
    (FP8, "seed", asked("h100", "fp8 tensor", is_lora_enabled=True), "TRITON"),
    # requests
    (FP8, "seed", asked("b200", "fp8 block", moe_backend="deep_gemm"), "DEEPGEMM"),
    (FP8, "seed", asked("b200", "fp8 block", moe_backend="marlin"), "MARLIN"),
    (FP8, "seed", asked("h100", "fp8 tensor", moe_backend="cutlass"), "VLLM_CUTLASS"),
    (FP8, "seed", asked("h100", "fp8 block", parallel=LL, moe_backend="deep_gemm"), "BATCHED_DEEPGEMM"),
    (FP8, "seed", asked("h100", "fp8 block", parallel=LL, moe_backend="triton"), "BATCHED_TRITON"),
    (FP8, "seed", asked("h100", "fp8 tensor", parallel=LL, moe_backend="cutlass"), "BATCHED_VLLM_CUTLASS"),
    # fp8 by today's order
    (FP8, "today", asked("h100", "fp8 block"), "TRITON"),
    (FP8, "today", asked("h100", "fp8 block", parallel=EP), "FLASHINFER_CUTLASS"),
    (FP8, "today", asked("h100", "fp8 tensor"), "FLASHINFER_CUTLASS"),
    (FP8, "today", asked("h100", "fp8 block", (OURS,)), "FLASHINFER_CUTLASS"),
    (FP8, "today", asked("h100", "fp8 block", (OURS, FI, DG)), "HUMMING"),
    (FP8, "today", asked("b200", "fp8 block", (OURS, FI, DG)), "MARLIN"),
    (FP8, "today", asked("b200", "fp8 block", parallel=V2), "FLASHINFER_TRTLLM"),
    (FP8, "today", asked("b200", "fp8 block", parallel=LL), "BATCHED_DEEPGEMM"),
    (FP8, "today", asked("xe2", "fp8 block"), "XPU"),
    # without quantisation, by the seed's rules
    (UNQUANTIZED, "seed", asked("mi300x", "bf16"), "AITER"),
    (UNQUANTIZED, "seed", asked("mi300x", "bf16", ("aiter",)), "TRITON"),
    (UNQUANTIZED, "seed", asked("b200", "bf16"), "FLASHINFER_TRTLLM"),
    (UNQUANTIZED, "seed", asked("b200", "bf16", (FI,)), "TRITON"),
    (UNQUANTIZED, "seed", asked("h100", "bf16"), "TRITON"),
    (UNQUANTIZED, "seed", asked("h100", "bf16", parallel=EP), "FLASHINFER_CUTLASS"),
    (UNQUANTIZED, "seed", asked("h100", "bf16", (FI,), EP), "TRITON"),
    (UNQUANTIZED, "seed", asked("h100", "bf16", parallel=DP_EP), "TRITON"),
    (UNQUANTIZED, "seed", asked("h100", "bf16", parallel=ranks(tp=2)), "TRITON"),
    (UNQUANTIZED, "seed", asked("a100", "bf16", parallel=EP), "TRITON"),  # CUTLASS: Hopper and later
    (UNQUANTIZED, "seed", asked("rtx5090", "bf16", parallel=EP), "FLASHINFER_CUTLASS"),
    (UNQUANTIZED, "seed", asked("h100", "bf16", parallel=LL), "BATCHED_TRITON"),
    (UNQUANTIZED, "seed", asked("xe2", "bf16"), "XPU"),
    (UNQUANTIZED, "seed", asked("xeon_amx", "bf16"), "CPU"),
    (UNQUANTIZED, "seed", asked("zen5_epyc_64", "bf16", ("vllm_cpu", "zentorch")), "CPU"),
    (UNQUANTIZED, "seed", asked("tpu_v5p", "bf16"), "TPU"),
    (UNQUANTIZED, "seed", asked("hpu", "bf16"), "OOT"),
    (UNQUANTIZED, "seed", asked("b200", "bf16", moe_backend="triton"), "TRITON"),
    (UNQUANTIZED, "seed", asked("h100", "bf16", parallel=LL, moe_backend="triton"), "BATCHED_TRITON"),
    # and by today's
    (UNQUANTIZED, "today", asked("h100", "bf16", parallel=EP), "TRITON"),
    (UNQUANTIZED, "today", asked("h100", "bf16", (OURS,)), "FLASHINFER_CUTLASS"),
    (UNQUANTIZED, "today", asked("b200", "bf16", is_lora_enabled=True), "FLASHINFER_TRTLLM"),
    (UNQUANTIZED, "today", asked("h100", "bf16", is_lora_enabled=True), "TRITON"),
    # the others
    (MX8, "seed", asked("mi355x", "mxfp8"), "AITER_MXFP8"),
    (MX8, "seed", asked("mi355x", "mxfp8", ("aiter",)), "TRITON_MXFP8"),
    (MX8, "seed", asked("mi300x", "mxfp8"), "EMULATION"),
    (MX8, "seed", asked("b200", "mxfp8", (FI,)), "DEEPGEMM"),
    (INT8, "seed", asked("a100", "int8"), "TRITON"),
    (INT8, "seed", asked("a100", "int8", (OURS,)), "HUMMING"),
    (INT8, "seed", asked("zen5_epyc_64", "int8"), "CPU"),
    (INT_WNA16, "seed", asked("a100", "int4"), "MARLIN"),
    (INT_WNA16, "seed", asked("a100", "int4", (VLLM,)), "TRITON"),
    (INT_WNA16, "seed", asked("h100", "int4"), "HUMMING"),
    (INT_WNA16, "seed", asked("zen5_epyc_64", "int4"), "ZEN_CPU"),
    (INT_WNA16, "seed", asked("zen5_epyc_64", "int4", ("zentorch",)), "CPU"),
    (MX4, "seed", asked("b200", "mxfp4", activation="swigluoai", has_bias=True), "FLASHINFER_TRTLLM_BF16"),
    (MX4, "seed", asked("b200", "mxfp4 mxfp8", activation="swigluoai", has_bias=True), "FLASHINFER_TRTLLM_MXFP8"),
    (MX4, "seed", asked("h100", "mxfp4", activation="swigluoai", has_bias=True), "TRITON"),
    (MX4, "seed", asked("rtx5090", "mxfp4", activation="swigluoai", has_bias=True), "MARLIN"),
    (MX4, "seed", asked("h100", "mxfp4", moe_backend="triton_unfused"), "TRITON_UNFUSED"),
    (MX4, "seed", asked("tpu_v5p", "mxfp4", activation="swigluoai"), "EMULATION"),
    (NV, "seed", asked("b200", "nvfp4"), "FLASHINFER_TRTLLM"),
    (NV, "seed", asked("b200", "nvfp4", ("cutlass_dsl",), LL), "HUMMING"),
    (NV, "seed", asked("b200", "nvfp4", parallel=LL), "FLASHINFER_CUTEDSL_BATCHED"),
    (NV, "seed", asked("rtx5090", "nvfp4"), "FLASHINFER_CUTLASS"),
    (NV, "seed", asked("rtx5090", "nvfp4", (FI,)), "VLLM_CUTLASS"),
    (NV, "seed", asked("h100", "nvfp4"), "MARLIN"),
    (NV, "seed", asked("h100", "nvfp4", (VLLM,)), "HUMMING"),
    (W4A8, "seed", asked("h100", "w4a8"), "CUTLASS"),
    (W4A8, "seed", asked("h100", "w4a8", (VLLM,)), "HUMMING"),
    (W4A8, "seed", asked("b200", "w4a8"), "HUMMING"),
]


@pytest.mark.parametrize(("oracle", "order", "case", "backend"), CHOICES, ids=range(len(CHOICES)))
def test_the_choice_is_that_of_the_text(oracle, order: str, case: Asked, backend: str) -> None:
    assert oracle.select(case, order, CANDIDATES).backend.name == backend


REFUSED = [
    (FP8, asked("h100", "fp8 block", moe_backend="aiter"), "veto.device"),
    (FP8, asked("h100", "fp8 block", moe_backend="flashinfer_trtllm"), "veto.device"),
    (FP8, asked("h100", "fp8 block", (FI,), moe_backend="flashinfer_cutlass"), "veto.package"),
    (FP8, asked("h100", "fp8 block", moe_backend="cutlass"), "veto.scheme"),
    (FP8, asked("a100", "fp8 block", moe_backend="triton"), "veto.device"),
    (FP8, asked("h100", "fp8 block", parallel=LL, moe_backend="marlin"), "veto.format"),
    (FP8, asked("h100", "fp8 block", moe_backend="marlin", is_lora_enabled=True), "veto.lora"),
    (UNQUANTIZED, asked("h100", "bf16", moe_backend="flashinfer_cutlass"), "veto.parallel"),
    (UNQUANTIZED, asked("h100", "bf16", parallel=DP_EP, moe_backend="flashinfer_cutlass"), "veto.parallel"),
    (UNQUANTIZED, asked("a100", "bf16", parallel=EP, moe_backend="flashinfer_cutlass"), "veto.device"),
    (UNQUANTIZED, asked("mi300x", "bf16", ("aiter",), moe_backend="aiter"), "veto.package"),
    (UNQUANTIZED, asked("h100", "bf16", moe_backend="cpu"), "veto.device"),
    (FP8, asked("a100", "fp8 block", (VLLM, "humming")), "veto.package"),  # nothing is left on a GPU
]


@pytest.mark.parametrize(("oracle", "case", "code"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_had_raises_and_never_falls_back(oracle, case: Asked, code: str) -> None:
    with pytest.raises(MoEFxUnsupportedError, match=code):
        oracle.select(case, "seed", CANDIDATES)


def test_vllm_s_cutlass_is_out_unless_it_is_allowed() -> None:
    B = Fp8MoeBackend
    case = asked("h200", "fp8 channel")
    without = replace(case, without=dict.fromkeys((B.VLLM_CUTLASS, B.BATCHED_VLLM_CUTLASS), CUTLASS_OUT))
    assert FP8.select(case, "seed", CANDIDATES).backend is B.VLLM_CUTLASS
    assert FP8.select(without, "seed", CANDIDATES).backend is B.TRITON
    wished = replace(without, config=replace(case.config, moe_backend="cutlass"))
    with pytest.raises(MoEFxUnsupportedError, match=r"veto.request: .*allow_vllm_cutlass=True"):
        FP8.select(wished, "seed", CANDIDATES)
