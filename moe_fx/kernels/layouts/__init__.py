"""The built-in layouts, each registered by the decorator in its own file.  "view", the model's own storage, is none."""

from moe_fx.kernels.layouts import stacked, transposed
from moe_fx.kernels.layouts.registry import LAYOUTS, Layout, find_layout, layout

__all__ = ["LAYOUTS", "Layout", "find_layout", "layout", "stacked", "transposed"]
