"""The one place where moe_fx looks into Dynamo.  For *our* backend, each function that Dynamo is about to inline is
first offered to the substitutes registered here, and each frame is traced inside the contexts registered here.  For
every other backend, thread and torch.export the hooks pass through.

Holds: whether a compilation is ours is read off the tracer at hand, never off a flag; a substitute that raises or
declines leaves Dynamo's own behaviour; ``uninstall`` restores Dynamo.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

from moe_fx.reasons import Reject, out_of_memory

# (tracer, function about to be inlined, its arguments) → the result to use instead, or None to inline as usual
Substitute = Callable[[Any, Any, list[Any]], Any]

# tracer of a frame (Dynamo's, before its first instruction) → what surrounds the trace
Surrounding = Callable[[Any], AbstractContextManager[None]]


class Note(NamedTuple):
    """fqn: of the module whose loop was left to Dynamo.  source: "file:line", "" where unknown."""

    fqn: str
    reasons: tuple[Reject, ...]
    source: str


_SUBSTITUTES: list[Substitute] = []
_SURROUNDINGS: list[Surrounding] = []
_declined = threading.local()
_original: Any = None


def substitute(function: Substitute) -> Substitute:
    """Registers a substitute."""
    _SUBSTITUTES.append(function)
    return function


def surround(function: Surrounding) -> Surrounding:
    """Registers a context for the trace of each frame."""
    _SURROUNDINGS.append(function)
    return function


def decline(fqn: str, *reasons: Reject, source: str = "") -> None:
    """Notes, for the report, why a loop was left to Dynamo.  source: "file:line"."""
    _declined.__dict__.setdefault("notes", {})[fqn] = Note(fqn, reasons, source)


def take_notes() -> list[Note]:
    """The notes of this thread, one for each name; they are gone then."""
    return list(_declined.__dict__.pop("notes", {}).values())


def drain() -> tuple[list[Note], float]:
    """The notes, and the seconds that substitutes took, since the last graph of this thread."""
    return take_notes(), _declined.__dict__.pop("seconds", 0.0)


def available() -> str:
    """ "" when the hook can be installed, else what this torch lacks."""
    try:
        from torch._dynamo.symbolic_convert import InliningInstructionTranslator, InstructionTranslator
    except ImportError as error:
        return f"torch._dynamo.symbolic_convert: {error}"
    if "run" in vars(InstructionTranslator) or not callable(getattr(InstructionTranslator, "run", None)):
        return "InstructionTranslator does not inherit its method run"
    found = inspect.getattr_static(InliningInstructionTranslator, "inline_call", None)
    if not isinstance(found, classmethod):
        return "InliningInstructionTranslator.inline_call is not a class method"
    names = list(inspect.signature(found.__func__).parameters)
    if names[:5] != ["cls", "parent", "func", "args", "kwargs"]:
        return f"InliningInstructionTranslator.inline_call takes {names}"
    return ""


def install(backend: Any, active: Callable[[], bool] = lambda: True) -> str:
    """Wraps Dynamo's inlining and tracing for ``backend``, once.  Returns why not, where it cannot ("" when done).

    active: asked each time; while it says no, Dynamo is as without us.
    """
    global _original
    if _original is not None or (missing := available()):
        return "" if _original is not None else missing
    from torch._dynamo.symbolic_convert import InliningInstructionTranslator, InstructionTranslator

    _original = inspect.getattr_static(InliningInstructionTranslator, "inline_call")

    @functools.wraps(_original.__func__)
    def inline_call(cls: Any, parent: Any, func: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if not kwargs and compiles_for(parent, backend) and active():
            result = _offered(parent, func, list(args))
            if result is not None:
                return result
        return _original.__func__(cls, parent, func, args, kwargs, *rest, **more)

    inherited = InstructionTranslator.run

    @functools.wraps(inherited)
    def run(self: Any) -> None:
        with ExitStack() as stack:
            if compiles_for(self, backend) and active():
                for surrounding in _SURROUNDINGS:
                    with _guarded("a frame"):
                        stack.enter_context(surrounding(self))
            inherited(self)

    setattr(InliningInstructionTranslator, "inline_call", classmethod(inline_call))  # noqa: B010  mypy: a method
    setattr(InstructionTranslator, "run", run)  # noqa: B010
    return ""


def _offered(tracer: Any, function: Any, args: list[Any]) -> Any:
    """The answer of the first substitute that has one.  A substitute that fails costs its loop, not the compilation."""
    started = time.perf_counter()
    with _guarded(str(getattr(getattr(function, "fn", None), "__qualname__", ""))):
        results = (offer(tracer, function, args) for offer in _SUBSTITUTES)
        found = next((r for r in results if r is not None), None)
        _declined.seconds = getattr(_declined, "seconds", 0.0) + time.perf_counter() - started
        return found
    return None


@contextmanager
def _guarded(what: str) -> Iterator[None]:
    """A failure of ours is noted for ``what``; Dynamo's own control flow passes."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException:
        raise
    except Exception as error:  # noqa: BLE001  reported with the next graph, as every stage that fails
        text = f"capture: {type(error).__name__}: {error}".splitlines()[0]
        code = "verify.memory" if out_of_memory(error) else "internal"
        decline(what, Reject(code, text, "capture"))


def uninstall() -> None:
    """Restores Dynamo."""
    global _original
    if _original is not None:
        from torch._dynamo.symbolic_convert import InliningInstructionTranslator, InstructionTranslator

        setattr(InliningInstructionTranslator, "inline_call", _original)  # noqa: B010
        delattr(InstructionTranslator, "run")  # inherited again
        _original = None


def compiles_for(tracer: Any, backend: Any) -> bool:
    """Whether ``tracer`` (Dynamo's instruction translator) works for ``backend``."""
    return wrapper_of(tracer, backend) is not None


def wrapper_of(tracer: Any, backend: Any) -> Any:
    """The innermost of Dynamo's wrappers of ``backend`` that ``tracer`` works for (torch.compile makes it); None where
    it works for another backend."""
    wrapper = function = getattr(getattr(tracer, "output", None), "compiler_fn", None)
    for _ in range(8):
        if function is None or function is backend:
            break
        wrapper = function
        function = getattr(function, "_torchdynamo_orig_backend", None) or getattr(function, "compiler_fn", None)
    return wrapper if function is not None and function is backend else None
