"""The built-in layouts, each registered by the decorator in its own file.  "view", the model's own storage, is none."""

from moe_fx.kernels.layouts import devices, quantised, stacked, transposed, vllm_cpu, zentorch
from moe_fx.kernels.layouts.registry import LAYOUTS, Layout, Packing, find_layout, layout

__all__ = [
    "LAYOUTS",
    "Layout",
    "Packing",
    "devices",
    "find_layout",
    "layout",
    "quantised",
    "stacked",
    "transposed",
    "vllm_cpu",
    "zentorch",
]
