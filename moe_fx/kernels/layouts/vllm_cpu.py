"""Weights as the CPU kernels of vLLM read them: 16 or 32 output channels side by side.

vec: 16 channels, one input each, any float.  vnni: 32 channels, two inputs each, bfloat16.  int8, mxfp4: codes,
with their scales.  …_interleaved: for SwiGLU as gpt-oss has it, gate and up rows in turn.
All are permutations (int8 has sums of its rows besides); compared with the library's own functions where it is there.
"""

from __future__ import annotations

from moe_fx.kernels.layouts.library import LibraryLayout
from moe_fx.kernels.layouts.packed import Chain, PackedLayout
from moe_fx.kernels.layouts.registry import library_layout
from moe_fx.kernels.layouts.transforms import Cast, InterleaveRows, Vnni, VnniInt8, VnniNibbles

LIBRARY = "vllm_cpu"


def _layouts(scheme: str, step: Chain, scales: Chain | None = None, biases: Chain = ()) -> None:
    """The layout of a scheme, and the one with gate and up rows in turn."""
    for suffix, first in (("", ()), ("_interleaved", (InterleaveRows(),))):
        chains = {"w13": first + step, "w2": step, "w13_bias": first + biases, "w2_bias": biases}
        if scales is not None:
            chains |= {"w13_scale": first + scales, "w2_scale": scales}
        name = scheme + suffix
        library_layout(LibraryLayout(f"{LIBRARY}.{name}", PackedLayout(LIBRARY, name, chains)))


_layouts("vec", (Vnni(1, 16),))
_layouts("vnni", (Vnni(2, 32),), biases=(Cast("float32"),))
_layouts("int8", (VnniInt8(),), ())
_layouts("mxfp4", (VnniNibbles(),), (Vnni(1, 32),), (Cast("float32"),))
