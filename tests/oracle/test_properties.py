from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_fx.hardware import catalogue
from moe_fx.kernels.registry import Cost
from moe_fx.oracle import Request, choose
from moe_fx.oracle.engine import GRID
from moe_fx.oracle.price import TRAFFIC, seconds, workload
from moe_fx.plan import Plan, parse_plan
from moe_fx.spec import CombineSpec, MoESpec

from .candidates import IN_OUT, KERNELS, STACKED, binding, moe

few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def specs(draw: st.DrawFn) -> MoESpec:
    experts = draw(st.integers(1, 512))
    k = draw(st.integers(1, min(experts, 16)))
    sizes = st.integers(1, 16384)
    return moe(
        experts,
        k,
        draw(sizes),
        draw(sizes),
        CombineSpec(draw(st.sampled_from(["output", "input"])), draw(st.sampled_from(["", "float32"]))),
        act=draw(st.sampled_from(["silu", "gelu", "relu2", "unheard_of"])),
        gated=draw(st.booleans()),
        w13_bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["", "rms"])),
    )


requests = st.builds(
    Request,
    dtype=st.sampled_from(["bfloat16", "float16", "float32", "float64"]),
    weight_dtype=st.sampled_from(["", "bfloat16", "float32"]),
    training=st.booleans(),
    memory=st.sampled_from(["view", "copy", "replace"]),
    compiled=st.booleans(),
    policy=st.sampled_from(["price", "priority"]),
)
bindings = st.sampled_from([STACKED, IN_OUT, binding("w1", "w3", "w2", form="list"), binding("w13", "w2", form="flat")])
devices = st.sampled_from(list(catalogue().values()))
tables = st.lists(
    st.tuples(st.integers(1, 4096), st.floats(1e-3, 1.0)), min_size=1, max_size=6, unique_by=lambda p: p[0]
)
launches = st.sampled_from([lambda E, T, k: 7, lambda E, T, k: 3 * E, lambda E, T, k: 5 + T * k])


@few
@given(specs(), bindings, requests, devices)
def test_plan(spec: MoESpec, stored: object, request: Request, device: object) -> None:
    plan = choose(spec, stored, request, device, KERNELS)  # type: ignore[arg-type]
    # ranges cover 1 <= T without gap or overlap, and neighbours differ
    assert plan.ranges[0].t_min == 1
    assert plan.ranges[-1].t_max is None
    for left, right in pairwise(plan.ranges):
        assert left.t_max is not None
        assert left.t_min <= left.t_max == right.t_min - 1
        assert left.kernel != right.kernel
    # the same question has the same answer, and it replays
    assert choose(spec, stored, request, device, KERNELS) == plan  # type: ignore[arg-type]
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert parse_plan(plan.op_string()) == Plan(plan.layout, plan.ranges, plan.backward, inline=plan.inline)
    # a compiled kernel serves small T inside the graph of a compiler, and nothing else
    assert not any(KERNELS[r.kernel].capability.compiled for r in plan.ranges)
    if plan.inline is not None:
        assert KERNELS[plan.inline.kernel].capability.compiled
        assert request.compiled and not request.training and plan.layout == "view" and plan.inline.t_min == 1
    # no copy in training or with memory="view"
    assert plan.layout == "view" or (request.memory != "view" and not request.training)
    # a verdict for each candidate; vetoed ones say why
    assert len(plan.verdicts) == 3 * len(KERNELS)
    assert all((v.status == "vetoed") == bool(v.reasons) for v in plan.verdicts)


@few
@given(specs(), requests, devices, st.sampled_from(sorted(TRAFFIC)), tables, launches)
def test_more_tokens_never_cost_less(
    spec: MoESpec, request: Request, device: object, traffic: str, table: list, ops: object
) -> None:
    """For any efficiency table, also a silly one."""
    price = seconds(Cost(traffic, ops, tuple(table)), workload(spec, request, device))  # type: ignore[arg-type]
    prices = [price(t) for t in GRID]
    assert all(p > 0 for p in prices)
    assert all(b >= a * (1 - 1e-9) for a, b in pairwise(prices))
