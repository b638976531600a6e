"""Golden selections: device × scheme × layer × ranks × request × packages × order → backend, and what vetoed the rest.

Kept in golden_selections.json and reviewed as diffs; accept with ``python -m tests.oracle.golden_selection --accept``
or ``pytest tests/oracle --accept-golden``.  The candidates are described, so nothing changes when a kernel is built.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moe_fx.hardware import Device, catalogue
from moe_fx.kernels.capability import PLAIN, Open, RowSchemes, Scheme
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from moe_fx.kernels.config.parallel import ALL2ALL_BACKENDS, BATCHED
from moe_fx.kernels.libraries import LIBRARIES
from moe_fx.oracle.backends import Candidates
from moe_fx.oracle.conditions import Asked
from moe_fx.oracle.priority import oracle_for
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_GROUP,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_TOKEN,
    MXFP4,
    MXFP8,
    MXFP8_DYNAMIC,
    NVFP4,
    NVFP4_DYNAMIC,
    int_group,
)

from .candidates import KERNELS, MODELS, described

PATH = Path(__file__).with_name("golden_selections.json")

LISTS = frozenset({"none", *ALL2ALL_BACKENDS}) - BATCHED
COST = KERNELS["loop"].cost
CANDIDATES: Candidates = {
    **LIBRARIES,
    "torch_grouped": described(
        "torch_grouped",
        10,
        COST,
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"bfloat16"}),
        packages=frozenset({"torch.grouped_mm"}),
        size_multiple=8,
        all2all=LISTS,
    ),
    "sorted_loop": described("sorted_loop", 20, COST, schemes=RowSchemes({PLAIN}), all2all=LISTS),
    "batched_loop": described(
        "batched_loop", 60, COST, schemes=RowSchemes({PLAIN}), all2all=frozenset({"none", *BATCHED}), batched=True
    ),
    "reference": replace(
        KERNELS["reference"], capability=replace(KERNELS["reference"].capability, schemes=Open({PLAIN}))
    ),
}

NVIDIA = frozenset(
    {
        "torch.grouped_mm", "torch.scaled_grouped_mm", "triton", "moe_fx.triton", "flashinfer", "cutlass_dsl",
        "deep_gemm", "vllm", "triton_kernels", "humming", "hpc",
    }
)  # fmt: skip
AMD = frozenset({"torch.grouped_mm", "triton", "moe_fx.triton", "triton_kernels", "aiter"})
INTEL = frozenset({"triton", "moe_fx.triton", "vllm_xpu_kernels"})
HOST = frozenset({"torch.grouped_mm", "vllm_cpu", "zentorch"})


def _with(like: str, packages: frozenset[str], **changes: Any) -> Device:
    return replace(catalogue()[like], installed=packages, **changes)


DEVICES: dict[str, Device] = {
    **{name: _with(name, NVIDIA) for name in ("h100", "h200", "b200", "a100", "rtx5090")},
    "mi300x": _with("mi300x", AMD),
    "mi355x": _with("mi300x", AMD, arch="gfx950", name="AMD Instinct MI355X"),
    "xeon_amx": _with("xeon_amx", HOST),
    "zen5_epyc_64": _with("zen5_epyc_64", HOST),
    "xe_max1550": _with("xe_max1550", INTEL),
    "xe2": _with("xe_max1550", INTEL, arch="xe2", name="Intel Arc B580"),
    "tpu_v5p": _with("tpu_v5p", frozenset()),
    "hpu": _with("generic_cpu", frozenset(), kind="hpu", arch="gaudi3", name="Intel Gaudi 3"),
}
SCHEMES: dict[str, Scheme] = {
    "bf16": PLAIN,
    "fp8 block": (FP8_BLOCK, FP8_GROUP),
    "fp8 tensor": (FP8_TENSOR, FP8_TENSOR),
    "fp8 channel": (FP8_CHANNEL, FP8_TOKEN),
    "int8": (INT8_CHANNEL, INT8_TOKEN),
    "int4": (int_group(4, 128), None),
    "int4 zero": (int_group(4, 128, zero_points=True), None),
    "mxfp4": (MXFP4, None),
    "mxfp4 mxfp8": (MXFP4, MXFP8_DYNAMIC),
    "mxfp8": (MXFP8, MXFP8_DYNAMIC),
    "nvfp4": (NVFP4, NVFP4_DYNAMIC),
    "w4a8": (int_group(4, 128), FP8_TOKEN),
}
_make = FusedMoEParallelConfig.make
RANKS: dict[str, FusedMoEParallelConfig] = {
    "one": _make(),
    "tp2": _make(tp_size=2),
    "ep2": _make(tp_size=2, use_ep=True),
    **{
        f"dp2 ep2 {name}": _make(dp_size=2, use_ep=True, all2all_backend=name)
        for name in (
            "allgather_reducescatter", "deepep_low_latency", "deepep_high_throughput", "deepep_v2",
            "flashinfer_nvlink_one_sided", "flashinfer_nvlink_two_sided",
        )
    },
}  # fmt: skip
ROUTERS = {
    "qwen3-30b-a3b": RoutingMethodType.RenormalizeNaive,
    "mixtral-8x7b": RoutingMethodType.Renormalize,
    "deepseek-v3": RoutingMethodType.DeepSeekV3,
    "gpt-oss-20b": RoutingMethodType.Renormalize,
}


def _act_in_float32(name: str) -> Any:
    spec, _ = MODELS[name]
    return replace(spec, expert=replace(spec.expert, act_dtype="float32"))


LAYERS = {name: spec for name, (spec, _) in MODELS.items()} | {"act in float32": _act_in_float32("qwen3-30b-a3b")}


@dataclass(frozen=True)
class Situation:
    """packages: names taken away from the device's.  others: further fields of FusedMoEConfig."""

    device: str
    scheme: str
    layer: str = "qwen3-30b-a3b"
    ranks: str = "one"
    request: str = "auto"
    without: tuple[str, ...] = ()
    order: str = "seed"
    others: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.device, self.scheme, self.layer, self.ranks, self.request]
        if self.without:
            parts.append("without " + " ".join(self.without))
        parts += [self.order, *(f"{name}={value}" for name, value in self.others.items())]
        return " | ".join(parts)

    @property
    def asked(self) -> Asked:
        device = DEVICES[self.device]
        fields = dict(
            moe_parallel_config=RANKS[self.ranks],
            moe_backend=self.request,
            routing_method=ROUTERS.get(self.layer, RoutingMethodType.Unspecified),
        )
        config = FusedMoEConfig.of(LAYERS[self.layer], torch.bfloat16, **fields)
        config = replace(config, **self.others)
        return Asked(config, replace(device, installed=device.installed - {*self.without}), SCHEMES[self.scheme])


def situations() -> Iterator[Situation]:
    """Every scheme on every device; then every other axis on the devices and schemes where it decides something."""
    for device in DEVICES:
        for scheme in SCHEMES:
            yield Situation(device, scheme)
    for device in ("h100", "b200", "mi300x", "a100", "zen5_epyc_64"):
        for scheme in ("bf16", "fp8 block"):
            for ranks in RANKS:
                if ranks != "one":
                    yield Situation(device, scheme, ranks=ranks)
    for device in ("h100", "b200", "a100", "mi300x", "xe2", "xeon_amx"):
        for scheme in ("bf16", "fp8 block", "fp8 tensor"):
            for ranks in ("one", "ep2"):
                yield Situation(device, scheme, ranks=ranks, order="today")
    yield Situation("b200", "fp8 block", ranks="dp2 ep2 deepep_v2", order="today")
    for device in ("h100", "b200", "mi300x", "xeon_amx"):
        for scheme in ("bf16", "fp8 block", "mxfp4"):
            for layer in LAYERS:
                if layer not in ("qwen3-30b-a3b", "switch-base-8", "jetmoe-8b"):
                    yield Situation(device, scheme, layer)
    for gone in (("flashinfer",), ("flashinfer", "deep_gemm"), ("flashinfer", "deep_gemm", "moe_fx.triton")):
        for device in ("h100", "b200", "a100"):
            for scheme in ("bf16", "fp8 block", "fp8 tensor", "nvfp4", "mxfp4"):
                if scheme != "bf16" or "moe_fx.triton" not in gone:
                    yield Situation(device, scheme, without=gone)
    for device in ("h100", "b200", "mi300x"):
        for scheme in ("bf16", "fp8 block", "mxfp4"):
            for request in ("triton", "flashinfer_cutlass", "flashinfer_trtllm", "aiter"):
                yield Situation(device, scheme, request=request)
            for name in ("is_lora_enabled", "batch_invariant"):
                yield Situation(device, scheme, others={name: True})
    for scheme, request in (("bf16", "triton"), ("fp8 block", "deep_gemm"), ("mxfp4", "marlin")):
        yield Situation("h100", scheme, ranks="dp2 ep2 deepep_low_latency", request=request)
    yield Situation("h100", "bf16", others={"in_dtype": torch.float64})
    yield Situation("b200", "bf16", others={"router_logits_dtype": torch.float64})


def short(situation: Situation) -> dict[str, Any]:
    asked = situation.asked
    oracle = oracle_for(asked.scheme)
    assert oracle is not None
    verdicts = oracle.verdicts(asked, situation.order, CANDIDATES)
    vetoed: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.reasons:
            codes = " ".join(sorted({r.code.removeprefix("veto.") for r in verdict.reasons}))
            vetoed.setdefault(codes, []).append(verdict.candidate)
    of = {status: [v.candidate for v in verdicts if v.status == status] for status in ("chosen", "survived")}
    return {
        "chosen": " ".join(of["chosen"]),
        "survived": " ".join(of["survived"]),
        "vetoed": {codes: " ".join(candidates) for codes, candidates in sorted(vetoed.items())},
    }


def produce() -> dict[str, dict[str, Any]]:
    return {str(situation): short(situation) for situation in situations()}


def accepted() -> dict[str, dict[str, Any]]:
    return json.loads(PATH.read_text())


def accept() -> None:
    PATH.write_text(json.dumps(produce(), indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare the selections with golden_selections.json.")
    parser.add_argument("--accept", action="store_true", help="write the selections of today")
    if parser.parse_args().accept:
        accept()
    else:
        now, then = produce(), accepted()
        changed = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
        print("\n".join(changed) or "no change")
        raise SystemExit(bool(changed))
