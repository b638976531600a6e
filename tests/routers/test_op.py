"""``moe_fx::moe`` as torch sees it: schema, fake, autograd, autocast, and named errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_fx.binding import bind, parse_binding, split_router
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.reference import experts_forward
from moe_fx.reference.router import route
from moe_fx.spec import ExpertSpec, MoESpec, RouterSpec

from .formulas import ROUTERS, E, K, Router
from .helpers import H, I

T = 7
PLAN = "plan/1 layout=view ranges=sorted_loop:1- backward=recompute"
EXPERTS = "bind/1 w13:stacked:out_in:gate_up w2:stacked:out_in:gate_up"
moe = torch.ops.moe_fx.moe.default


def arguments(router: RouterSpec, dtype: torch.dtype = torch.float64, tokens: int = T, grad: bool = True) -> tuple:
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(grad)

    operands, binding = [normal(E, 2 * I, H), normal(E, H, I)], EXPERTS
    for role, there in (("router_bias", router.bias), ("expert_scale", router.expert_scale)):
        if there:
            operands.append(normal(E))
            binding += f" {role}:stacked:out_in:gate_up"
    spec = MoESpec(K, ExpertSpec(E, H, I), router=router)
    return normal(tokens, H), normal(tokens, E), operands, str(spec), binding, PLAN


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_opcheck(router: Router) -> None:
    torch.library.opcheck(moe, arguments(router.spec, torch.float32))


def test_opcheck_of_mixed_dtypes() -> None:
    spec = RouterSpec(renormalise=True, expert_scale=True, score_dtype="float32", weight_dtype="bfloat16")
    torch.library.opcheck(moe, arguments(spec, torch.bfloat16), atol=0.2, rtol=0.1)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_is_route_then_experts(router: Router) -> None:
    x, logits, operands, spec, binding, plan = arguments(router.spec, grad=False)
    y, ids, weights = moe(x, logits, operands, spec, binding, plan)
    experts, roles = split_router(parse_binding(binding))
    extra = dict(zip(roles, operands[2:], strict=True))
    expected = route(logits, extra.get("router_bias"), extra.get("expert_scale"), router.spec, K)
    assert torch.equal(ids, expected[0])
    assert torch.equal(weights, expected[1])
    mathematics = MoESpec(K, ExpertSpec(E, H, I))
    torch.testing.assert_close(y, experts_forward(x, ids, weights, bind(experts, operands[:2], E), mathematics))


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_gradients_through_y_and_through_the_weights(router: Router) -> None:
    x, logits, operands, *attrs = arguments(router.spec)
    chosen_by = 2 if router.spec.bias else None
    leaves = [x, logits, *(o for i, o in enumerate(operands) if i != chosen_by)]

    def run(*_: Tensor) -> tuple[Tensor, Tensor]:
        y, ids, weights = moe(x, logits, operands, *attrs)
        assert not ids.requires_grad
        return y, weights

    assert torch.autograd.gradcheck(run, leaves)
    for output in run():  # one alone
        found = torch.autograd.grad(output.sum(), [logits, *operands], allow_unused=True, retain_graph=True)
        assert found[0] is not None
        if chosen_by is not None:
            assert found[1 + chosen_by] is None


def test_frozen_operands_get_no_gradient() -> None:
    x, logits, operands, *attrs = arguments(RouterSpec(expert_scale=True))
    operands = [o.detach() for o in operands]
    (dx,) = torch.autograd.grad(moe(x, logits, operands, *attrs)[0].sum(), [x])
    assert bool(dx.abs().sum() > 0)


def test_no_tokens() -> None:
    y, ids, weights = moe(*arguments(RouterSpec(groups=4, topk_groups=2), tokens=0))
    assert (y.shape, ids.shape, weights.shape) == ((0, H), (0, K), (0, K))


def test_autocast_does_not_reach_inside() -> None:
    args = arguments(RouterSpec(renormalise=True), torch.float32, grad=False)
    expected = moe(*args)
    with torch.autocast("cpu", torch.bfloat16):
        found = moe(*args)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_second_derivative() -> None:
    x, logits, operands, *attrs = arguments(RouterSpec())
    (dx,) = torch.autograd.grad(moe(x, logits, operands, *attrs)[0].sum(), [x], create_graph=True)
    with pytest.raises(MoEFxRuntimeError, match="second derivative"):
        dx.sum().backward()


def test_wrong_inputs_are_named_errors() -> None:
    x, logits, operands, spec, binding, plan = arguments(RouterSpec(bias="scores"), grad=False)
    plain = str(MoESpec(K, ExpertSpec(E, H, I)))
    unbiased = str(MoESpec(K, ExpertSpec(E, H, I), router=RouterSpec()))
    for args, words in [
        ((x, logits[:, :-1], operands, spec, binding, plan), "router_logits"),
        ((x, logits[:-1], operands, spec, binding, plan), "rows"),
        ((x, logits, operands, plain, binding, plan), "router"),
        ((x, logits, operands, unbiased, binding, plan), "operands"),
        ((x, logits, [*operands[:2], operands[2][:-1]], spec, binding, plan), "router_bias"),
        ((x, logits, operands, spec, "bind/9", plan), "bind/9"),
    ]:
        with pytest.raises(MoEFxRuntimeError, match=words):
            moe(*args)


def test_the_routers_operands_come_last() -> None:
    wrong = "bind/1 router_bias:stacked:out_in:gate_up w13:stacked:out_in:gate_up w2:stacked:out_in:gate_up"
    with pytest.raises(ValueError, match="last"):
        split_router(parse_binding(wrong))
