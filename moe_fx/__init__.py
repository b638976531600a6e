"""moe_fx: ``torch.compile(model, backend="moe_fx")`` makes mixture-of-experts models fast, unmodified.

Importing the package imports neither torch's compiler nor transformers; the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_fx.api import compile, explain, invalidate, last_report, reset  # noqa: A004
    from moe_fx.reasons import (
        MoEFxError,
        MoEFxInternalError,
        MoEFxOptionError,
        MoEFxRuntimeError,
        MoEFxUnsupportedError,
        MoEFxWarning,
    )
    from moe_fx.report import Report

__version__ = "0.1.0"

_HOMES = {
    "moe_fx.api": ("compile", "explain", "invalidate", "last_report", "reset"),
    "moe_fx.report": ("Report",),
    "moe_fx.reasons": (
        "MoEFxError",
        "MoEFxInternalError",
        "MoEFxOptionError",
        "MoEFxRuntimeError",
        "MoEFxUnsupportedError",
        "MoEFxWarning",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "MoEFxError",
    "MoEFxInternalError",
    "MoEFxOptionError",
    "MoEFxRuntimeError",
    "MoEFxUnsupportedError",
    "MoEFxWarning",
    "Report",
    "__version__",
    "compile",
    "explain",
    "invalidate",
    "last_report",
    "reset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_fx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
