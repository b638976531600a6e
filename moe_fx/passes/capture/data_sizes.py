"""Sizes that depend on data: ``torch.where(ids == e)``, ``nonzero``, ``x[mask]``.

Under ``fullgraph=True`` Dynamo traces through them; otherwise each one breaks the graph, in the middle of every naive
loop over experts.  For our backend they are traced in either case.  Where that was of no use (no block with such a size
in it was fused, or Dynamo failed on one) the frame is traced again without: code that is no MoE meets Dynamo as it is.
A torch without one of the private names that this takes compiles as it ever does, and the report names what is missing.

before: topk | where, expert 0 | where, expert 1 | …  (a graph each)   after: topk, where, expert 0, where, expert 1 …
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any, NoReturn

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from moe_fx.passes.capture.hooks import decline, lacking, surround
from moe_fx.passes.dataflow import target_name
from moe_fx.reasons import Reject

NEEDS = (  # besides hooks.TRACING, without which nothing here runs
    ("torch._dynamo.exc", "BackendCompilerFailed"),
    ("torch._dynamo.exc", "SkipFrame"),
    ("torch._dynamo.exc", "TensorifyScalarRestartAnalysis"),
    ("torch._dynamo.exc", "UnspecializeRestartAnalysis"),
    ("torch._dynamo.resume_execution", "ContinueExecutionCache.generated_code_metadata"),
    ("torch._guards", "CompileContext.get"),
    ("torch._guards", "TracingContext.try_get"),
    ("torch.fx.experimental.symbolic_shapes", "ShapeEnvSettings"),
)
_SELECTIONS = {"topk", "one_hot", "argmax"}
_allowed: dict[Any, CodeType] = {}  # ShapeEnv of a trace that goes on → the frame's code
_thread = threading.local()  # .plain: code that was sent back → the compilation (a weak reference) that did


@cache
def missing() -> str:
    """What this torch lacks of what this file needs; "" when all is there."""
    if name := lacking(NEEDS):
        return f"{name} is missing"
    try:
        return "" if _open(ShapeEnv(allow_dynamic_output_shape_ops=False)) else "ShapeEnv.settings is not heeded"
    except (AttributeError, TypeError) as error:
        return f"ShapeEnv.settings: {error}"


def _open(environment: Any) -> bool:
    """Lets sizes come from data; False where they could before, or still cannot."""
    if environment.allow_dynamic_output_shape_ops:
        return False
    environment.settings = dataclasses.replace(environment.settings, allow_dynamic_output_shape_ops=True)
    return bool(environment.allow_dynamic_output_shape_ops)


@surround
@contextmanager
def allow(tracer: Any) -> Iterator[None]:
    """Lets a frame make sizes from data, unless it, or the frame that it continues, was sent back."""
    if missing():
        try:
            yield
        except Exception:
            if _selects(tracer):
                _note(tracer, "capture.unavailable", f"sizes that depend on data cannot be traced: {missing()}")
            raise
        return
    environment, code = tracer.output.shape_env, _origin(tracer.f_code)
    if _sent_back(code, continues=code is not tracer.f_code) or not _open(environment):
        yield
        return
    _allowed[environment] = code
    try:
        yield
    except Exception as error:
        from torch._dynamo.exc import BackendCompilerFailed, RestartAnalysis, SkipFrame

        if isinstance(error, (BackendCompilerFailed, RestartAnalysis, SkipFrame)):
            raise
        if _selects(tracer):
            title = str(error).strip().partition("\n")[0]
            text = f"Dynamo could not trace the code that follows a selection of k: {title}"
            _note(tracer, "capture.data_dependent", text, _place(error))
        _retrace(code)
    finally:
        del _allowed[environment]


def _selects(tracer: Any) -> bool:
    """Whether the frame, so far, makes a selection as a router does."""
    return any(target_name(n) in _SELECTIONS for n in tracer.output.graph.nodes)


def _note(tracer: Any, code: str, text: str, source: str = "") -> None:
    """Why the frame's block is left to Dynamo."""
    owner = tracer.f_locals.get("self")
    name = tracer.f_code.co_name if owner is None else type(owner).__qualname__
    decline(name, Reject(code, text, name), source=source)


def _place(error: Exception) -> str:
    """The line of the user's code that stopped the trace."""
    place = next(iter(reversed(getattr(error, "real_stack", None) or [])), None)
    return "" if place is None else f"{place.filename}:{place.lineno} {place.line or ''}".strip()


def useless(gm: GraphModule, fused: list[Node]) -> bool:
    """Whether the sizes from data that ``allow`` let into ``gm`` are of no use, none being in the blocks ``fused``, or
    of harm: others have conditions, which Dynamo turns into assertions that the user's code does not make."""
    if not _allowed or _environment() not in _allowed:
        return False
    graphs = [m.graph for m in gm.modules() if isinstance(m, GraphModule)]
    others = {n for graph in graphs for n in graph.nodes if _from_data(n)} - set(fused)
    if not any(map(_from_data, fused)):
        return bool(others)
    symbols = {s for n in others for s in free_unbacked_symbols(n.meta["example_value"])}
    asserted = [n.all_input_nodes[0] for n in gm.graph.nodes if "assert_scalar" in target_name(n) and n.all_input_nodes]
    return any(_demands(n.meta.get("example_value"), symbols) for n in asserted)


def _demands(condition: Any, symbols: set[Any]) -> bool:
    """Whether an asserted condition says more than that sizes, ``symbols`` among them, are not negative and no larger
    than what was selected from.  One that holds for certain fixed a size when it was traced."""
    expr = condition.node.expr if isinstance(condition, torch.SymBool) else sympy.true
    if expr.free_symbols and not expr.free_symbols & symbols:
        return False
    if isinstance(expr, sympy.Ge):
        return not (expr.rhs.is_number and expr.rhs <= 0)
    return not (isinstance(expr, sympy.Le) and expr.lhs in symbols)


def retrace() -> NoReturn:
    """Leaves the backend; the frame is traced again, without ``allow``."""
    _retrace(_allowed[_environment()])


def _environment() -> Any:
    """The ShapeEnv of the trace at hand; of a graph that did not come from Dynamo, an object that stands for none."""
    context = torch._guards.TracingContext.try_get()
    return getattr(getattr(context, "fake_mode", None), "shape_env", None) or _thread


def _from_data(node: Node) -> bool:
    """Whether a size of the node's value comes from data."""
    value = node.meta.get("example_value")
    return value is not None and bool(free_unbacked_symbols(value))


def _sent_back(code: CodeType, continues: bool) -> bool:
    """A frame that is compiled anew, for other inputs, gets another try; what continues one shares its fate."""
    plain = _thread.__dict__.setdefault("plain", {})
    if code in plain and not continues and plain[code]() is not torch._guards.CompileContext.get():
        del plain[code]
    return code in plain


def _retrace(code: CodeType) -> NoReturn:
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis

    class Retrace(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
        """Passes through a backend as the first does, and has Dynamo forget its graph breaks as the second does."""

    _thread.plain[code] = weakref.ref(torch._guards.CompileContext.get())
    raise Retrace(restart_reason="no block with a size from data was fused")


def _origin(code: CodeType) -> CodeType:
    """The user's code that ``code`` continues after a graph break."""
    from torch._dynamo.resume_execution import ContinueExecutionCache

    known = ContinueExecutionCache.generated_code_metadata
    while (meta := known.get(code)) is not None:
        code = meta.code
    return code
