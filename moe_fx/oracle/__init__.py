"""The oracle: which kernel over which layout for how many tokens, why, and what was vetoed for which reasons.

Imports specifications, descriptions and the kernel registry; never passes, lowerings or torch.fx: it is tested without
a graph and for machines that are not here.
"""

from moe_fx.oracle.engine import choose
from moe_fx.oracle.request import Request, layouts
from moe_fx.oracle.tune import tuned

__all__ = ["Request", "choose", "layouts", "tuned"]
