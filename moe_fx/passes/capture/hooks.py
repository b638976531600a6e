"""The one place where moe_fx looks into Dynamo.  For *our* backend, each function that Dynamo is about to inline is
first offered to the substitutes registered here, and each frame is traced inside the contexts registered here.  For
every other backend, thread and torch.export the hooks pass through.

Holds: whether a compilation is ours is read off the tracer at hand, never off a flag; a substitute that raises or
declines leaves Dynamo's own behaviour; of the two hooks each is there where torch has what it needs, whatever the other
lacks; ``uninstall`` restores Dynamo.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

from moe_fx.reasons import Reject, out_of_memory

# (tracer, function about to be inlined, its arguments by position and by name) → the result to use instead, or None to
# inline as usual
Substitute = Callable[[Any, Any, list[Any], dict[str, Any]], Any]

# tracer of a frame (Dynamo's, before its first instruction) → what surrounds the trace
Surrounding = Callable[[Any], AbstractContextManager[None]]

# private names of torch: (module, attribute path)
INLINING = (
    ("torch._dynamo.symbolic_convert", "InliningInstructionTranslator.inline_call"),
    ("torch._dynamo.exc", "TorchDynamoException"),
)
TRACING = (
    ("torch._dynamo.symbolic_convert", "InstructionTranslator.run"),
    ("torch._dynamo.exc", "RestartAnalysis"),
    ("torch._dynamo.exc", "TorchDynamoException"),
)


class Note(NamedTuple):
    """fqn: of the module whose loop was left to Dynamo.  source: "file:line", "" where unknown."""

    fqn: str
    reasons: tuple[Reject, ...]
    source: str


_SUBSTITUTES: list[Substitute] = []
_SURROUNDINGS: list[Surrounding] = []
_declined = threading.local()
_undo: list[Callable[[], None]] = []  # for each hook that is in place


def substitute(function: Substitute) -> Substitute:
    """Registers a substitute."""
    _SUBSTITUTES.append(function)
    return function


def surround(function: Surrounding) -> Surrounding:
    """Registers a context for the trace of each frame; one that is registered later surrounds those before."""
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


def lacking(names: Iterable[tuple[str, str]]) -> str:
    """The first of ``names`` (module, attribute path) that is not there, with its module; "" when all are."""
    for module, path in names:
        try:
            functools.reduce(getattr, path.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            return f"{module}.{path}"
    return ""


def available() -> str:
    """ "" when both hooks can be installed, else what this torch lacks, and for what."""
    lacks = {"loops of transformers' experts": _no_inlining(), "loops with torch.where": _no_tracing()}
    return "; ".join(f"{why} (for {what})" for what, why in lacks.items() if why)


def _no_inlining() -> str:
    """Why functions cannot be offered to substitutes; "" when they can."""
    if name := lacking(INLINING):
        return f"{name} is missing"
    from torch._dynamo.symbolic_convert import InliningInstructionTranslator

    found = inspect.getattr_static(InliningInstructionTranslator, "inline_call")
    if not isinstance(found, classmethod):
        return "InliningInstructionTranslator.inline_call is not a class method"
    names = list(inspect.signature(found.__func__).parameters)
    if names[:5] != ["cls", "parent", "func", "args", "kwargs"]:
        return f"InliningInstructionTranslator.inline_call takes {names}"
    return ""


def _no_tracing() -> str:
    """Why traces cannot be surrounded; "" when they can."""
    name = lacking(TRACING)
    return f"{name} is missing" if name else ""


def install(backend: Any, active: Callable[[], bool] = lambda: True) -> str:
    """Wraps Dynamo's inlining and tracing for ``backend``, once, each where it can.  Returns ``available()``.

    active: asked each time; while it says no, Dynamo is as without us.
    """
    if not _undo:
        for missing, wrap in ((_no_inlining(), _wrap_inlining), (_no_tracing(), _wrap_tracing)):
            if not missing:
                wrap(backend, active)
    return available()


def _wrap_inlining(backend: Any, active: Callable[[], bool]) -> None:
    from torch._dynamo.symbolic_convert import InliningInstructionTranslator

    original: Any = inspect.getattr_static(InliningInstructionTranslator, "inline_call")

    @functools.wraps(original.__func__)
    def inline_call(cls: Any, parent: Any, func: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if compiles_for(parent, backend) and active():
            result = _offered(parent, func, list(args), dict(kwargs))
            if result is not None:
                return result
        return original.__func__(cls, parent, func, args, kwargs, *rest, **more)

    setattr(InliningInstructionTranslator, "inline_call", classmethod(inline_call))  # noqa: B010  mypy: a method
    _undo.append(lambda: setattr(InliningInstructionTranslator, "inline_call", original))


def _wrap_tracing(backend: Any, active: Callable[[], bool]) -> None:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    own, original = vars(InstructionTranslator).get("run"), InstructionTranslator.run

    @functools.wraps(original)
    def run(self: Any) -> None:
        with ExitStack() as stack:
            if compiles_for(self, backend) and active():
                for surrounding in reversed(_SURROUNDINGS):
                    with _guarded("a frame"):
                        stack.enter_context(surrounding(self))
            original(self)

    def undo() -> None:
        if own is None:
            delattr(InstructionTranslator, "run")  # inherited again
        else:
            setattr(InstructionTranslator, "run", own)  # noqa: B010

    setattr(InstructionTranslator, "run", run)  # noqa: B010
    _undo.append(undo)


def _offered(tracer: Any, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The answer of the first substitute that has one.  A substitute that fails costs its loop, not the compilation."""
    started = time.perf_counter()
    with _guarded(str(getattr(getattr(function, "fn", None), "__qualname__", ""))):
        results = (offer(tracer, function, args, kwargs) for offer in _SUBSTITUTES)
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
    while _undo:
        _undo.pop()()


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
