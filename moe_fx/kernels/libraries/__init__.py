"""Experts kernels of other libraries: what each can do and costs, as data (``capabilities``, ``platforms``), and the
adapters that call them, each registered by the decorator in its own file.

Nothing of a library is loaded before its kernel is called.
"""

from moe_fx.kernels.libraries import (
    capabilities,
    deep_gemm,
    flashinfer_cutlass,
    flashinfer_trtllm,
    marlin,
    platforms,
    rocm_aiter,
    torch_scaled,
    triton_kernels,
    vllm_cpu,
    vllm_cutlass,
    zentorch,
)
from moe_fx.kernels.libraries.rows import LIBRARIES, Library, library

__all__ = [
    "LIBRARIES",
    "Library",
    "capabilities",
    "deep_gemm",
    "flashinfer_cutlass",
    "flashinfer_trtllm",
    "library",
    "marlin",
    "platforms",
    "rocm_aiter",
    "torch_scaled",
    "triton_kernels",
    "vllm_cpu",
    "vllm_cutlass",
    "zentorch",
]
