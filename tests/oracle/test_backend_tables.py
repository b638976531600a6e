"""What holds for the tables of all schemes: names, orders, what libraries list, closed worlds."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from moe_fx.kernels.capability import PLAIN, Capability, Open
from moe_fx.kernels.config import (
    ALL2ALL_BACKENDS,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from moe_fx.kernels.config.moe import FIELD_ACTIVATIONS
from moe_fx.kernels.ladder import LADDER
from moe_fx.kernels.layouts.packed import TABLE
from moe_fx.kernels.libraries import LIBRARIES, Library, library
from moe_fx.kernels.registry import KERNELS as REGISTERED
from moe_fx.oracle import Request
from moe_fx.oracle.backends import Backend, kernel_reasons
from moe_fx.oracle.conditions import Asked
from moe_fx.oracle.engine import GRID
from moe_fx.oracle.price import seconds, workload
from moe_fx.oracle.priority import ORACLES, oracle_for
from moe_fx.quant import (
    GroupShape,
    QuantKey,
)
from moe_fx.reference import ACTIVATIONS

from .candidates import KERNELS, MODELS, moe
from .golden_selection import CANDIDATES, DEVICES, SCHEMES

CONFIG = FusedMoEConfig(8, 2, 256, 8, intermediate_size=128)
H100 = DEVICES["h100"]


def asked(device: str = "h100", scheme: str = "bf16", **config) -> Asked:
    return Asked(replace(CONFIG, **config), DEVICES[device], SCHEMES[scheme])


COST = KERNELS["loop"].cost


# --- every table


def cells() -> list[tuple[str, Backend, str]]:
    return [
        (oracle.name, row, name)
        for oracle in ORACLES.values()
        for row in oracle.table
        for name in (*row.kernels, *row.lora)
    ]


def test_tables_name_only_kernels_that_are_registered_or_described() -> None:
    unknown = {name for _, _, name in cells()} - {*LIBRARIES, *REGISTERED}
    assert not unknown


def test_orders_hold_every_backend_once_and_leave_out_only_what_is_opt_in() -> None:
    left_out = set()
    for oracle in ORACLES.values():
        members = [row.member for row in oracle.table]
        assert len(set(members)) == len(members)
        for name in ("seed", "today"):
            order = oracle.orders[name].members
            assert len(set(order)) == len(order)
            assert set(order) <= set(members)
            left_out |= {f"{oracle.name}/{m.name}" for m in set(members) - set(order)}
    assert left_out == {"mxfp4/TRITON_UNFUSED", "mxfp4/DEEPGEMM_MXFP4"}


def test_moves_and_refusals_name_members_of_their_order() -> None:
    for oracle in ORACLES.values():
        for order in oracle.orders.values():
            for move in order.moves:
                anchor = () if move.anchor is None else (move.anchor,)
                assert (move.to in ("front", "back")) == (not anchor)
                assert {*anchor} <= set(order.members)
                assert {*move.members} & set(order.members)
            for refusal in order.refusals:
                assert bool(refusal.members) != bool(refusal.but)


def test_monolithic_kernels_stand_before_modular_ones() -> None:
    for _, row, _ in cells():
        kinds = [LIBRARIES[n].capability.monolithic for n in row.kernels if n in LIBRARIES]
        assert kinds == sorted(kinds, reverse=True), row


def test_twins_take_batches_and_their_originals_lists() -> None:
    twins = [(o, row) for o in ORACLES.values() for row in o.table if row.twin is not None]
    assert len(twins) >= 7
    for oracle, row in twins:
        assert not any(CANDIDATES[n].capability.batched for n in row.kernels)
        assert all(CANDIDATES[n].capability.batched for n in oracle.backend(row.twin).kernels)


def fitting(name: str) -> Asked:
    """A case made from what the row of the library lists."""
    capability = LIBRARIES[name].capability
    archs = capability.archs or {"any"}
    device = replace(
        H100, kind=min(capability.devices), arch=min(archs), installed=capability.packages, memory_bytes=2**40
    )
    act = next(n for n, (a, gated) in FIELD_ACTIVATIONS.items() if a in capability.activations and gated)
    carriers = sorted(capability.all2all - {"none"})
    spread = FusedMoEParallelConfig.make(dp_size=2, use_ep=True, all2all_backend=carriers[0]) if carriers else None
    stays = "none" in capability.all2all and not capability.batched
    config = FusedMoEConfig(
        16,
        2,
        1024,
        16,
        FusedMoEParallelConfig() if stays else spread,
        activation=act,
        intermediate_size=512,
        routing_method=RoutingMethodType[min(capability.routing)] if capability.monolithic else CONFIG.routing_method,
    )
    return Asked(config, device)


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_row_contradicts_itself(name: str) -> None:
    """Each of its schemes runs on a machine, a layer and ranks made from its own lists, and belongs to a table."""
    for scheme in LIBRARIES[name].capability.schemes:
        assert kernel_reasons(name, scheme, fitting(name), CANDIDATES) == ()
        assert oracle_for(scheme) is not None


@pytest.mark.parametrize(("scheme", "row", "name"), [c for c in cells() if c[2] in LIBRARIES])
def test_every_kernel_of_a_backend_has_a_scheme_of_its_table(scheme: str, row: Backend, name: str) -> None:
    """With inputs as they are where the backend's other kernels round them (Humming's for fp8)."""
    oracle, known = ORACLES[scheme], LIBRARIES[name].capability.schemes
    asked_for = {row.question_scheme(s) for s in oracle.schemes}
    assert any(s in known for s in asked_for | {(weights, None) for weights, _ in asked_for})


def test_packed_layouts_that_libraries_name_are_there() -> None:
    assert {row.layout for row in LIBRARIES.values()} - {""} <= set(TABLE)


def test_a_library_of_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(KeyError, match=r"no library 'abacus'; known: triton, "):
        library("abacus")
    assert library("marlin").name == "marlin"
    assert isinstance(library("marlin"), Library)


@pytest.mark.parametrize("name", LIBRARIES)
def test_prices_of_libraries_are_positive_and_grow(name: str) -> None:
    work = workload(MODELS["qwen3-30b-a3b"][0], Request("bfloat16"), H100)
    prices = [seconds(LIBRARIES[name].cost, work)(t) for t in GRID]
    assert prices[0] > 0
    assert prices == sorted(prices)
    assert all(share > 0 for _, share in LIBRARIES[name].cost.efficiency)


# --- closed world

SPEC = moe(8, 2, 256, 128)


def layer(part: str, name: str, value: str) -> FusedMoEConfig:
    changed = replace(getattr(SPEC, part), **{name: value})
    return FusedMoEConfig.of(replace(SPEC, **{part: changed}), torch.bfloat16)


DUMMIES = [
    *(("expert", name) for name in ("act", "norm", "act_dtype", "compute_dtype")),
    *(("combine", name) for name in ("weight_on", "accumulate", "out_dtype")),
]


@pytest.mark.parametrize(("part", "name"), DUMMIES)
@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_a_value_nobody_lists_vetoes_every_candidate_but_the_reference(oracle, part: str, name: str) -> None:
    for device in DEVICES.values():
        case = Asked(layer(part, name, "dummy"), device, oracle.schemes[0])
        for verdict in oracle.verdicts(case, candidates=CANDIDATES):
            said = any("'dummy'" in reason.text for reason in verdict.reasons)
            assert said == (not verdict.candidate.endswith(("/", "/reference"))), verdict.candidate


UNKNOWN = QuantKey("float6_e2m3", GroupShape(3, 5))


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_a_device_a_dtype_a_scheme_and_a_carrier_nobody_lists(oracle) -> None:
    ours = ("/", "/reference", "/sorted_loop", "/batched_loop")  # of any scheme; the reference of anything

    def vetoed(case: Asked, code: str, but: tuple[str, ...]) -> None:
        for verdict in oracle.verdicts(case, candidates=CANDIDATES):
            assert any(r.code == code for r in verdict.reasons) or verdict.candidate.endswith(but), verdict.candidate

    scheme = oracle.schemes[0]
    vetoed(Asked(CONFIG, replace(H100, kind="abacus"), scheme), "veto.device", ("/", "/reference"))
    vetoed(Asked(replace(CONFIG, in_dtype=torch.float8_e5m2), H100, scheme), "veto.dtype", ("/", "/reference"))
    vetoed(Asked(CONFIG, H100, (UNKNOWN, UNKNOWN)), "veto.scheme", ours)
    carried = FusedMoEParallelConfig.make(dp_size=2, use_ep=True)
    object.__setattr__(carried, "all2all_backend", "pigeon")
    vetoed(Asked(replace(CONFIG, moe_parallel_config=carried), H100, scheme), "veto.parallel", ("/", "/reference"))


def test_an_architecture_nobody_lists_vetoes_all_that_list_any() -> None:
    for oracle in ORACLES.values():
        for verdict in oracle.verdicts(
            Asked(CONFIG, replace(H100, arch="sm999"), oracle.schemes[0]), candidates=CANDIDATES
        ):
            name = verdict.candidate.partition("/")[2]
            if name and CANDIDATES[name].capability.archs is not None:
                assert any(r.code == "veto.device" for r in verdict.reasons), name


def test_capabilities_list_only_values_that_exist() -> None:
    """A misspelt value in a set would be a veto that nobody sees."""
    known = {
        "devices": {"cpu", "cuda", "rocm", "xpu"},
        "dtypes": {"bfloat16", "float16", "float32"},
        "activations": {name for name, _ in ACTIVATIONS},
        "forms": {"stacked"},
        "norms": {""},
        "weight_on": {"output", "input"},
        "orders": {"gate_up", "up_gate", "interleaved"},
        "all2all": {"none", *ALL2ALL_BACKENDS},
        "routing": {kind.name for kind in RoutingMethodType},
        "logits": {"bfloat16", "float16", "float32"},
    }
    for row in LIBRARIES.values():
        for name, allowed in known.items():
            assert set(getattr(row.capability, name)) <= allowed, (row.name, name)
        assert row.capability.monolithic == bool(row.capability.routing)
        assert {type(getattr(row.capability, f.name)) for f in fields(Capability)} & {Open} == set()


def test_every_rule_of_the_ladder_vetoes_some_candidate_somewhere() -> None:
    met: set[str] = set()
    cases = [
        asked("h100", activation="gelu"),
        asked("h100", has_bias=True),
        asked("h100", is_lora_enabled=True),
        asked("h100", batch_invariant=True),
        asked("b200", router_logits_dtype=torch.float64),
        asked("h100", in_dtype=torch.float64),
        asked("h100", hidden_dim=250),
        Asked(layer("expert", "norm", "rms"), H100),
        Asked(layer("expert", "act_dtype", "float32"), H100),
        Asked(layer("combine", "out_dtype", "float32"), H100),
        asked("h100", moe_parallel_config=FusedMoEParallelConfig.make(dp_size=2, use_ep=True, all2all_backend="pplx")),
    ]
    for case in cases:
        met |= {r.code for v in oracle_for(PLAIN).verdicts(case, candidates=CANDIDATES) for r in v.reasons}
    met |= {
        r.code for v in ORACLES["fp8"].verdicts(asked("h100", "fp8 channel"), candidates=CANDIDATES) for r in v.reasons
    }
    assert met >= {
        "veto.device", "veto.package", "veto.activation", "veto.scheme", "veto.parallel", "veto.routing", "veto.shape",
        "veto.format", "veto.invariance", "veto.lora", "veto.dtype", "veto.spec", "veto.bias", "veto.norm",
        "veto.combine",
    }  # fmt: skip
    assert len(LADDER) == 23
