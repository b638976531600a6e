"""The oracle: which kernel over which layout for how many tokens, why, and what was vetoed for which reasons.

``choose`` plans a block of a graph, by price.  The named oracles (unquantized, fp8, int8, int_wna16, mxfp4, mxfp8,
nvfp4, w4a8) choose a library's backend for a layer that is configured by hand, by order.  Both ask the same ladder.
Imports specifications, descriptions and the kernel registry; never passes, lowerings or torch.fx: it is tested without
a graph and for machines that are not here.
"""

from moe_fx.oracle.engine import choose
from moe_fx.oracle.request import Request, layouts
from moe_fx.oracle.tune import tuned

__all__ = ["Request", "choose", "layouts", "tuned"]
