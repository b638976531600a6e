from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from moe_fx.binding import Operand
from moe_fx.hardware import catalogue
from moe_fx.kernels.ladder import LADDER
from moe_fx.kernels.registry import Kernel
from moe_fx.oracle import Request, choose
from moe_fx.oracle.vetoes import IRRELEVANT, RULES, Case, vetoes
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec

from .candidates import IN_OUT, KERNELS, NARROW, STACKED, binding, described, moe

BF16 = Request("bfloat16")
SPEC = moe(8, 2, 64, 96)
DEVICE = catalogue()["zen5_epyc_2"]
NARROWEST = described(  # lists nothing but the defaults
    "narrowest",
    1,
    KERNELS["loop"].cost,
    activations=frozenset({"silu"}),
    gated=frozenset({True}),
    biases=False,
    **dict.fromkeys(("norms", "act_dtypes", "compute_dtypes", "accumulate", "out_dtypes"), NARROW),
    weight_on=frozenset({"output"}),
)


def case(kernel: Kernel | str = "loop", layout: str = "view", **changes: Any) -> Case:
    given = dict(spec=SPEC, binding=STACKED, request=BF16, device=DEVICE) | changes
    return Case(kernel=KERNELS[kernel] if isinstance(kernel, str) else kernel, layout=layout, **given)


def codes(subject: Case) -> list[str]:
    return [reject.code for reject in vetoes(subject)]


def with_expert(**changes: Any) -> MoESpec:
    return replace(SPEC, expert=replace(SPEC.expert, **changes))


# --- closed world

READ = {path for rule in (*LADDER, *RULES) for path in rule.reads}
ALL_FIELDS = [
    f"{prefix}.{f.name}"
    for prefix, cls in (
        ("spec.expert", ExpertSpec),
        ("spec.combine", CombineSpec),
        ("spec", MoESpec),
        ("binding", Operand),
        ("request", Request),
    )
    for f in fields(cls)
    if f"{prefix}.{f.name}" not in ("spec.expert", "spec.combine")
]


@pytest.mark.parametrize("path", ALL_FIELDS)
def test_every_field_is_read_by_a_rule_or_declared_irrelevant(path: str) -> None:
    assert (path in READ) != (path in IRRELEVANT)


def test_tables_name_nothing_that_does_not_exist() -> None:
    derived = {"device.kind", "device.arch", "device.installed", "device.memory_bytes", "weights", "all2all", "batched"}
    derived |= {f"config.{n}" for n in ("use_ep", "router_logits_dtype", "batch_invariant", "is_lora_enabled")}
    assert READ | set(IRRELEVANT) == set(ALL_FIELDS) | derived
    assert all(IRRELEVANT.values())


DUMMIES = [
    *((ExpertSpec, name, "dummy") for name in ("act", "norm", "act_dtype", "compute_dtype")),
    *((CombineSpec, name, "dummy") for name in ("weight_on", "accumulate", "out_dtype")),
]


@pytest.mark.parametrize(("part", "name", "value"), DUMMIES)
@pytest.mark.parametrize("device", ["zen5_epyc_2", "h100"])
def test_a_value_nobody_lists_vetoes_every_kernel_but_the_reference(
    part: type, name: str, value: str, device: str
) -> None:
    spec = (
        with_expert(**{name: value})
        if part is ExpertSpec
        else replace(SPEC, combine=replace(SPEC.combine, **{name: value}))
    )
    for kernel in KERNELS.values():
        rejects = vetoes(case(kernel, spec=spec, device=catalogue()[device]))
        assert any(value in r.text for r in rejects) == (kernel.name != "reference"), kernel.name
    plan = choose(spec, STACKED, BF16, catalogue()[device], KERNELS)
    assert [(r.t_min, r.t_max, r.kernel) for r in plan.ranges] == [(1, None, "reference")]
    said = {v.candidate: v.status for v in plan.verdicts}
    assert said["reference/view"] == "chosen"
    assert set(said.values()) == {"chosen", "vetoed"}


@pytest.mark.parametrize("path", [p for p in ALL_FIELDS if p.startswith(("spec.expert", "spec.combine"))])
def test_the_narrowest_kernel_refuses_every_change_that_is_not_declared_irrelevant(path: str) -> None:
    _, part, name = path.split(".")
    old = getattr(getattr(SPEC, part), name)
    new = (not old) if isinstance(old, bool) else f"other {old}" if isinstance(old, str) else old * 2 or 1
    changed = replace(SPEC, **{part: replace(getattr(SPEC, part), **{name: new})})  # type: ignore[arg-type]
    sizes = [f"spec.expert.{n}" for n in ("experts", "hidden", "intermediate")]  # doubled they still fit
    assert bool(codes(case(NARROWEST, spec=changed))) == (path not in IRRELEVANT and path not in sizes)


# --- each rule


def test_nothing_speaks_against_a_fitting_candidate() -> None:
    assert codes(case()) == [] == codes(case("grouped")) == codes(case("reference"))


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (case("fused_gpu"), ["veto.device", "veto.package"]),
        (case("grouped", device=catalogue()["arm_neon"]), ["veto.package"]),
        (case("grouped", request=Request("float16")), ["veto.dtype"]),
        (case("grouped", request=Request("float16", "bfloat16")), []),
        (case("grouped", request=Request("bfloat16", "float16")), ["veto.dtype"]),
        (case("fused_cpu", spec=with_expert(compute_dtype="float32")), ["veto.dtype"]),
        (case("fused_cpu", spec=with_expert(act="relu2")), ["veto.activation"]),
        (case(NARROWEST, spec=with_expert(gated=False)), ["veto.activation"]),
        (case("fused_cpu", spec=with_expert(act_dtype="float32")), ["veto.spec"]),
        (case("fused_cpu", spec=with_expert(w2_bias=True)), ["veto.bias"]),
        (case("fused_cpu", spec=with_expert(norm="rms")), ["veto.norm"]),
        (case("gather", spec=replace(SPEC, combine=CombineSpec(weight_on="input"))), ["veto.combine"]),
        (case("fused_cpu", spec=replace(SPEC, combine=CombineSpec(accumulate="float64"))), ["veto.combine"]),
        (case("grouped", spec=moe(8, 2, 60, 97)), ["veto.shape"]),
        (case("gather", binding=binding("w1", "w3", "w2", form="list")), ["veto.storage"]),
        (case("fused_cpu", binding=binding("w13", "w2", form="flat")), ["veto.storage"]),
        (case("fused_cpu", request=Request("bfloat16", training=True)), ["veto.training"]),
        (case("loop", request=Request("bfloat16", captured=True)), []),  # no graphs on a CPU
        (case("fused_cpu", binding=IN_OUT), []),
        (case("loop", "stacked"), ["veto.storage"]),
        (case("loop", "stacked", request=Request("bfloat16", memory="copy")), []),
        (case("gather", "stacked", request=Request("bfloat16", memory="copy"), binding=binding("w1", form="list")), []),
        (case("loop", "transposed", request=Request("bfloat16", memory="copy", training=True)), ["veto.storage"]),
        (case("loop", request=Request("bfloat16", kernel="grouped")), ["veto.request"]),
        (case("reference", request=Request("bfloat16", layout="stacked")), ["veto.request"]),
    ],
    ids=lambda value: value.candidate if isinstance(value, Case) else "",
)
def test_rule(subject: Case, expected: list[str]) -> None:
    assert codes(subject) == expected


def test_all_reasons_are_kept() -> None:
    spec = replace(with_expert(act="relu2", norm="rms", w13_bias=True), combine=CombineSpec(out_dtype="float64"))
    subject = case(NARROWEST, spec=spec, request=Request("bfloat16", kernel="loop"))
    assert codes(subject) == ["veto.activation", "veto.bias", "veto.norm", "veto.combine", "veto.request"]
    assert {reject.where for reject in vetoes(subject)} == {"narrowest"}


def test_a_copy_must_fit_beside_the_original_unless_it_replaces_it() -> None:
    weights = 3 * 8 * 64 * 96 * 2
    small = replace(DEVICE, memory_bytes=2 * weights - 1)
    assert codes(case(layout="stacked", request=Request("bfloat16", memory="copy"), device=small)) == ["veto.storage"]
    assert codes(case(layout="stacked", request=Request("bfloat16", memory="replace"), device=small)) == []
    assert codes(case(device=small)) == []
