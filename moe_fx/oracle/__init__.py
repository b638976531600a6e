"""The oracle: which kernel over which layout for how many tokens, why, and what was vetoed for which reasons.

``choose`` plans a block of a graph, by price.  The named oracles (unquantized, fp8, int8, int_wna16, mxfp4, mxfp8,
nvfp4, w4a8) choose a library's backend for a layer that is configured by hand, by order.  Both ask the same ladder.
Imports specifications, descriptions and the kernel registry; never passes, lowerings or torch.fx: it is tested without
a graph and for machines that are not here.
"""

from __future__ import annotations

import importlib
from typing import Any

from moe_fx.oracle.engine import choose
from moe_fx.oracle.request import Request, layouts
from moe_fx.oracle.tune import tuned

_NAMED = ("fp8", "int8", "int_wna16", "mxfp4", "mxfp8", "nvfp4", "unquantized", "w4a8")
_HOMES = {
    "moe_fx.oracle.fp8": (
        "Fp8MoeBackend",
        "convert_to_fp8_moe_kernel_format",
        "make_fp8_moe_kernel",
        "make_fp8_moe_quant_config",
        "select_fp8_moe_backend",
    ),
    "moe_fx.oracle.unquantized": (
        "UnquantizedMoeBackend",
        "map_unquantized_backend",
        "select_unquantized_moe_backend",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["Request", "choose", "layouts", "tuned", *_NAMED, *_HOME_OF]  # the named ones load on first use


def __getattr__(name: str) -> Any:
    if name in _NAMED:
        return importlib.import_module(f"moe_fx.oracle.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_fx.oracle' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMED, *_HOME_OF])
