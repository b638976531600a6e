"""Experts in C++ on a CPU: bf16, fp16 and fp32 weights as the model stores them, forward and backward.

x, ids → rows by expert → act(x W13') in tiles that a cache holds → hidden W2' summed over the experts into y.  Memory:
rows [T k, H] and hidden [T k, I] lie in the workspaces; each thread keeps a block of columns of y in float32 besides.
The backward keeps what lies between the products of one expert at a time.  Sources and toolchain: ``kernels/cpp``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from moe_fx import hardware
from moe_fx.binding import Experts
from moe_fx.kernels.capability import PLAIN
from moe_fx.kernels.cpp.layer import TYPES, CLayer, gradients, keep, layer, rows_of
from moe_fx.kernels.cpp.toolchain import INSTRUCTIONS, library
from moe_fx.kernels.experts import backward
from moe_fx.kernels.experts.reference import ALL
from moe_fx.kernels.experts.rows import empty_result, room
from moe_fx.kernels.experts.torch_experts import Scratch, TorchExperts
from moe_fx.kernels.modular_kernel.experts import Shape
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata
from moe_fx.kernels.registry import Cost, experts_kernel
from moe_fx.reference.experts import compute_dtype, dtype_of
from moe_fx.spec import MoESpec

FLOATS = frozenset({"float16", "bfloat16", "float32"})


@experts_kernel(
    "cpp",
    capability=replace(
        ALL,
        devices=frozenset({"cpu"}),
        archs=frozenset(INSTRUCTIONS),
        dtypes=FLOATS,
        norms=frozenset({""}),
        act_dtypes=FLOATS | {""},  # in float32, whatever is asked for
        compute_dtypes=frozenset({""}),
        accumulate=FLOATS | {""},  # in float32
        out_dtypes=FLOATS | {""},
        packages=frozenset({"moe_fx.cpp"}),
        schemes=frozenset({PLAIN}),
    ),
    # one call, whose Python takes as long as ten ops do; shares of the peak on two cores of a Zen 4, of bf16 and fp32
    cost=Cost("active", lambda E, T, k: 10, ((1, 0.2), (4, 0.6), (32, 0.82), (128, 0.87))),
    rank=5,
)
class CppExperts(TorchExperts):
    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: str,
    ) -> tuple[Shape, Shape, Shape]:
        dtype = self.workspace_dtype(self.moe_config.in_dtype)
        inner = self.adjust_N_for_activation(N, activation)
        rows, hidden = (4 * _lanes(dtype, width) // dtype.itemsize for width in (K, inner))
        return (M * topk, rows), (M * topk, hidden), (M, K)

    def temporary_shapes(self, M: int, N: int, K: int, topk: int, activation: str) -> tuple[Shape, ...]:
        return ()

    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        e, dtype = spec.expert, compute_dtype(experts, spec.expert)
        if self.keep is not None:
            self.keep += [x.new_empty((ids.numel(), matrices[0].shape[0]), dtype=dtype) for matrices in experts.up]
        if not ids.numel():
            return empty_result(x, spec, scratch.result)
        out_dtype = dtype_of(spec.combine.out_dtype, x.dtype)
        y = scratch.result if scratch.result is not None else x.new_empty(x.shape, dtype=out_dtype)
        written = y if out_dtype in TYPES and y.stride(1) == 1 else y.new_empty(y.shape, dtype=torch.float32)
        inputs = _Inputs(x, ids, weights, dtype, spec)
        call = layer(e, experts, written)
        inputs.into(call)
        places = [
            room(held, (ids.numel(), _lanes(dtype, width)), torch.float32, x)
            for held, width in ((scratch.first, e.hidden), (scratch.second, e.intermediate))
        ]
        call.rows, call.inner = (place.data_ptr() for place in places)
        keep(call, self.keep or (), experts.order, e)
        library(_arch()).moe_fx_forward(ctypes.byref(call))
        return y if written is y else y.copy_(written)

    @staticmethod
    def differentiate(
        dy: Tensor,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        experts: Experts,
        spec: MoESpec,
        grads: Experts | None,
        saved: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """In C++; where gate and up outputs stand in turn side by side, by the shared backward."""
        dtype = compute_dtype(experts, spec.expert)
        in_turn = spec.expert.gated and len(experts.up) == 1 and experts.order == "interleaved"
        if not ids.numel() or (in_turn and experts.up[0][0].stride(-1) != 1):  # type: ignore[union-attr]
            return backward.experts_backward(dy, x, ids, weights, experts, spec, grads, saved)
        inputs = _Inputs(x, ids, weights, dtype, spec)
        dx = x.new_empty(x.shape, dtype=x.dtype if x.dtype in TYPES else torch.float32)
        dweights = weights.new_empty(weights.shape, dtype=torch.float32)
        call = layer(spec.expert, experts, dx)
        inputs.into(call)
        keep(call, saved, experts.order, spec.expert)
        dy, plain = rows_of(dy, dtype), rows_of(x, dtype)
        wanted = gradients(spec.expert, grads)
        wanted.dy, wanted.dy_row = dy.data_ptr(), dy.stride(0) * dy.element_size()
        wanted.x, wanted.x_row = plain.data_ptr(), plain.stride(0) * plain.element_size()
        wanted.weights, wanted.dweights = inputs.weights.data_ptr(), dweights.data_ptr()
        library(_arch()).moe_fx_backward(ctypes.byref(call), ctypes.byref(wanted))
        return dx.to(x.dtype), dweights.to(weights.dtype)


class _Inputs:
    """The tensors of a call as the library reads them; they live as long as this does."""

    def __init__(self, x: Tensor, ids: Tensor, weights: Tensor, dtype: torch.dtype, spec: MoESpec) -> None:
        self.on_input = spec.combine.weight_on == "input"
        self.x = rows_of((x[:, None] * weights[..., None]).flatten(0, 1) if self.on_input else x, dtype)
        self.ids = ids.to(torch.int64).contiguous()
        self.weights = weights.to(torch.float32).contiguous()

    def into(self, call: CLayer) -> None:
        call.tokens, call.top_k = self.ids.shape
        call.threads = torch.get_num_threads()
        call.x, call.x_row, call.each = self.x.data_ptr(), self.x.stride(0) * self.x.element_size(), self.on_input
        call.ids, call.weights = self.ids.data_ptr(), None if self.on_input else self.weights.data_ptr()


@lru_cache(maxsize=1)
def _arch() -> str:
    return hardware.detect(torch.device("cpu")).arch


def _lanes(dtype: torch.dtype, n: int) -> int:
    return int(library(_arch()).moe_fx_lanes(TYPES[dtype], n))
