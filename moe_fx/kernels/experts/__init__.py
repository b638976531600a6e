"""The built-in experts kernels, each registered by the decorator in its own file."""

from moe_fx.kernels.experts import (
    batched_loop,
    cpp_experts,
    gather_bmm,
    gather_gemv,
    reference,
    routed_loop,
    sorted_loop,
    torch_grouped,
    triton_experts,
    triton_quantised,
)
from moe_fx.kernels.experts.backward import experts_backward

__all__ = [
    "batched_loop",
    "cpp_experts",
    "experts_backward",
    "gather_bmm",
    "gather_gemv",
    "reference",
    "routed_loop",
    "sorted_loop",
    "torch_grouped",
    "triton_experts",
    "triton_quantised",
]
