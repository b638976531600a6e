"""Grouped products in Triton: rows sorted on the device, the activation in the first product, nothing waits.

x, ids → tiles of rows of one expert → act(x W13') → hidden W2' → sums over the slots.  Up to 64 routed rows, where that
is not more than experts, nothing is sorted and each row is a tile.  Memory: hidden [T k, I] and results [T k, H] lie in
the workspaces; allocated besides are indices.  Device code: ``kernels/triton``, imported at the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.kernels.capability import NO_ALL2ALL, PLAIN, Open
from moe_fx.kernels.config.parallel import BATCHED
from moe_fx.kernels.experts import backward
from moe_fx.kernels.experts.reference import ALL
from moe_fx.kernels.experts.rows import empty_result, room
from moe_fx.kernels.experts.torch_experts import BatchedExperts, Scratch, TorchExperts
from moe_fx.kernels.libraries.capabilities import BATCHED_COST, TRITON_COST
from moe_fx.kernels.modular_kernel.experts import Shape
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata
from moe_fx.kernels.registry import experts_kernel
from moe_fx.reference.experts import compute_dtype, dtype_of
from moe_fx.spec import MoESpec

if TYPE_CHECKING:
    from moe_fx.kernels.triton.launch import Job

FLOATS = frozenset({"float16", "bfloat16", "float32"})
CAPABILITY = replace(
    ALL,
    devices=frozenset({"cuda"}),
    dtypes=FLOATS,
    act_dtypes=FLOATS | {""},  # in float32, whatever is asked for
    compute_dtypes=FLOATS | {""},
    accumulate=FLOATS | {""},  # in float32
    out_dtypes=FLOATS | {""},
    packages=frozenset({"triton", "moe_fx.triton"}),
    schemes=frozenset({PLAIN}),
    captures=Open(),
)
# on one rank somebody has to lay tokens out in batches first, and to take them out again
ALONE = replace(BATCHED_COST, launches=lambda E, T, k: 24)


@experts_kernel("triton", capability=CAPABILITY, cost=TRITON_COST, rank=8)
class TritonExperts(TorchExperts):
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
        return (M * topk, K), (M * topk, self.adjust_N_for_activation(N, activation)), (M, K)

    def temporary_shapes(self, M: int, N: int, K: int, topk: int, activation: str) -> tuple[Shape, ...]:
        """Order and tiles: at most three numbers of 32 bits a routed row."""
        return ((M * topk, 6),)

    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        from moe_fx.kernels.triton import launch

        e, size = spec.expert, ids.numel()
        dtype = compute_dtype(experts, e, x.dtype)
        if self.keep is not None:
            self.keep += [x.new_empty((size, matrices[0].shape[0]), dtype=dtype) for matrices in experts.up]
        if not size:
            return empty_result(x, spec, scratch.result)
        on_input = spec.combine.weight_on == "input"
        hidden = room(scratch.second, (size, e.intermediate), dtype, x)
        out = room(scratch.first, (size, e.hidden), dtype, x)
        y = scratch.result
        if y is None:
            y = x.new_empty(x.shape, dtype=dtype_of(spec.combine.out_dtype, x.dtype))
        job = launch.listed(ids, spec, dtype, sort=self.keep is not None)
        self.products(job, x, weights if on_input else None, experts, hidden, out)
        launch.reduce(out, None if on_input else weights, ids, spec, experts.norm, y)
        return y

    def products(
        self, job: Job, x: Tensor, weights: Tensor | None, experts: Experts, hidden: Tensor, out: Tensor
    ) -> None:
        """hidden [T k, I] in order of rows, out [T k, H] by flat position.  weights: where they are on the input."""
        from moe_fx.kernels.triton import launch

        launch.up_products(job, x, weights, experts, hidden, self.keep or ())
        launch.down_products(job, hidden, experts, out)

    @classmethod
    def waits_in_backward(cls, spec: MoESpec) -> bool:
        return bool(spec.expert.norm)

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
        """In Triton, without a wait; experts with a norm, whose results it would need again, by the shared backward."""
        from moe_fx.kernels.triton import gradients

        own = ids.numel() and not spec.expert.norm
        run = gradients.experts_backward if own else backward.experts_backward
        return run(dy, x, ids, weights, experts, spec, grads, saved)


@experts_kernel(
    "batched_triton",
    capability=replace(
        CAPABILITY,
        weight_on=frozenset({"output"}),  # a batch has one row for a token, whatever its weight
        norms=frozenset({""}),
        all2all=frozenset({NO_ALL2ALL, *BATCHED}),
        backward="",
        batched=True,
    ),
    cost=ALONE,
    rank=58,
)
class BatchedTritonExperts(BatchedExperts):
    """Rows after a batch's count are neither read nor written."""

    def temporary_shapes(self, M: int, N: int, K: int, topk: int, activation: str) -> tuple[Shape, ...]:
        """hidden, of every place of every batch."""
        return ((self.moe_config.num_local_experts * M, self.adjust_N_for_activation(N, activation)),)

    def batches(
        self, output: Tensor, x: Tensor, experts: Experts, spec: MoESpec, meta: ExpertTokensMetadata, routed: int
    ) -> None:
        from moe_fx.kernels.triton import launch

        dtype, most = compute_dtype(experts, spec.expert, x.dtype), x.shape[1]
        if not most:
            return
        hidden = x.new_empty((x.shape[0] * most, spec.expert.intermediate), dtype=dtype)
        job = launch.batched(meta.expert_num_tokens, most, spec, dtype, routed)
        launch.up_products(job, x.flatten(0, 1), None, experts, hidden)
        launch.down_products(job, hidden, experts, output.view(-1, output.shape[-1]))
