"""Weights as libraries for accelerators read them: rows of the table of packed layouts, under "<library>.<scheme>"."""

from __future__ import annotations

from moe_fx.kernels.layouts.library import LibraryLayout
from moe_fx.kernels.layouts.packed import PackedLayout, find_packed
from moe_fx.kernels.layouts.registry import library_layout
from moe_fx.kernels.layouts.transforms import Cast, InterleaveRows

ROWS: dict[str, tuple[str, ...]] = {
    "flashinfer_cutlass": ("bf16", "fp8_tensor", "fp8_block", "nvfp4", "mxfp4_mxfp8"),
    "flashinfer_trtllm": ("bf16", "fp8_tensor", "fp8_block", "nvfp4", "mxfp4"),
    "deepgemm": ("fp8_block",),
    "marlin": (
        *("fp8_tensor", "fp8_channel", "fp8_block", "mxfp8", "mxfp4"),
        *(f"int{bits}_{group}" for bits in (4, 8) for group in ("channel", 32, 64, 128)),
    ),
    "vllm_cutlass": ("fp8_tensor", "fp8_channel"),
    "aiter": ("bf16", "fp8_tensor", "fp8_channel", "fp8_block", "mxfp8", "mxfp4_bf16", "mxfp4"),
    "torch_scaled_grouped": ("fp8_channel",),
}
for _library, _schemes in ROWS.items():
    for _scheme in _schemes:
        library_layout(LibraryLayout(f"{_library}.{_scheme}", find_packed(_library, _scheme)))

_TURNS = (InterleaveRows(),)
library_layout(  # values as they are: swizzled ones need the library's own function, on the GPU
    LibraryLayout(
        "triton_kernels.mxfp4",
        PackedLayout(
            "triton_kernels",
            "mxfp4",
            {
                "w13": _TURNS,
                "w13_scale": _TURNS,
                "w13_bias": (*_TURNS, Cast("float32")),
                "w2": (),
                "w2_scale": (),
                "w2_bias": (Cast("float32"),),
            },
        ),
    )
)
