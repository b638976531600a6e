"""LOWER for few tokens: where a graph is compiled for one number of tokens, ``Plan.inline`` takes the op's place in it.

before: y = moe_fx.experts(x [1, H], …, "plan/1 … inline=gather_gemv:1-4")
after:  y = moe_fx.experts_inline(the same), which AOTAutograd decomposes into the kernel's own ATen ops for Inductor

With a symbolic number of tokens, or none of the plan's, the op stays what it is and chooses at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx.binding import bind, parse_binding
from moe_fx.kernels.build import trace
from moe_fx.kernels.registry import Kernel, kernel
from moe_fx.ops import call_of
from moe_fx.ops_moe import routed
from moe_fx.plan import parse_plan
from moe_fx.spec import parse

_OPS = {
    torch.ops.moe_fx.experts.default: torch.ops.moe_fx.experts_inline.default,
    torch.ops.moe_fx.moe.default: torch.ops.moe_fx.moe_inline.default,
}


def inline(gm: GraphModule) -> None:
    """Puts the inline op where the plan of a call has a kernel for the call's number of tokens; ``gm`` is changed."""
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        calls = [n for n in module.graph.nodes if n.op == "call_function" and n.target in _OPS and _inlined(n)]
        if calls:
            _register_decompositions()
        for node in calls:
            node.target = _OPS[node.target]
            node.args = (*node.args[:-1], f"{node.args[-1]} code={_code()}")
        if calls:
            module.recompile()


def _register_decompositions() -> None:
    """Tells Inductor about our two ops, once.  A table handed to ``compile_fx`` would turn its caches off."""
    from torch._inductor import decomposition

    ours = decompositions()
    if not ours.keys() <= decomposition.decompositions.keys():
        decomposition.decompositions.update(ours)
        decomposition.fast_random_decomps.cache_clear()  # a copy made before


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inline op → a function that gives its result from ATen ops."""
    return {torch.ops.moe_fx.experts_inline.default: _experts, torch.ops.moe_fx.moe_inline.default: _moe}


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of the code that an inline kernel is made of: what Inductor compiled from another is not taken from its
    cache."""
    package = Path(__file__).parent.parent
    files = [package / "binding.py", *sorted(package.glob("kernels/**/*.py")), *sorted(package.glob("reference/*.py"))]
    return sha256(b"".join(f.read_bytes() for f in (*files, Path(__file__)))).hexdigest()[:12]


def inline_kernel(plan: str, tokens: object) -> Kernel | None:
    """The kernel that stands in a graph for this number of tokens; None for a symbolic one."""
    chosen = parse_plan(plan).inline
    return kernel(chosen.kernel) if chosen is not None and isinstance(tokens, int) and tokens in chosen else None


def run_inline(
    x: Tensor, ids: Tensor, weights: Tensor, operands: list[Tensor], spec: str, binding: str, plan: str
) -> Tensor | None:
    """The result of the plan's inline kernel; None where it has none for this number of tokens."""
    chosen = inline_kernel(plan, x.shape[0])
    if chosen is None:
        return None
    parsed, call = parse(spec), call_of(x, ids, weights, operands, spec, binding, plan)
    experts = bind(parse_binding(binding), call.operands, parsed.expert.experts)
    with torch._C._DisableAutocast():
        return trace(chosen, call.x, call.ids, call.weights, experts, parsed)


def _inlined(node: Node) -> bool:
    x, plan = node.args[0], node.args[-1]
    assert isinstance(x, Node)
    value = x.meta.get("example_value")
    return isinstance(value, Tensor) and inline_kernel(str(plan), value.shape[0]) is not None


def _experts(*args: Any) -> Any:
    y = run_inline(*args)
    return NotImplemented if y is None else y


def _moe(x: Tensor, logits: Tensor, operands: list[Tensor], spec: str, binding: str, plan: str) -> Any:
    if inline_kernel(plan, x.shape[0]) is None:
        return NotImplemented
    with torch._C._DisableAutocast():
        ids, weights, mine, experts_binding = routed(x, logits, operands, spec, binding)
    return run_inline(x, ids, weights, mine, spec, experts_binding, plan), ids, weights
