from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from moe_fx.hardware import catalogue
from moe_fx.kernels.registry import Cost
from moe_fx.oracle import Request, choose
from moe_fx.oracle.engine import GRID, INLINE_MOST, INLINE_PRICE
from moe_fx.oracle.price import seconds, workload
from moe_fx.plan import Plan, Range
from moe_fx.reasons import MoEFxOptionError, MoEFxUnsupportedError

from .candidates import IN_OUT, KERNELS, MODELS, STACKED, described, moe

DEVICE = catalogue()["zen5_epyc_2"]
OLMOE = MODELS["olmoe-1b-7b"][0]


def plan(request: Request, spec=OLMOE, binding=STACKED, device=DEVICE, kernels=KERNELS) -> Plan:
    return choose(spec, binding, request, device, kernels)


# --- explicit requests


def test_a_requested_kernel_is_used_for_all_tokens() -> None:
    chosen = plan(Request("bfloat16", kernel="gather"))
    assert [(r.t_min, r.t_max, r.kernel) for r in chosen.ranges] == [(1, None, "gather")]
    assert {v.status for v in chosen.verdicts if not v.candidate.startswith("gather/view")} == {"vetoed"}


@pytest.mark.parametrize("policy", ["price", "priority"])
def test_the_reference_can_be_requested(policy: str) -> None:
    assert plan(Request("bfloat16", kernel="reference", policy=policy)).kernel_for(7) == "reference"  # type: ignore[arg-type]


def test_a_requested_layout_is_used() -> None:
    assert plan(Request("bfloat16", layout="transposed", memory="copy")).layout == "transposed"


def test_a_vetoed_kernel_raises_with_every_reason() -> None:
    spec = moe(8, 2, 64, 96, act="relu2", norm="rms")
    with pytest.raises(MoEFxUnsupportedError) as caught:
        plan(Request("float32", kernel="fused_gpu"), spec)
    message = str(caught.value)
    for code in ("device", "package", "dtype", "activation", "norm", "storage"):
        assert f"veto.{code}: " in message
    for text in ("kernel='fused_gpu'", "'relu2'", "'rms'", "'triton'", DEVICE.name, str(spec), "fused_gpu/transposed"):
        assert text in message
    assert "gather" not in message  # only what was asked for


def test_a_vetoed_layout_raises_and_says_what_to_allow() -> None:
    with pytest.raises(MoEFxUnsupportedError, match="memory='view' forbids it; allow 'copy'"):
        plan(Request("bfloat16", layout="stacked"))
    with pytest.raises(MoEFxUnsupportedError, match="require gradients"):
        plan(Request("bfloat16", layout="stacked", memory="copy", training=True))


def test_a_vetoed_pair_raises_although_each_alone_could_be_had() -> None:
    kernels = KERNELS | {"lists": described("lists", 5, Cost("active", lambda E, T, k: 1), forms=frozenset({"list"}))}
    plan(Request("bfloat16", kernel="lists"), binding=MODELS["switch-base-8"][1], kernels=kernels)
    plan(Request("bfloat16", layout="stacked", memory="copy"), kernels=kernels)
    with pytest.raises(MoEFxUnsupportedError, match=r"kernel='lists' and layout='stacked'.*\n  lists/stacked: veto"):
        plan(Request("bfloat16", kernel="lists", layout="stacked", memory="copy"), kernels=kernels)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(memory="mirror"), "'replace'"),
        (dict(policy="luck"), "'priority'"),
        (dict(layout="sideways"), "'transposed'"),
        (dict(dtype="float33"), "float33"),
        (dict(dtype="int8"), "not a floating dtype"),
        (dict(weight_dtype="brain"), "brain"),
    ],
)
def test_a_wrong_request_is_a_named_error(wrong: dict, said: str) -> None:
    with pytest.raises(MoEFxOptionError, match=said):
        Request(**({"dtype": "bfloat16"} | wrong))


def test_an_unknown_kernel_lists_the_known() -> None:
    with pytest.raises(MoEFxOptionError, match=r"'warp'; known: dense, fused_cpu, .*, reference"):
        plan(Request("bfloat16", kernel="warp"))


def test_candidates_without_the_reference_are_refused() -> None:
    with pytest.raises(ValueError, match="'reference' must be among"):
        plan(Request("bfloat16"), kernels={"loop": KERNELS["loop"]})


# --- defaults


def test_the_reference_never_wins_by_price() -> None:
    free = replace(KERNELS["reference"], cost=Cost("active", lambda E, T, k: 0, ((1, 1.0),)), rank=0)
    for policy in ("price", "priority"):
        chosen = plan(Request("bfloat16", policy=policy), kernels=KERNELS | {"reference": free})  # type: ignore[arg-type]
        assert all(r.kernel != "reference" for r in chosen.ranges)


def test_only_the_reference_is_left_where_nothing_else_fits() -> None:
    chosen = plan(Request("float64"), MODELS["dbrx"][0], MODELS["dbrx"][1], catalogue()["tpu_v5p"])
    assert chosen.op_string() == "plan/1 layout=view ranges=reference:1- backward=recompute"
    vetoed = [v for v in chosen.verdicts if v.status == "vetoed"]
    assert len(vetoed) == len(chosen.verdicts) - 1
    assert all(v.reasons for v in vetoed)


def test_every_candidate_has_a_verdict_with_prices_or_reasons() -> None:
    chosen = plan(Request("bfloat16", memory="copy"))
    assert [v.candidate for v in chosen.verdicts] == [
        f"{kernel.name}/{layout}"
        for kernel in sorted(KERNELS.values(), key=lambda k: (k.rank, k.name))
        for layout in ("view", "stacked", "transposed")
    ]
    for verdict in chosen.verdicts:
        assert bool(verdict.reasons) != bool(verdict.price_us)
        assert len(verdict.price_us) in (0, len(chosen.priced_at))
    assert {v.candidate for v in chosen.verdicts if v.status == "chosen"} == {
        f"{r.kernel}/{chosen.layout}" for r in chosen.ranges
    }


def test_priority_takes_the_lowest_rank_whatever_the_price() -> None:
    chosen = plan(Request("bfloat16", policy="priority"))
    assert [(r.t_min, r.t_max, r.kernel) for r in chosen.ranges] == [(1, None, "fused_cpu")]
    listed = plan(Request("bfloat16", policy="priority", memory="copy"), binding=MODELS["switch-base-8"][1])
    assert (listed.layout, listed.kernel_for(1)) == ("stacked", "fused_cpu")


# --- kernels for a compiler


def test_a_compiled_kernel_stands_in_the_graph_while_it_is_cheaper() -> None:
    kernels = {name: KERNELS[name] for name in ("reference", "gather", "inlined")}
    chosen = plan(Request("bfloat16", compiled=True), kernels=kernels)
    assert chosen.inline is not None
    assert (chosen.inline.kernel, chosen.inline.t_min) == ("inlined", 1)
    assert chosen.ranges == plan(Request("bfloat16"), kernels=kernels).ranges
    last = chosen.inline.t_max
    assert last is not None
    spec, _ = MODELS["olmoe-1b-7b"]
    work = workload(spec, Request("bfloat16", compiled=True), catalogue()["zen5_epyc_2"])
    price = {name: seconds(kernel.cost, work) for name, kernel in KERNELS.items()}
    assert last == INLINE_MOST or price["inlined"](last + 1) >= INLINE_PRICE * price[chosen.kernel_for(last + 1)](
        last + 1
    )
    assert price["inlined"](last) < INLINE_PRICE * price[chosen.kernel_for(last)](last)


@pytest.mark.parametrize(
    "request_",
    [
        Request("bfloat16"),
        Request("bfloat16", compiled=True, training=True),
        Request("bfloat16", compiled=True, kernel="loop"),
    ],
    ids=["not compiled", "training", "another was asked for"],
)
def test_no_compiled_kernel_where(request_: Request) -> None:
    assert plan(request_).inline is None


def test_a_compiled_kernel_that_is_asked_for_serves_every_number_of_tokens() -> None:
    chosen = plan(Request("bfloat16", compiled=True, kernel="inlined"))
    assert chosen.inline == Range(1, None, "inlined")
    with pytest.raises(MoEFxUnsupportedError, match=r"veto.compiler"):
        plan(Request("bfloat16", kernel="inlined"))


def test_training_saves_what_every_kernel_can_save() -> None:
    assert plan(Request("bfloat16", training=True)).backward == "save"
    assert plan(Request("bfloat16")).backward == "recompute"
    recomputing = {
        name: replace(
            kernel, capability=replace(kernel.capability, backward=kernel.capability.backward and "recompute")
        )
        for name, kernel in KERNELS.items()
    }
    assert plan(Request("bfloat16", training=True), kernels=recomputing).backward == "recompute"


# --- layout and ranges


def test_a_copy_is_made_only_where_it_admits_a_better_kernel() -> None:
    copying = Request("bfloat16", memory="copy")
    assert plan(copying).layout == plan(copying, binding=IN_OUT).layout == "view"
    assert plan(copying, binding=MODELS["switch-base-8"][1]).layout == "stacked"


def test_equal_prices_go_to_the_lower_rank_and_the_view() -> None:
    twin = replace(KERNELS["fused_cpu"], name="aaa_twin", rank=11)
    chosen = plan(Request("bfloat16", memory="copy"), kernels=KERNELS | {"aaa_twin": twin})
    assert (chosen.layout, {r.kernel for r in chosen.ranges} & {"aaa_twin"}) == ("view", set())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("device", ["h100", "zen5_epyc_2", "zen5_epyc_64", "arm_neon", "xeon_amx"])
def test_crossings_are_exact(model: str, device: str) -> None:
    """At both ends of every range its kernel is the cheapest, and just outside it is not."""
    spec, binding = MODELS[model]
    request = Request("bfloat16")
    chosen = choose(spec, binding, request, catalogue()[device], KERNELS)
    names = {v.candidate.split("/")[0] for v in chosen.verdicts if v.price_us} - {"reference"} or {"reference"}
    work = workload(spec, request, catalogue()[device])
    price = {name: seconds(KERNELS[name].cost, work) for name in names}
    rank = {name: KERNELS[name].rank for name in names}

    def cheapest(tokens: int) -> str:
        return min(names, key=lambda name: (price[name](tokens), rank[name], name))

    for r in chosen.ranges:
        assert cheapest(r.t_min) == r.kernel == cheapest(r.t_max or GRID[-1])
        assert r.t_min == 1 or cheapest(r.t_min - 1) != r.kernel
    assert all(cheapest(t) == chosen.kernel_for(t) for t in GRID)


def test_the_order_of_the_kernels_does_not_matter() -> None:
    names = list(KERNELS)
    random.Random(0).shuffle(names)
    assert plan(Request("bfloat16"), kernels={n: KERNELS[n] for n in names}) == plan(Request("bfloat16"))


def test_a_plan_replays_from_json_text() -> None:
    chosen = plan(Request("bfloat16", memory="copy"), binding=MODELS["switch-base-8"][1])
    assert Plan.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
