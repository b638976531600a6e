"""One batch an expert: two GEMMs over the rows that each batch has.

x [El, max_tokens, H] with a count for each expert → [El, max_tokens, H]; rows after a count stay undefined, and the sum
over a token's experts is left to finalize.  On the host the counts bound the work; on a device, where reading them
would wait, whole batches are computed.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moe_fx.binding import Experts, Matrices
from moe_fx.kernels.capability import NO_ALL2ALL
from moe_fx.kernels.config.parallel import BATCHED
from moe_fx.kernels.experts.reference import ALL, DEQUANTISE, EFFICIENCY
from moe_fx.kernels.experts.rows import Segment, activate, down_products, rounded, up_products
from moe_fx.kernels.experts.torch_experts import Scratch, TorchExperts, refuse_codes
from moe_fx.kernels.modular_kernel.experts import Shape, Up
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata
from moe_fx.kernels.registry import Cost, experts_kernel
from moe_fx.kernels.weight_and_reduce import TopKWeightAndReduce, TopKWeightAndReduceDelegate
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.reference.experts import compute_dtype, normalise
from moe_fx.spec import MoESpec

CAPABILITY = replace(
    ALL,
    weight_on=frozenset({"output"}),  # a batch has one row for a token, whatever its weight
    accumulate=frozenset({"", "float32", "bfloat16", "float16"}),  # finalize adds up in float32
    all2all=frozenset({NO_ALL2ALL, *BATCHED}),
    backward="",
    batched=True,
)


@experts_kernel(
    "batched_loop",
    capability=CAPABILITY,
    cost=Cost("all", lambda E, T, k: 20 + 4 * E, EFFICIENCY, DEQUANTISE),
    rank=60,
)
class BatchedLoopExperts(TorchExperts):
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
        return (0,), (0,), (local_num_experts, M, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        return TopKWeightAndReduceDelegate()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Up,
        w2: Matrices,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: str,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        if expert_tokens_meta is None:
            raise MoEFxRuntimeError("batches of tokens come with a count for each expert; prepare gave none")
        refuse_codes(a1q_scale)
        experts, spec = self.view(w1, w2), self.spec_for(activation)
        dtype = compute_dtype(experts, spec.expert, hidden_states.dtype)
        most = hidden_states.shape[1]
        known = expert_tokens_meta.expert_num_tokens_cpu
        for e in range(hidden_states.shape[0]):
            rows = most if known is None else int(known[e])
            if rows:
                output[e, :rows] = self._expert(hidden_states[e, :rows].to(dtype), e, experts, spec)

    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        raise MoEFxRuntimeError("batched_loop takes one batch an expert")

    def _expert(self, inputs: Tensor, e: int, experts: Experts, spec: MoESpec) -> Tensor:
        """inputs [n, H] through expert e → [n, H]."""
        chunk: list[Segment] = [(e, 0, inputs.shape[0])]
        up = up_products(rounded(inputs, "a1", experts, spec, chunk), experts, chunk)
        hidden = rounded(activate(up, experts, spec.expert), "a2", experts, spec, chunk)
        return normalise(down_products(hidden, experts, chunk), experts.norm, spec.expert)
