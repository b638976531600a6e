"""The reference against formulas written here on their own, and against autograd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.binding import Experts, Operand, WeightBinding, bind, join_gate_up, split_gate_up
from moe_fx.reference import ACTIVATIONS, experts_backward, experts_forward
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec, Norm

E, K, H, I, T = 5, 3, 7, 4, 11  # noqa: E741
PARAMS = {"alpha": 1.702, "limit": 0.7, "gate_cap": 1.5, "up_cap": 2.5, "slope": 0.2, "beta": 1.5}
DOUBLE = torch.float64
ORDERS = ["gate_up", "up_gate", "interleaved"]


def parameters(name: str, gated: bool) -> tuple[float, ...]:
    return tuple(PARAMS[p] for p in ACTIVATIONS[name, gated].params)


@pytest.mark.parametrize("name, gated", ACTIVATIONS)
def test_activation_backward(name: str, gated: bool) -> None:
    """The derivative written out is that of autograd (gradcheck would compare autograd with itself)."""
    act, params = ACTIVATIONS[name, gated], parameters(name, gated)
    torch.manual_seed(0)
    gate = (2 * torch.randn(64, dtype=DOUBLE)).requires_grad_()
    up = (2 * torch.randn(64, dtype=DOUBLE)).requires_grad_() if gated else None
    dh = torch.randn(64, dtype=DOUBLE)
    h = act.forward(gate, up, *params)
    expected = torch.autograd.grad(h, [t for t in (gate, up) if t is not None], dh)
    with torch.no_grad():
        actual = [t for t in act.backward(dh, gate, up, *params) if t is not None]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, gated", ACTIVATIONS)
def test_activation_is_differentiable(name: str, gated: bool) -> None:
    """Finite differences: the forward is the function whose derivative autograd takes."""
    torch.manual_seed(1)
    inputs = tuple(torch.randn(16, dtype=DOUBLE, requires_grad=True) for _ in range(2 if gated else 1))
    params = parameters(name, gated)

    def run(gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ACTIVATIONS[name, gated].forward(gate, up, *params)

    assert torch.autograd.gradcheck(run, inputs)


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # as the models' own code and papers write them
    "silu": lambda g, u: g / (1 + torch.exp(-g)) * u,
    "gelu": lambda g, u: 0.5 * g * (1 + torch.special.erf(g / 2**0.5)) * u,
    "gelu_tanh": lambda g, u: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) * u,
    "relu2": lambda g, u: g.clamp(min=0) ** 2 * u,
    "swiglu_clamp": lambda g, u: F.silu(torch.minimum(g, torch.tensor(0.7))) * u.clip(-0.7, 0.7),
    "swiglu_step": lambda g, u: torch.minimum(F.silu(g), torch.tensor(0.7)) * u.clip(-0.7, 0.7),
    "swiglu_oai": lambda g, u: (gc := g.clip(max=0.7)) / (1 + torch.exp(-1.702 * gc)) * (u.clip(-0.7, 0.7) + 1),
    "swiglu_softcap": lambda g, u: 1.5 * torch.tanh(g / 1.5) * torch.sigmoid(g) * 2.5 * torch.tanh(u / 2.5),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_activation_values(name: str) -> None:
    gate, up = torch.linspace(-3, 3, 61, dtype=DOUBLE), torch.linspace(2, -2, 61, dtype=DOUBLE)
    actual = ACTIVATIONS[name, True].forward(gate, up, *parameters(name, True))
    torch.testing.assert_close(actual, FORMULAS[name](gate, up))


class Sample:
    """A gated block in fp64.  gate, up [E, I, H]; down [E, H, I]; biases; norm [H]."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.gate, self.up, self.down = (torch.randn(s, dtype=DOUBLE) for s in ((E, I, H), (E, I, H), (E, H, I)))
        self.b_gate, self.b_up, self.b_down = (torch.randn(s, dtype=DOUBLE) for s in ((E, I), (E, I), (E, H)))
        self.norm = torch.randn(H, dtype=DOUBLE)
        self.x, self.weights = torch.randn(T, H, dtype=DOUBLE), torch.rand(T, K, dtype=DOUBLE)
        self.ids = torch.randint(0, E - 1, (T, K))  # one expert without tokens
        self.ids[0, 0], self.ids[1, 1], self.ids[2] = -1, E, self.ids[2, 0]

    def operands(self, order: str, bias: bool, norm: str) -> tuple[WeightBinding, list[Tensor]]:
        """One w13 in that order of rows."""

        def join(gate: Tensor, up: Tensor) -> Tensor:  # over dim 1, on its own: join_gate_up is under test too
            if order == "interleaved":
                rows = [t for i in range(I) for t in (gate[:, i], up[:, i])]
                return torch.stack(rows, dim=1)
            return torch.cat((gate, up) if order == "gate_up" else (up, gate), dim=1)

        found = [(Operand("w13", order=order), join(self.gate, self.up)), (Operand("w2"), self.down.clone())]
        if bias:
            found.append((Operand("w13_bias", order=order), join(self.b_gate, self.b_up)))
            found.append((Operand("w2_bias"), self.b_down.clone()))
        if norm:
            found.append((Operand("norm"), self.norm.clone()))
        return WeightBinding(tuple(o for o, _ in found)), [t for _, t in found]

    def dense(self, weight_on: str, bias: bool, norm: str) -> Tensor:
        """Every token through every expert by einsum, then the chosen ones picked by a one-hot mask."""
        mask = F.one_hot(self.ids.clamp(-1, E) + 1, E + 2)[..., 1 : E + 1].to(DOUBLE)  # [T, K, E]; sentinels: no one
        if weight_on == "input":
            w = torch.einsum("tk,tke->tke", self.weights, mask)
            rows = torch.einsum("th,tke->tkeh", self.x, w)
        else:
            rows = torch.einsum("th,tke->tkeh", self.x, mask)
        g = torch.einsum("tkeh,eih->tkei", rows, self.gate) + (self.b_gate if bias else 0)
        u = torch.einsum("tkeh,eih->tkei", rows, self.up) + (self.b_up if bias else 0)
        out = torch.einsum("tkei,ehi->tkeh", g * torch.sigmoid(g) * u, self.down) + (self.b_down if bias else 0)
        if norm == "rms_input_scaled":
            out = F.rms_norm(out * (1 + self.norm), (H,), eps=1e-5)
        elif norm:
            out = F.rms_norm(out, (H,), self.norm + (1 if norm == "rms_plus_one" else 0), eps=1e-5)
        w = mask if weight_on == "input" else torch.einsum("tk,tke->tke", self.weights, mask)
        return torch.einsum("tkeh,tke->th", out, w)


def spec_of(weight_on: str, bias: bool, norm: Norm) -> MoESpec:
    expert = ExpertSpec(E, H, I, w13_bias=bias, w2_bias=bias, norm=norm, norm_eps=1e-5 if norm else 0.0)
    return MoESpec(K, expert, CombineSpec(weight_on))


NORMS = ["", "rms", "rms_plus_one", "rms_input_scaled"]
SPECS = list(product(["output", "input"], [False, True], NORMS))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weight_on, bias, norm", SPECS)
def test_forward_is_the_dense_formula(weight_on: str, bias: bool, norm: Norm, order: str) -> None:
    sample = Sample()
    binding, operands = sample.operands(order, bias, norm)
    y = experts_forward(
        sample.x, sample.ids, sample.weights, bind(binding, operands, E), spec_of(weight_on, bias, norm)
    )
    torch.testing.assert_close(y, sample.dense(weight_on, bias, norm))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weight_on, bias, norm", SPECS)
def test_backward_is_that_of_autograd(weight_on: str, bias: bool, norm: Norm, order: str) -> None:
    """Through the dense formula, so that forward and backward of the reference cannot be wrong together."""
    sample = Sample(3)
    binding, operands = sample.operands(order, bias, norm)
    dy = torch.randn(T, H, dtype=DOUBLE)
    grads = [torch.zeros_like(o) for o in operands]
    dx, dweights = experts_backward(
        dy,
        sample.x,
        sample.ids,
        sample.weights,
        bind(binding, operands, E),
        spec_of(weight_on, bias, norm),
        bind(binding, grads, E),
    )
    names = ["gate", "up", "down"] + ["b_gate", "b_up", "b_down"] * bias + ["norm"] * bool(norm)
    leaves = [getattr(sample, n).requires_grad_() for n in ("x", "weights", *names)]
    expected = dict(
        zip(("x", "weights", *names), torch.autograd.grad(sample.dense(weight_on, bias, norm), leaves, dy), strict=True)
    )
    torch.testing.assert_close(dx, expected["x"])
    torch.testing.assert_close(dweights, expected["weights"])
    views = bind(binding, grads, E)
    for matrices, names in (
        (views.up[0], ("gate", "up")),
        *(((views.up_bias[0], ("b_gate", "b_up")),) if bias else ()),
    ):
        assert isinstance(matrices, Tensor)
        rows = matrices.transpose(1, 2) if matrices.dim() == 3 else matrices
        for actual, name in zip(split_gate_up(rows, views.order), names, strict=True):
            torch.testing.assert_close(actual.transpose(1, 2) if actual.dim() == 3 else actual, expected[name])
    torch.testing.assert_close(views.down, expected["down"])
    if bias:
        torch.testing.assert_close(views.down_bias, expected["b_down"])
    if norm:
        torch.testing.assert_close(views.norm, expected["norm"])


@pytest.mark.parametrize("order", ORDERS)
def test_join_inverts_split(order: str) -> None:
    rows = torch.randn(3, 2 * I)
    assert torch.equal(join_gate_up(*split_gate_up(rows, order), order), rows)


def test_ungated() -> None:
    sample = Sample()
    binding = WeightBinding((Operand("w1", "list"), Operand("w2", "list", True)))
    operands = [*sample.gate.unbind(0), *(t.t().contiguous() for t in sample.down)]
    spec = MoESpec(K, ExpertSpec(E, H, I, act="relu2", gated=False))
    y = experts_forward(sample.x, sample.ids, sample.weights, bind(binding, operands, E), spec)
    expected = torch.zeros(T, H, dtype=DOUBLE)
    for t, k in product(range(T), range(K)):
        if 0 <= (e := int(sample.ids[t, k])) < E:
            hidden = torch.relu(sample.gate[e] @ sample.x[t]) ** 2
            expected[t] += sample.weights[t, k] * (sample.down[e] @ hidden)
    torch.testing.assert_close(y, expected)


def test_dtypes() -> None:
    """Casts happen where the spec says."""
    sample = Sample()
    binding, operands = sample.operands("gate_up", False, "")
    experts = bind(binding, [o.bfloat16() for o in operands], E)
    plain = MoESpec(K, ExpertSpec(E, H, I))
    y = experts_forward(sample.x.bfloat16(), sample.ids, sample.weights.float(), experts, plain)
    assert y.dtype == torch.bfloat16
    wide = MoESpec(
        K, ExpertSpec(E, H, I, compute_dtype="float32"), CombineSpec(accumulate="float32", out_dtype="float64")
    )
    exact = sample.dense("output", False, "")
    z = experts_forward(sample.x.bfloat16(), sample.ids, sample.weights.float(), experts, wide)
    assert z.dtype == torch.float64
    assert (z - exact).norm() < (y.double() - exact).norm()


def swap_gate_up(e: Experts) -> Experts:
    return Experts(e.up, e.down, e.up_bias, e.down_bias, e.norm, "up_gate")


def drop_up_bias(e: Experts) -> Experts:
    return Experts(e.up, e.down, (torch.zeros_like(e.up_bias[0]),), e.down_bias, e.norm, e.order)


def drop_down_bias(e: Experts) -> Experts:
    return Experts(e.up, e.down, e.up_bias, torch.zeros_like(e.down_bias), e.norm, e.order)


def next_expert(e: Experts) -> Experts:
    return Experts((e.up[0].roll(1, 0),), e.down, e.up_bias, e.down_bias, e.norm, e.order)


@pytest.mark.parametrize("mutate", [swap_gate_up, drop_up_bias, drop_down_bias, next_expert])
def test_mutants_of_weights_are_caught(mutate: Callable[[Experts], Experts]) -> None:
    sample = Sample()
    binding, operands = sample.operands("gate_up", True, "")
    experts = mutate(bind(binding, operands, E))
    y = experts_forward(sample.x, sample.ids, sample.weights, experts, spec_of("output", True, ""))
    expected = sample.dense("output", True, "")
    assert (y - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize(
    "spec",
    [
        spec_of("input", True, ""),
        spec_of("output", True, "rms"),
        MoESpec(K, ExpertSpec(E, H, I, act="gelu", w13_bias=True, w2_bias=True)),
    ],
    ids=["weight on input", "norm", "activation"],
)
def test_mutants_of_the_spec_are_caught(spec: MoESpec) -> None:
    sample = Sample()
    binding, operands = sample.operands("gate_up", True, "rms")
    y = experts_forward(sample.x, sample.ids, sample.weights, bind(binding, operands, E), spec)
    expected = sample.dense("output", True, "")
    assert (y - expected).norm() > 1e-3 * expected.norm()


def test_wrong_routing_weight_is_caught() -> None:
    sample = Sample()
    binding, operands = sample.operands("gate_up", True, "")
    experts = bind(binding, operands, E)
    y = experts_forward(sample.x, sample.ids, sample.weights.roll(1, 1), experts, spec_of("output", True, ""))
    expected = sample.dense("output", True, "")
    assert (y - expected).norm() > 0.01 * expected.norm()
