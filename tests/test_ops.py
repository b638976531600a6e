"""The ops as torch sees them: schema, fake and autograd under opcheck, and named errors for what they cannot do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_fx import backend  # noqa: F401  importing it fills the ops' slot
from moe_fx.binding import bind, parse_binding
from moe_fx.reasons import MoEFxError, MoEFxRuntimeError, MoEFxUnsupportedError
from moe_fx.reference import experts_backward as reference_backward
from moe_fx.reference import experts_forward as reference_forward
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec

E, H, I, K, T = 3, 8, 4, 2, 5  # noqa: E741
STACKED = "bind/1 w13:stacked:out_in:gate_up w2:stacked:out_in:gate_up"
GATED = ExpertSpec(E, H, I)
experts, experts_backward = torch.ops.moe_fx.experts.default, torch.ops.moe_fx.experts_backward.default
experts_train = torch.ops.moe_fx.experts_train.default

# role → sizes of one expert as [out, in], or [out]
SIZES = {
    "w13": (2 * I, H), "w1": (I, H), "w3": (I, H), "w2": (H, I),
    "w13_bias": (2 * I,), "w1_bias": (I,), "w3_bias": (I,), "w2_bias": (H,),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A spec with its storage.  frozen: which operands want no gradient."""

    name: str
    expert: ExpertSpec = GATED
    combine: CombineSpec = field(default_factory=CombineSpec)
    binding: str = STACKED
    kernel: str = "sorted_loop"
    backward: str = "recompute"
    frozen: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    weights_dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int64
    tokens: int = T

    def __str__(self) -> str:
        return self.name

    @property
    def spec(self) -> MoESpec:
        return MoESpec(K, self.expert, self.combine)

    @property
    def attributes(self) -> tuple[str, str, str]:
        return str(self.spec), self.binding, f"plan/1 layout=view ranges={self.kernel}:1- backward={self.backward}"

    def operands(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).mul_(0.5).to(self.dtype)

        found: list[Tensor] = []
        for operand in parse_binding(self.binding).operands:
            sizes = (H,) if operand.role == "norm" else SIZES[operand.role]
            sizes = tuple(reversed(sizes)) if operand.transposed else sizes
            if operand.role == "norm":
                found.append(draw(*sizes))
            elif operand.form == "list":
                found += [draw(*sizes) for _ in range(E)]
            elif operand.form == "flat":
                found.append(draw(E * sizes[0], *sizes[1:]))
            else:
                found.append(draw(E, *sizes))
        for i, tensor in enumerate(found):
            tensor.requires_grad_(i not in self.frozen)
        return found

    def inputs(self) -> tuple[Any, ...]:
        """The op's arguments; the last expert has no token, one token goes to one expert twice."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.tokens, H, generator=generator).to(self.dtype).requires_grad_()
        ids = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 0], [0, 1]], dtype=self.ids_dtype)[: self.tokens]
        weights = torch.rand(self.tokens, K, generator=generator).to(self.weights_dtype).requires_grad_()
        return x, ids, weights, self.operands(), *self.attributes


LISTS = "bind/1 w1:list:out_in:gate_up w3:list:out_in:gate_up w2:list:out_in:gate_up"
BIASED = "bind/1 w13:stacked:in_out:interleaved w2:stacked:in_out:gate_up w13_bias:stacked:out_in:interleaved w2_bias:stacked:out_in:gate_up"  # noqa: E501
CASES = [
    Case("stacked"),
    Case("save", backward="save"),
    Case("save-no-token", tokens=0, backward="save"),
    Case("save-list", binding=LISTS, frozen=(0, 4, 8), backward="save"),
    Case("save-bfloat16", dtype=torch.bfloat16, backward="save"),
    Case("reference", kernel="reference"),
    Case("gather_bmm", kernel="gather_bmm"),
    Case("int32-ids", ids_dtype=torch.int32),
    Case("one-token", tokens=1),
    Case("no-token", tokens=0),
    Case("all-frozen", frozen=(0, 1)),
    Case("w13-frozen", frozen=(0,)),
    Case("list-of-linear", binding=LISTS),
    Case("list-some-frozen", binding=LISTS, frozen=(0, 4, 8)),
    Case("flat", binding="bind/1 w1:flat:out_in:gate_up w3:flat:out_in:gate_up w2:flat:in_out:gate_up"
         .replace("flat:in_out", "flat:out_in")),
    Case("gpt-oss", ExpertSpec(E, H, I, "swiglu_oai", (1.702, 7.0), w13_bias=True, w2_bias=True), binding=BIASED),
    Case("ungated", ExpertSpec(E, H, I, "relu2", gated=False),
         binding="bind/1 w1:stacked:out_in:gate_up w2:stacked:out_in:gate_up"),
    Case("norm", ExpertSpec(E, H, I, norm="rms", norm_eps=1e-6),
         binding=f"{STACKED} norm:stacked:out_in:gate_up"),
    Case("weight-on-input", combine=CombineSpec("input")),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("bfloat16-to-float32", combine=CombineSpec(accumulate="float32", out_dtype="float32"), dtype=torch.bfloat16),
]  # fmt: skip


def gradients(case: Case) -> tuple[Any, ...]:
    """Arguments of the backward op."""
    x, ids, weights, operands, *attributes = case.inputs()
    y = reference_forward(x, ids, weights, bind(parse_binding(case.binding), operands, E), case.spec)
    needs = [o.requires_grad for o in operands]
    detached = [o.detach() for o in operands]
    _, saved = experts_train(x.detach(), ids, weights.detach(), detached, *attributes)
    return torch.randn_like(y), x.detach(), ids, weights.detach(), detached, saved, needs, *attributes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_passes_opcheck(case: Case) -> None:
    torch.library.opcheck(experts, case.inputs(), rtol=1e-2 if case.dtype == torch.bfloat16 else None,
                          atol=1e-2 if case.dtype == torch.bfloat16 else None)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_train_passes_opcheck(case: Case) -> None:
    tolerance = 1e-2 if case.dtype == torch.bfloat16 else None
    torch.library.opcheck(experts_train, case.inputs(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_passes_opcheck(case: Case) -> None:
    torch.library.opcheck(experts_backward, gradients(case))


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float32], ids=str)
def test_gradients_are_those_of_the_reference(case: Case) -> None:
    x, ids, weights, operands, *attributes = case.inputs()
    y = experts(x, ids, weights, operands, *attributes)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(dy)
    wide = [o.detach().double() for o in operands]
    grads = [torch.zeros_like(o) for o in wide]
    binding = parse_binding(case.binding)
    with torch.no_grad():
        dx, dweights = reference_backward(
            dy.double(), x.double(), ids, weights.double(), bind(binding, wide, E), case.spec, bind(binding, grads, E)
        )
    for mine, other in [(x.grad, dx), (weights.grad, dweights), *zip([o.grad for o in operands], grads, strict=True)]:
        if mine is not None:
            torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-5)
    assert [o.grad is None for o in operands] == [not o.requires_grad for o in operands]


def test_an_expert_without_a_token_gets_zeros() -> None:
    x, ids, weights, operands, *attributes = Case("lists", binding=LISTS).inputs()
    experts(x, ids, weights, operands, *attributes).sum().backward()
    idle = [o.grad for o in operands[E - 1 :: E]]
    assert all(g is not None and g.abs().sum() == 0 for g in idle)


def test_frozen_operands_cost_nothing() -> None:
    *arguments, needs, spec, binding, plan = gradients(Case("frozen", frozen=(0, 1)))
    _, _, doperands = experts_backward(*arguments, needs, spec, binding, plan)
    assert [g.numel() for g in doperands] == [0, 0]


def test_what_is_saved_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward reads the saved products: with other weights its activations are still those of the forward."""
    from moe_fx.kernels.experts import backward as module

    found = {}
    for backward in ("save", "recompute"):
        case = Case("saved", backward=backward)
        x, ids, weights, operands, *attributes = case.inputs()
        again: list[int] = []
        original = module.up_products
        monkeypatch.setattr(module, "up_products", lambda *args, f=original, n=again: n.append(1) or f(*args))
        experts(x, ids, weights, operands, *attributes).square().sum().backward()
        monkeypatch.setattr(module, "up_products", original)
        assert bool(again) == (backward == "recompute")
        found[backward] = [x.grad, weights.grad, *(o.grad for o in operands)]
    for kept, new in zip(found["save"], found["recompute"], strict=True):
        torch.testing.assert_close(kept, new)


def test_a_compiled_training_graph_saves_once() -> None:
    """Forward and backward graphs of AOTAutograd hold the training op and what it saved."""
    case = Case("save", backward="save")
    x, ids, weights, operands, *attributes = case.inputs()
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    aot = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    call = torch.compile(lambda x, w: experts(x, ids, w, operands, *attributes), backend=aot, fullgraph=True)
    call(x, weights).sum().backward()
    names = [[str(n.target) for n in gm.graph.nodes if "moe_fx" in str(n.target)] for gm in graphs]
    assert names == [["moe_fx.experts_train.default"], ["moe_fx.experts_backward.default"]]
    with torch.no_grad():
        call(x, weights)
    assert [str(n.target) for n in graphs[-1].graph.nodes if "moe_fx" in str(n.target)] == ["moe_fx.experts.default"]


def test_dynamic_tokens_and_one_graph() -> None:
    case = Case("stacked")
    _, _, _, operands, *attributes = case.inputs()
    graphs = []

    def inner(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    call = torch.compile(lambda x, i, w: experts(x, i, w, operands, *attributes), backend=inner, fullgraph=True)
    for tokens in (2, 3, 7, 64):
        x, ids, weights = torch.randn(tokens, H), torch.randint(E, (tokens, K)), torch.rand(tokens, K)
        assert call(x, ids, weights).shape == (tokens, H)
    assert len(graphs) <= 2


@pytest.mark.parametrize("kernel", ["sorted_loop", "gather_bmm", "reference"])
def test_ids_outside_add_and_read_nothing(kernel: str) -> None:
    case = Case("outside", kernel=kernel)
    x, _, weights, operands, *attributes = case.inputs()
    bad = torch.tensor([[0, -1], [E, 1], [-7, 1 << 40], [1, 0], [2, E]])
    safe = torch.where((bad >= 0) & (bad < E), bad, 0)
    kept = weights.detach() * ((bad >= 0) & (bad < E))
    with torch.no_grad():
        expected = experts(x, safe, kept, operands, *attributes)
    y = experts(x, bad, weights, operands, *attributes)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert bool(x.grad.isfinite().all())
    assert x.grad[2].abs().sum() == 0
    assert weights.grad[(bad < 0) | (bad >= E)].abs().sum() == 0


def test_a_not_finite_weight_at_an_id_outside_is_not_read() -> None:
    for kernel in ("sorted_loop", "gather_bmm"):
        x, _, weights, operands, *attributes = Case("outside", kernel=kernel).inputs()
        ids = torch.tensor([[0, -1]] * T)
        weights = weights.detach().clone()
        weights[:, 1] = math.nan
        y = experts(x, ids, weights, operands, *attributes)
        assert bool(y.isfinite().all()), kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_opaque_to_autocast(dtype: torch.dtype) -> None:
    x, ids, weights, operands, *attributes = Case("autocast", dtype=dtype, weights_dtype=dtype).inputs()
    expected = experts(x, ids, weights, operands, *attributes)
    expected.sum().backward()
    grad, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, ids, weights, operands, *attributes)
        assert torch.equal(y, expected)
        y.sum().backward()
    assert torch.equal(x.grad, grad)


def wrong(**changes: Any) -> tuple[Any, ...]:
    names = ("x", "ids", "weights", "operands", "spec", "binding", "plan")
    return tuple({**dict(zip(names, Case("stacked").inputs(), strict=True)), **changes}.values())


WRONG = {
    "x-width": (dict(x=torch.randn(T, H + 1)), r"x must be \[T, 8\] .*got .*\[5, 9\]"),
    "x-rank": (dict(x=torch.randn(1, T, H)), r"x must be \[T, 8\]"),
    "ids-float": (dict(ids=torch.zeros(T, K)), "topk_ids must be integers"),
    "ids-count": (dict(ids=torch.zeros(T + 1, K, dtype=torch.long)), "with T = 5"),
    "ids-rank": (dict(ids=torch.zeros(T * K, dtype=torch.long)), "topk_ids must be integers"),
    "weights-shape": (dict(weights=torch.rand(T, K + 1)), "must have the shape of topk_ids"),
    "top-k": (dict(ids=torch.zeros(T, K + 1, dtype=torch.long), weights=torch.rand(T, K + 1)), r"integers \[T, 2\]"),
    "operand-count": (dict(operands=[torch.randn(E, 2 * I, H)]), "operands"),
    "operand-shape": (dict(operands=[torch.randn(E, 2 * I, H), torch.randn(E, I, H)]), "w2|failed on 5 tokens"),
    "operand-experts": (dict(operands=[torch.randn(E - 1, 2 * I, H), torch.randn(E - 1, H, I)]), "w13|experts"),
    "x-integers": (dict(x=torch.zeros(T, H, dtype=torch.long)), "floating"),
    "spec": (dict(spec="moe/9 top_k=2"), "grammar"),
    "binding": (dict(binding="bind/9"), "grammar"),
    "plan": (dict(plan="plan/9"), "version"),
    "kernel": (dict(plan="plan/1 layout=view ranges=no_such:1- backward=recompute"), "no_such"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_a_named_error(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(MoEFxError, match=message):
        experts(*wrong(**changes))


def test_wrong_shapes_are_named_under_fake_tensors() -> None:
    """An explicit call of the op in a user's model is checked while it is traced, not at the first run."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(MoEFxRuntimeError, match="x must be"):
        experts(*wrong(x=torch.randn(T, H + 1)))


def test_double_backward_is_a_named_error() -> None:
    x, ids, weights, operands, *attributes = Case("stacked").inputs()
    (dx,) = torch.autograd.grad(experts(x, ids, weights, operands, *attributes).square().sum(), x, create_graph=True)
    with pytest.raises(MoEFxRuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_forward_mode_is_a_named_error() -> None:
    import torch.autograd.forward_ad as forward_ad

    x, ids, weights, operands, *attributes = Case("stacked").inputs()
    with forward_ad.dual_level(), pytest.raises(MoEFxUnsupportedError, match=r"moe_fx"):
        experts(forward_ad.make_dual(x.detach(), torch.ones_like(x)), ids, weights, operands, *attributes)


def test_jvp_is_a_named_error() -> None:
    x, ids, weights, operands, *attributes = Case("stacked").inputs()
    with pytest.raises(MoEFxUnsupportedError, match=r"moe_fx"):
        torch.func.jvp(lambda v: experts(v, ids, weights, operands, *attributes), (x.detach(),), (torch.ones_like(x),))


def test_vmap_is_a_named_error() -> None:
    x, ids, weights, operands, *attributes = Case("stacked").inputs()
    frozen = [o.detach() for o in operands]
    with pytest.raises(MoEFxUnsupportedError, match=r"moe_fx.*vmap"):
        torch.func.vmap(lambda v: experts(v, ids, weights.detach(), frozen, *attributes))(x.detach().expand(2, T, H))


def test_functional_grad_is_a_named_error() -> None:
    x, ids, weights, operands, *attributes = Case("stacked").inputs()
    with pytest.raises(MoEFxUnsupportedError, match=r"moe_fx.*grad"):
        torch.func.grad(lambda v: experts(v, ids, weights, operands, *attributes).sum())(x.detach())


def test_forward_mode_without_requires_grad_drops_no_tangent() -> None:
    x, ids, weights, operands, *attributes = Case("frozen", frozen=(0, 1)).inputs()
    import torch.autograd.forward_ad as forward_ad

    frozen = weights.detach()
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(MoEFxUnsupportedError, match="forward-mode"):
            experts(dual, ids, frozen, operands, *attributes)


def test_a_dual_level_without_tangents_is_fine() -> None:
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level(), torch.no_grad():
        assert experts(*Case("stacked").inputs()).shape == (T, H)


def test_results_do_not_alias_the_inputs() -> None:
    x, ids, weights, operands, *attributes = Case("no-token", tokens=0).inputs()
    y = experts(x, ids, weights, operands, *attributes)
    assert y.shape == (0, H)
    x, ids, weights, operands, *attributes = Case("stacked").inputs()
    held = [t.detach().clone() for t in (x, weights, *operands)]
    y = experts(x, ids, weights, operands, *attributes)
    y.detach().zero_()
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(held, (x, weights, *operands), strict=True))
