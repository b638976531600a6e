"""Route A: transformers' ``eager`` experts, a loop over the experts that were hit, which Dynamo cannot trace.

before: ``get_interface("eager", loop)`` → the class's own loop (a graph break per layer)
after:  ``get_interface("eager", loop)`` → transformers' ``grouped_mm_experts_forward``, which is one region

The substitute is trusted only after the class's loop and the traceable form agreed on random weights, in float32 and in
the model's dtype by the tolerance rule, once per class, flags, shapes and dtype.  A handler that somebody registered
for "eager" is respected.  transformers is never imported here: the hook fires only when it already runs.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from moe_fx.ops_library import LIBRARY
from moe_fx.passes.capture.hooks import decline, substitute
from moe_fx.passes.isolation import isolated
from moe_fx.passes.sampling import lazy_zeros
from moe_fx.reasons import Reject

_FLAGS = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "has_post_expert_norm")
_TRUSTED: dict[tuple[Any, ...], str] = {}
_FILLED, _FEW, _LARGE = 12, 4, 1 << 22  # experts given random weights, fewer if their matrices have more elements


@substitute
def eager_experts(tracer: Any, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Answers ``ExpertsInterface.get_interface("eager", loop)``."""
    library = sys.modules.get("transformers.integrations.moe")
    body = getattr(library, "grouped_mm_experts_forward", None)
    name, asked, module = asked_for(tracer, function, args) or ("", None, None)
    interface: Any = getattr(asked, "value", ())
    if name != "eager" or "eager" in interface or module is None or body is None:
        return None
    if isinstance(interface, getattr(sys.modules.get(LIBRARY), "FP8ExpertsInterface", ())):
        return None  # ``quantised_libraries`` has those
    if problem := _distrust(module, body):
        decline(type(module).__name__, Reject("capture.untrusted", problem, type(module).__qualname__))
        return None
    from torch._dynamo.variables import UserFunctionVariable

    return UserFunctionVariable(body)


def asked_for(tracer: Any, function: Any, args: list[Any]) -> tuple[str, Any, Module | None] | None:
    """(implementation, the interface, the experts module that asks) where ``function`` is ``get_interface``."""
    library = sys.modules.get("transformers.integrations.moe")
    interface = getattr(library, "ExpertsInterface", None)
    if interface is None or getattr(function, "fn", None) is not interface.get_interface or len(args) != 3:
        return None
    if not args[1].is_python_constant():
        return None
    module = getattr(_realized(tracer.symbolic_locals.get("self")), "value", None)
    return args[1].as_python_constant(), _realized(args[0]), module if isinstance(module, Module) else None


def plain_attributes(owner: Any) -> tuple[tuple[str, Any], ...]:
    """The numbers and words that an object holds: its class's functions may read them."""
    held = getattr(owner, "__dict__", {})
    return tuple(sorted((n, v) for n, v in held.items() if isinstance(v, (bool, int, float, str))))


def _realized(variable: Any) -> Any:
    return variable.realize() if hasattr(variable, "realize") else variable


def _distrust(module: Module, body: Any) -> str:
    """ "" when the class's loop and ``body`` agree, else how they differ."""
    shapes = tuple((n, tuple(p.shape), p.dtype, p.device) for n, p in module.named_parameters())
    flags = tuple(getattr(module, f, None) for f in _FLAGS)
    key = (type(module), flags, shapes, str(getattr(module, "act_fn", "")), plain_attributes(module))
    if key not in _TRUSTED:
        with isolated(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            _TRUSTED[key] = _compare(module, body)
    return _TRUSTED[key]


def _compare(module: Module, body: Any) -> str:
    loop = getattr(type(module).forward, "__wrapped__", None)
    if loop is None:
        return "the class's own loop is not reachable"
    sampled, filled, x, ids, weights = _sample(module)
    wide = _cast(sampled, torch.float32, filled)
    truth = loop(wide, x, ids, weights)
    error = _relative(body(wide, x, ids, weights), truth)
    if not error <= 1e-5:
        return f"the loop and its traceable form differ by {error:.1e} in float32"
    dtype = next(module.parameters()).dtype
    if dtype == torch.float32:
        return ""
    narrow, y = _cast(sampled, dtype, filled), x.to(dtype)
    truth = loop(_cast(narrow, torch.float32, filled), y.float(), ids, weights)
    own, other = (_relative(f(narrow, y, ids, weights.to(dtype)), truth) for f in (loop, body))
    if not other <= 2 * own + 4 * torch.finfo(dtype).eps:
        return f"the traceable form is less exact: {other:.1e} against {own:.1e} in {dtype}"
    return ""


def _sample(module: Module) -> tuple[Module, list[int], Tensor, Tensor, Tensor]:
    """A shallow copy with random weights, the experts that have any, and inputs: 7 tokens, 2 experts each, some experts
    without tokens."""
    generator = torch.Generator().manual_seed(0)
    banks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    experts = banks[0].shape[0]
    count = _FILLED if banks[0][0].numel() <= _LARGE else _FEW
    filled = torch.randperm(experts, generator=generator)[:count].tolist()  # the rest stay pages that take no memory
    clone = copy.copy(module)
    parameters = {}
    for name, p in module.named_parameters(recurse=False):
        value = lazy_zeros(p.shape, torch.float32)
        for e in filled if p.shape[0] == experts else range(p.shape[0]):
            scale = min(p.shape[1:]) ** -0.5 if p.ndim == 3 else 0.5
            value[e] = torch.randn(p.shape[1:], generator=generator) * scale
        parameters[name] = value
    clone.__dict__["_parameters"] = {n: Parameter(v, requires_grad=False) for n, v in parameters.items()}
    hidden = _hidden(module, banks)
    x = torch.randn(7, hidden, generator=generator)
    pool = torch.tensor(filled[: max(2, len(filled) - 1)])
    ids = pool[torch.rand(7, len(pool), generator=generator).argsort(-1)[:, :2]].reshape(7, -1)
    weights = torch.rand(ids.shape, generator=generator) + 0.1
    return clone, filled, x, ids, weights


def _hidden(module: Module, banks: list[Parameter]) -> int:
    """H, from the up projection's orientation."""
    up = banks[0]
    return up.shape[1] if getattr(module, "is_transposed", False) else up.shape[2]


def _cast(module: Module, dtype: torch.dtype, filled: list[int]) -> Module:
    """A shallow copy in ``dtype``, submodules (a norm) included; of a bank only the ``filled`` experts take memory."""
    clone = copy.copy(module)
    parameters = {}
    for name, p in module._parameters.items():
        if p is not None:
            value = lazy_zeros(p.shape, dtype) if p.ndim == 3 else p.to(dtype)
            for e in filled if p.ndim == 3 else ():
                value[e] = p[e]
            parameters[name] = Parameter(value, requires_grad=False)
    clone.__dict__["_parameters"] = parameters
    submodules = {n: m for n, m in module._modules.items() if m is not None}
    clone.__dict__["_modules"] = {n: copy.deepcopy(m).to("cpu", dtype) for n, m in submodules.items()}
    return clone


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
