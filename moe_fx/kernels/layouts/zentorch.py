"""Weights for zentorch: as they are, but owned, as the library remembers what it got by its address.

…_interleaved: for SwiGLU as gpt-oss has it, gate and up rows in turn.
"""

from __future__ import annotations

from moe_fx.kernels.layouts.library import LibraryLayout
from moe_fx.kernels.layouts.packed import PackedLayout
from moe_fx.kernels.layouts.registry import library_layout
from moe_fx.kernels.layouts.transforms import InterleaveRows

for _name, _first in (("zentorch", ()), ("zentorch.interleaved", (InterleaveRows(),))):
    _roles = dict.fromkeys(("w13", "w13_scale", "w13_bias"), _first) | dict.fromkeys(("w2", "w2_scale", "w2_bias"), ())
    library_layout(LibraryLayout(_name, PackedLayout("zentorch", _name, _roles), owned=True))
