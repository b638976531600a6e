"""The tables of all schemes together: what runs on this machine, the policy "priority", what `doctor` shows."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from moe_fx.kernels.capability import PLAIN
from moe_fx.kernels.config import (
    FusedMoEConfig,
)
from moe_fx.kernels.libraries import LIBRARIES
from moe_fx.kernels.modular_kernel import FusedMoEExperts
from moe_fx.kernels.registry import KERNELS as REGISTERED
from moe_fx.oracle import Request, choose, fp8, int8, int_wna16, mxfp4, mxfp8, nvfp4, unquantized, w4a8
from moe_fx.oracle.conditions import Asked, this_device
from moe_fx.oracle.fp8 import Fp8MoeBackend
from moe_fx.oracle.nvfp4 import NvFp4MoeBackend
from moe_fx.oracle.priority import ORACLES, oracle_for, places, survey
from moe_fx.oracle.unquantized import UnquantizedMoeBackend
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_GROUP,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_TOKEN,
    MXFP6_E3M2,
    QuantSpec,
    int_group,
)
from moe_fx.reasons import MoEFxOptionError, MoEFxUnsupportedError

from .candidates import KERNELS, STACKED, described, moe
from .golden_selection import CANDIDATES, DEVICES, SCHEMES

CONFIG = FusedMoEConfig(8, 2, 256, 8, intermediate_size=128)
H100 = DEVICES["h100"]


def asked(device: str = "h100", scheme: str = "bf16", **config) -> Asked:
    return Asked(replace(CONFIG, **config), DEVICES[device], SCHEMES[scheme])


SPEC, COST = moe(8, 2, 256, 128), KERNELS["loop"].cost


# --- on this machine


def test_here_our_own_kernels_run_every_scheme() -> None:
    config = replace(CONFIG, in_dtype=torch.bfloat16)
    device = replace(DEVICES["zen5_epyc_64"], installed=frozenset({"torch.grouped_mm"}))
    chosen = {
        name: oracle.select(Asked(config, device, oracle.schemes[0]))
        for name, oracle in ORACLES.items()
        if name != "w4a8"
    }
    assert {name: found.experts for name, found in chosen.items()} == {
        "unquantized": "torch_grouped",
        "fp8": "sorted_loop",
        "mxfp8": "sorted_loop",
        "int8": "sorted_loop",
        "int_wna16": "sorted_loop",
        "mxfp4": "sorted_loop",
        "nvfp4": "reference",  # its activations share one scale over all tokens
    }
    assert all(issubclass(found.experts_class, FusedMoEExperts) for found in chosen.values())


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no adapter to a library were registered."""
    for name in LIBRARIES:
        monkeypatch.delitem(REGISTERED, name, raising=False)


@pytest.mark.usefixtures("unbuilt")
def test_a_kernel_that_is_not_built_is_vetoed_and_says_so() -> None:
    everything = Asked(CONFIG, DEVICES["b200"], SCHEMES["fp8 block"])
    for verdict in ORACLES["fp8"].verdicts(everything):
        said = [r for r in verdict.reasons if r.code == "veto.package" and "not built" in r.text]
        assert bool(said) == (verdict.candidate.partition("/")[2] in LIBRARIES)
    with pytest.raises(MoEFxUnsupportedError, match="not built"):
        ORACLES["fp8"].select(everything)
    described_only = ORACLES["fp8"].select(everything, candidates=CANDIDATES)
    with pytest.raises(MoEFxUnsupportedError, match=r"needs the kernel '\w+', which is not built"):
        assert described_only.experts_class


@pytest.mark.usefixtures("unbuilt")
def test_classes_are_looked_up_by_backend() -> None:
    B = UnquantizedMoeBackend
    assert unquantized.backend_2_kernel_cls(B.CPU) is REGISTERED["torch_grouped"].experts
    with pytest.raises(MoEFxUnsupportedError, match=r"FLASHINFER_CUTLASS .* needs 'flashinfer_cutlass'"):
        unquantized.backend_2_kernel_cls(B.FLASHINFER_CUTLASS)
    with pytest.raises(MoEFxUnsupportedError, match=r"TPU .* needs a plugin"):
        unquantized.backend_2_kernel_cls(B.TPU)
    with pytest.raises(MoEFxUnsupportedError, match="'triton_or_deepgemm' or 'deepgemm'"):
        fp8.backend_2_kernel_cls(Fp8MoeBackend.DEEPGEMM)
    with pytest.raises(MoEFxOptionError, match="NONE runs no fp8 layer"):
        fp8.backend_2_kernel_cls(Fp8MoeBackend.NONE)


def test_the_named_functions_choose_here() -> None:
    config = replace(CONFIG, moe_backend="cpu")
    assert unquantized.select_unquantized_moe_backend(config, False, False)[0] is UnquantizedMoeBackend.CPU
    backend, experts = fp8.select_fp8_moe_backend(CONFIG, FP8_BLOCK, FP8_GROUP, device=DEVICES["tpu_v5p"])
    assert (backend, experts) == (Fp8MoeBackend.NONE, None)
    assert fp8.select_fp8_moe_backend(CONFIG, FP8_BLOCK, FP8_GROUP)[1] is REGISTERED["sorted_loop"].experts
    assert int8.select_int8_moe_backend(config)[0] is int8.Int8MoeBackend.CPU
    assert int_wna16.select_int_wna16_moe_backend(config, int_group(8, 128))[0] is int_wna16.IntWNA16MoeBackend.CPU
    assert mxfp4.select_mxfp4_moe_backend(config)[0] is mxfp4.Mxfp4MoeBackend.CPU
    assert mxfp8.select_mxfp8_moe_backend(CONFIG)[0] is Fp8MoeBackend.EMULATION
    assert nvfp4.select_nvfp4_moe_backend(CONFIG)[0] is NvFp4MoeBackend.EMULATION
    with pytest.raises(MoEFxUnsupportedError, match="CUTLASS/vllm_cutlass_w4a8"):
        w4a8.select_w4a8_moe_backend(CONFIG)
    for module, map_name in (
        (fp8, "map_fp8_backend"),
        (unquantized, "map_unquantized_backend"),
        (int8, "map_int8_backend"),
        (int_wna16, "map_int_wna16_backend"),
        (mxfp4, "map_mxfp4_backend"),
        (mxfp8, "map_mxfp8_backend"),
        (nvfp4, "map_nvfp4_backend"),
        (w4a8, "map_w4a8_backend"),
    ):
        with pytest.raises(MoEFxOptionError, match=r"'abacus'.*known: auto, "):
            getattr(module, map_name)("abacus")


def test_use_ep_and_use_dp_say_more_than_the_configuration() -> None:
    pick = ORACLES["unquantized"].select
    said = {
        (ep, dp): pick(Asked(CONFIG, H100, PLAIN, ep, dp), candidates=CANDIDATES).backend.name
        for ep in (True, False)
        for dp in (True, False)
    }
    assert said.pop((True, False)) == "FLASHINFER_CUTLASS"
    assert set(said.values()) == {"TRITON"}


def test_schemes_find_their_table() -> None:
    for name, oracle in ORACLES.items():
        assert {o.name for s in oracle.schemes if (o := oracle_for(s))} == {name}
    assert oracle_for((MXFP6_E3M2, None)) is None
    assert oracle_for((None, FP8_TOKEN)) is None


# --- the policy of the main oracle


def test_priority_sorts_by_the_table_of_the_scheme_and_then_by_rank() -> None:
    kernels = {
        "reference": KERNELS["reference"],
        "vllm_cpu": described("vllm_cpu", 80, COST),
        "sorted_loop": described("sorted_loop", 70, COST),
        "fast": described("fast", 1, replace(COST, launches=lambda E, T, k: 1)),
    }
    device = DEVICES["zen5_epyc_64"]

    def first(policy: str, **without) -> str:
        left = {n: k for n, k in kernels.items() if n not in without}
        return choose(SPEC, STACKED, Request("bfloat16", policy=policy), device, left).kernel_for(64)  # type: ignore[arg-type]

    assert first("price") == "fast"
    assert first("priority") == "vllm_cpu"
    assert first("priority", vllm_cpu=0) == "sorted_loop"
    assert first("priority", vllm_cpu=0, sorted_loop=0) == "fast"
    twins = {n: replace(k, cost=COST) for n, k in kernels.items()}
    plan = choose(SPEC, STACKED, Request("bfloat16"), device, twins)
    assert {r.kernel for r in plan.ranges} == {"vllm_cpu"}  # equal prices


def test_places_follow_scheme_and_device() -> None:
    bf16, hopper, blackwell = torch.bfloat16, DEVICES["h100"], DEVICES["b200"]
    today = {d.arch: places(SPEC, bf16, d, "today") for d in (hopper, blackwell)}
    assert today["sm90"]["triton"] < today["sm90"]["flashinfer_cutlass"]
    assert today["sm100"]["triton"] > today["sm100"]["flashinfer_cutlass"]
    assert "sorted_loop" not in places(SPEC, bf16, hopper)  # the backend CPU is for CPUs
    quantised = replace(SPEC, quant=QuantSpec(w13=str(INT8_CHANNEL), w2=str(INT8_CHANNEL), a1=str(INT8_TOKEN)))
    assert list(places(quantised, bf16, hopper)) == ["triton_int8", "humming"]
    assert places(replace(SPEC, quant=QuantSpec(w13=str(MXFP6_E3M2))), bf16, hopper) == {}


# --- what `doctor` shows


def test_the_survey_has_every_backend_and_every_kernel() -> None:
    entries = list(survey(this_device()))
    assert {(e.scheme, e.backend, e.kernel) for e in entries if e.backend} == {
        (oracle.name, row.member.name, name)
        for oracle in ORACLES.values()
        for row in oracle.table
        for name in (*(row.kernels or ("",)), *row.lora)
    }
    assert {e.kernel for e in entries} == {"", *LIBRARIES, *REGISTERED}
    assert all(e.reasons for e in entries if e.kernel in LIBRARIES and e.kernel not in REGISTERED)
    fits = {(e.scheme, e.kernel) for e in entries if not e.reasons}
    assert {("unquantized", "torch_grouped"), ("fp8", "sorted_loop"), ("unquantized", "batched_loop")} <= fits


def test_the_survey_of_a_described_machine_asks_each_for_a_scheme_of_its_own() -> None:
    """But Humming for fp8 weights and inputs: those of its kernels that leave inputs alone have none."""
    entries = list(survey(DEVICES["h100"], CANDIDATES))
    assert {e.kernel for e in entries if any(r.code == "veto.scheme" for r in e.reasons)} == {
        "humming",
        "batched_humming",
    }
    fits = {(e.backend, e.kernel) for e in entries if not e.reasons}
    assert {
        ("MARLIN", "marlin"),
        ("BATCHED_MARLIN", "batched_marlin"),
        ("HPC", "hpc"),
        ("", "torch_scaled_grouped"),
    } <= fits
    assert not {kernel for _, kernel in fits if kernel.startswith(("aiter", "flashinfer_trtllm", "xpu", "vllm_cpu"))}


def test_doctor_prints_them(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fx.__main__ import main

    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"fp8\s*│ MARLIN\s*│ marlin\s*│ vetoed: veto\.\w+: ", printed)
    assert re.search(r"unquantized\s*│ CPU\s*│ sorted_loop\s*│ available", printed)
    assert "private hooks:" in printed
