"""The one place where moe_fx looks into Dynamo: each function that Dynamo is about to inline for *our* backend is first
offered to the substitutes registered here.  For every other backend, thread and torch.export the hook passes through.

Holds: whether a compilation is ours is read off the tracer at hand, never off a flag; a substitute that raises or
declines leaves Dynamo's own behaviour; ``uninstall`` restores Dynamo.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_fx.reasons import Reject, out_of_memory

# (tracer, function about to be inlined, its arguments) → the result to use instead, or None to inline as usual
Substitute = Callable[[Any, Any, list[Any]], Any]

_SUBSTITUTES: list[Substitute] = []
_declined = threading.local()
_original: Any = None


def substitute(function: Substitute) -> Substitute:
    """Registers a substitute."""
    _SUBSTITUTES.append(function)
    return function


def decline(fqn: str, reason: Reject) -> None:
    """Notes why a loop was left to Dynamo; the next graph of this thread reports it."""
    notes = _declined.__dict__.setdefault("notes", {})
    notes[fqn] = (reason,)


def drain() -> tuple[list[tuple[str, tuple[Reject, ...]]], float]:
    """The notes since the last graph, by module name, and the seconds that substitutes took."""
    state = _declined.__dict__
    return list(state.pop("notes", {}).items()), state.pop("seconds", 0.0)


def available() -> str:
    """ "" when the hook can be installed, else what this torch lacks."""
    try:
        from torch._dynamo.symbolic_convert import InliningInstructionTranslator
    except ImportError as error:
        return f"torch._dynamo.symbolic_convert.InliningInstructionTranslator: {error}"
    found = inspect.getattr_static(InliningInstructionTranslator, "inline_call", None)
    if not isinstance(found, classmethod):
        return "InliningInstructionTranslator.inline_call is not a class method"
    names = list(inspect.signature(found.__func__).parameters)
    if names[:5] != ["cls", "parent", "func", "args", "kwargs"]:
        return f"InliningInstructionTranslator.inline_call takes {names}"
    return ""


def install(backend: Any, active: Callable[[], bool] = lambda: True) -> str:
    """Wraps Dynamo's inlining for ``backend``, once.  Returns why not, where it cannot ("" when done).

    active: asked each time; while it says no, Dynamo is as without us.
    """
    global _original
    if _original is not None or (missing := available()):
        return "" if _original is not None else missing
    from torch._dynamo.symbolic_convert import InliningInstructionTranslator

    _original = inspect.getattr_static(InliningInstructionTranslator, "inline_call")

    @functools.wraps(_original.__func__)
    def inline_call(cls: Any, parent: Any, func: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if not kwargs and compiles_for(parent, backend) and active():
            result = _offered(parent, func, list(args))
            if result is not None:
                return result
        return _original.__func__(cls, parent, func, args, kwargs, *rest, **more)

    setattr(InliningInstructionTranslator, "inline_call", classmethod(inline_call))  # noqa: B010  mypy: a method
    return ""


def _offered(tracer: Any, function: Any, args: list[Any]) -> Any:
    """The answer of the first substitute that has one.  A substitute that fails costs its loop, not the compilation."""
    from torch._dynamo.exc import TorchDynamoException

    started = time.perf_counter()
    try:
        results = (offer(tracer, function, args) for offer in _SUBSTITUTES)
        return next((r for r in results if r is not None), None)
    except TorchDynamoException:  # Dynamo's own control flow
        raise
    except Exception as error:  # noqa: BLE001  reported with the next graph, as every stage that fails
        text = f"capture: {type(error).__name__}: {error}".splitlines()[0]
        code = "verify.memory" if out_of_memory(error) else "internal"
        decline(str(getattr(getattr(function, "fn", None), "__qualname__", "")), Reject(code, text, "capture"))
        return None
    finally:
        _declined.seconds = getattr(_declined, "seconds", 0.0) + time.perf_counter() - started


def uninstall() -> None:
    """Restores Dynamo."""
    global _original
    if _original is not None:
        from torch._dynamo.symbolic_convert import InliningInstructionTranslator

        setattr(InliningInstructionTranslator, "inline_call", _original)  # noqa: B010
        _original = None


def compiles_for(tracer: Any, backend: Any) -> bool:
    """Whether ``tracer`` (Dynamo's instruction translator) works for ``backend``, through Dynamo's wrappers of it."""
    function = getattr(getattr(tracer, "output", None), "compiler_fn", None)
    for _ in range(8):
        if function is None or function is backend:
            break
        function = getattr(function, "_torchdynamo_orig_backend", None) or getattr(function, "compiler_fn", None)
    return function is backend
