"""The public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from moe_fx import backend
from moe_fx.options import resolve
from moe_fx.recorder import RECORDER
from moe_fx.report import Report
from moe_fx.weights import STORE


def compile(  # noqa: A001  the public name
    model: Any, *, fullgraph: bool = False, dynamic: bool | None = None, **options: Any
) -> Any:
    """``torch.compile(model, backend="moe_fx", options=options)``, with the options checked now.

    Raises MoEFxOptionError.  Also works where the entry point is not installed (a checkout on the path).
    """
    resolve(options)
    compiler: Any = torch.compile  # its stub knows options of scalars only
    return compiler(model, backend=backend.moe_fx, fullgraph=fullgraph, dynamic=dynamic, options=options)


def last_report() -> Report:
    """What the most recent torch.compile wrapper that compiled found: all its graphs, frames and recompiles."""
    return RECORDER.snapshot()


class _Once:
    """The backend under an identity of its own: Dynamo compiles again for it, whatever it compiled before."""

    _torchdynamo_orig_backend = staticmethod(backend.moe_fx)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return backend.moe_fx(*args, **kwargs, explain=True)


def explain(model: Any, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Plans ``model`` for these arguments as torch.compile with ``options`` would, and returns the report; what is left
    of the graph runs eagerly.

    The model is run once, in the caller's grad mode: with gradients wanted the plan is one for training.  Nothing is
    changed.  A model on the meta device works too: what its code computes is verified, its rounding is not.
    """
    resolve(options)
    once = _Once()
    RECORDER.begin(once)
    compiler: Any = torch.compile
    with torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        compiler(model, backend=once, options=options)(*args, **kwargs)
    return RECORDER.snapshot()


def reset() -> None:
    """Forgets reports, verdicts and packed weights.  Code that is compiled already stays valid."""
    backend.reset()
    STORE.clear()


def invalidate(model: Module | None = None) -> int:
    """Has packed copies of ``model``'s weights (None: of all models) written again, in place, before their next use.
    Returns how many.

    Needed only with ``memory="copy"`` or ``quantize``, after writes that no key can see: ``p.data.mul_()``, a NumPy
    view, another process.  The default ``memory="view"`` reads the model's own storage and is always right.
    """
    return STORE.invalidate(model)
