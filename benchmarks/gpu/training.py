"""Forward and backward of one layer, gradients of everything: milliseconds and the most memory that a step takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contenders import BASE, CONTENDERS
from benchmarks.gpu.report import number
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import Inputs, Layer, error, truth, work
from benchmarks.gpu.timing import Run, Timed, attempt
from moe_fx.kernels.build import run
from moe_fx.kernels.registry import kernel

TOKENS, CHECKED = 4096, 200
DRY_TOKENS, DRY_CHECKED = 8, 5
BOUND = 4e-2  # of a gradient's relative RMS error: twice as many roundings as in a forward
NAMES = ("moe_fx:triton", "moe_fx:compiled", BASE, "liger")
Step = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]  # x, ids, weights, dy → dx, dweights, d of operands


def by_hand(layer: Layer) -> Step:
    """Our kernel's forward, which keeps its products, and its own backward."""
    chosen, experts, spec = kernel("triton"), layer.experts, layer.shape.spec
    differentiate: Any = chosen.experts.differentiate  # type: ignore[attr-defined]

    def step(x: Tensor, ids: Tensor, weights: Tensor, dy: Tensor) -> list[Tensor]:
        saved: list[Tensor] = []
        run(chosen, x, ids, weights, experts, spec, keep=saved)
        grads = [torch.empty_like(t) for t in layer.operands]
        dx, dweights = differentiate(dy, x, ids, weights, experts, spec, layer.views(grads), saved)
        return [dx, dweights, *grads]

    return step


def by_autograd(layer: Layer, forward: Run, parameters: list[Tensor]) -> Step:
    def step(x: Tensor, ids: Tensor, weights: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_(), *parameters]
        with torch.enable_grad():
            y = forward(leaves[0], ids, leaves[1])
            return list(torch.autograd.grad(y, leaves, dy))

    return step


def step_of(layer: Layer, name: str) -> Step:
    """The weights want gradients from here on."""
    if name == "moe_fx:triton":
        return by_hand(layer)
    m = layer.module.requires_grad_(True)
    parameters = [m.gate_up_proj, m.down_proj]
    if layer.shape.oai:
        parameters += [m.gate_up_proj_bias, m.down_proj_bias]
    if name == "liger":
        function = CONTENDERS["liger"].find()[0]  # type: ignore[attr-defined]
        return by_autograd(layer, lambda x, ids, w: function.apply(x, *parameters, ids.int(), w), parameters)
    return by_autograd(layer, CONTENDERS[name].prepare(layer), parameters)


def exact(layer: Layer, inputs: Inputs, dy: Tensor) -> list[Tensor]:
    """The gradients in float32, by the definition of the forward."""
    x, ids, weights = inputs
    leaves = [t.detach().float().requires_grad_() for t in (x, weights, *layer.operands)]
    with torch.enable_grad():
        y = truth(layer, (leaves[0], ids, leaves[1]), leaves[2:])
        return list(torch.autograd.grad(y, leaves, dy.float()))


def shapes(session: Session) -> list[str]:
    """Whole layers: with part of the experts a step is another thing."""
    return [name for name in session.shapes if not session.shape(name).of]


def training(session: Session, part: str) -> Iterator[str]:
    names = [name for name in NAMES if name in session.names]
    for i, name in enumerate(chosen := shapes(session)):
        yield name
        layer = session.load(name)
        try:
            session.found["training"] += _measured(session, layer, names, 0.4 * session.slice(len(chosen) - i))
        finally:
            layer.module.requires_grad_(False)


def _measured(session: Session, layer: Layer, names: list[str], seconds: float) -> list[dict[str, Any]]:
    tokens, few = (DRY_TOKENS, DRY_CHECKED) if session.dry else (TOKENS, CHECKED)
    small, dy_small = layer.inputs(few, seed=2)[0], _dy(layer, few)
    wanted = exact(layer, small, dy_small)
    inputs, dy = layer.inputs(tokens), _dy(layer, tokens)
    rows: dict[str, dict[str, Any]] = {}
    timed, current = [], [inputs[0]]
    for name in names:
        contender = CONTENDERS[name]
        rows[name] = dict(shape=layer.name, tokens=tokens, contender=name, reason="", error=None, bound=BOUND, ms=None)
        rows[name] |= dict(fastest_ms=None, rounds=0, peak_bytes=None, tflops=None, of_peak=None)
        reason = contender.available(session.device) or contender.takes(layer.shape, tokens)
        step: Step | None = None
        if not reason:
            step, reason = attempt(session.device, lambda name=name: step_of(layer, name))  # type: ignore[misc]
        if step is not None:
            found, reason = attempt(session.device, lambda step=step: step(*small, dy_small))  # type: ignore[misc]
            if found is not None:
                worst = max(error(a, b) for a, b in zip(found, wanted, strict=True))
                rows[name]["error"] = number(worst)
                reason = "" if worst <= BOUND else f"wrong: a gradient's relative RMS error is {worst:.1e}"
        rows[name]["reason"] = reason
        if step is None or reason:
            continue
        peak, reason = attempt(session.device, lambda step=step: _peak(session, step, inputs[0], dy))  # type: ignore[misc]
        rows[name] |= dict(reason=reason, peak_bytes=peak if session.clock.cuda else None)
        if not reason:
            timed.append(Timed(name, lambda step=step: step(*current[0], dy)))  # type: ignore[misc]

    def load(turn: int) -> None:
        current[0] = inputs[turn % len(inputs)]

    del wanted
    session.clock.interleave(timed, load, seconds)
    flop = 3 * work(layer.shape, inputs)[0]
    for one in timed:
        rows[one.name]["reason"] = "" if one.ms else one.why
        if one.ms:
            rate = flop / one.median * 1e3
            rows[one.name] |= dict(ms=one.median, fastest_ms=min(one.ms), rounds=len(one.ms), tflops=rate / 1e12)
            rows[one.name] |= dict(of_peak=rate / session.found["limits"]["bf16_flops"])
    return list(rows.values())


def _dy(layer: Layer, tokens: int) -> Tensor:
    draw = torch.Generator(layer.device).manual_seed(tokens)
    return torch.randn(tokens, layer.shape.hidden, device=layer.device, generator=draw).bfloat16()


def _peak(session: Session, step: Step, inputs: Inputs, dy: Tensor) -> int:
    """Bytes that a step takes besides weights and inputs, its gradients among them."""
    step(*inputs, dy)  # what is compiled or held for later calls
    if not session.clock.cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(*inputs, dy)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
