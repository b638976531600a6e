"""Compile a program, run it and the original, compare by the tolerance rule of DESIGN §5."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import moe_fx
from moe_fx.backend import moe_fx as backend
from moe_fx.report import Report

EXPERTS, TOP_K, HIDDEN, INNER = 6, 2, 32, 24
Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """outputs: the floating tensors that the program returned.  grads: of arguments and parameters."""

    outputs: list[Tensor]
    grads: dict[str, Tensor]


def compiled(
    module: nn.Module | Callable[..., Any], dynamic: bool | None = None, fresh: bool = True, **options: Any
) -> Any:
    """torch.compile with everything forgotten (``fresh``), in one graph, the rest of the graph run by eager."""
    torch._dynamo.reset()
    if fresh:
        moe_fx.reset()
    settings = {"inner_backend": "eager", **options}
    return torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic, options=settings)


def run(function: Any, module: nn.Module, args: Sequence[Any], backward: bool, autocast: bool = False) -> Result:
    """Calls ``function`` (``module`` or its compiled form) on copies of ``args``, numbers as they are."""
    module.zero_grad(set_to_none=True)
    inputs = [_leaf(a, backward) if isinstance(a, Tensor) else a for a in args]
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.set_grad_enabled(backward), warnings.catch_warnings(), context:
        warnings.simplefilter("ignore", moe_fx.MoEFxWarning)
        found = function(*inputs)
    outputs = [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]
    grads: dict[str, Tensor] = {}
    if backward:
        seeds = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(t) for i, t in enumerate(outputs)]
        torch.autograd.backward(
            [t for t in outputs if t.requires_grad], [s for t, s in zip(outputs, seeds, strict=True) if t.requires_grad]
        )
        leaves = ((f"input {i}", t) for i, t in enumerate(inputs) if isinstance(t, Tensor))
        named = [*leaves, *module.named_parameters()]
        grads = {n: torch.zeros_like(t) if t.grad is None else t.grad.clone() for n, t in named if t.requires_grad}
    return Result([t.detach() for t in outputs], grads)


def _leaf(a: Tensor, backward: bool) -> Tensor:
    copy_of = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a.detach())
    return copy_of.requires_grad_(backward and a.is_floating_point())


def fused_within_rule(
    module: nn.Module,
    arguments: Sequence[Arguments],
    expected: int,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    dynamic: bool | None = None,
    autocast: bool = False,
) -> Report:
    """Asserts that ``expected`` blocks are fused in one graph and that every result obeys the rule; the original in
    float64 is the truth, on the same rounded weights and inputs."""
    module = module.to(dtype)
    function = compiled(module, dynamic)
    wide = widened(module)
    for args in arguments:
        args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
        fused = run(function, module, args, backward, autocast)
        own = run(module, module, args, backward, autocast)
        truth = run(wide, wide, tuple(a.double() if a.is_floating_point() else a for a in args), backward)
        within_rule(fused, own, truth, torch.bfloat16 if autocast else dtype)
    report = moe_fx.last_report()
    assert report.num_fused == report.num_blocks == expected, str(report)
    assert report.num_graphs == 1, str(report)
    return report


def widened(module: nn.Module) -> nn.Module:
    """A float64 copy; a program that names dtypes follows ``exact``."""
    wide = copy.deepcopy(module).double()
    for part in wide.modules():
        part.exact = True
    return wide


def within_rule(fused: Result, own: Result, truth: Result, dtype: torch.dtype) -> None:
    """error ≤ 2 × own error + 4 eps, relative to the norm of the truth, for outputs and gradients."""
    assert len(fused.outputs) == len(own.outputs) == len(truth.outputs)
    assert fused.grads.keys() == own.grads.keys() == truth.grads.keys()
    named = [
        (f"output {i}", *three) for i, three in enumerate(zip(fused.outputs, own.outputs, truth.outputs, strict=True))
    ]
    named += [(f"gradient of {n}", fused.grads[n], own.grads[n], truth.grads[n]) for n in fused.grads]
    for name, mine, theirs, exact in named:
        assert mine.shape == theirs.shape, name
        assert mine.dtype == theirs.dtype, name
        error, allowed = relative(mine, exact), 2 * relative(theirs, exact) + 4 * torch.finfo(dtype).eps
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of ``b``; infinite where one is not finite and the other is."""
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        return float("inf")
    a, b = a.double().nan_to_num(posinf=0, neginf=0), b.double().nan_to_num(posinf=0, neginf=0)
    scale = b.norm()
    return float((a - b).norm() / scale) if scale > 0 else float((a - b).norm())


def hidden_states(*shape: int, seed: int = 0) -> Tensor:
    """Random [*shape, HIDDEN]."""
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))
