"""One batch an expert: two GEMMs over the rows that each batch has.

x [El, max_tokens, H] with a count for each expert → [El, max_tokens, H]; rows after a count stay undefined, and the sum
over a token's experts is left to finalize.  On the host the counts bound the work; on a device, where reading them
would wait, whole batches are computed.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.kernels.capability import NO_ALL2ALL, Open
from moe_fx.kernels.config.parallel import BATCHED
from moe_fx.kernels.experts.codes import DEQUANTISE
from moe_fx.kernels.experts.reference import ALL, EFFICIENCY, GPU_EFFICIENCY, PASSES
from moe_fx.kernels.experts.rows import Segment, activate, down_products, rounded, up_products
from moe_fx.kernels.experts.torch_experts import BatchedExperts
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata
from moe_fx.kernels.registry import Cost, experts_kernel
from moe_fx.reference.experts import compute_dtype, normalise
from moe_fx.spec import MoESpec

CAPABILITY = replace(
    ALL,
    weight_on=frozenset({"output"}),  # a batch has one row for a token, whatever its weight
    accumulate=frozenset({"", "float32", "bfloat16", "float16"}),  # finalize adds up in float32
    all2all=frozenset({NO_ALL2ALL, *BATCHED}),
    backward="",
    batched=True,
    captures=Open(),
)


@experts_kernel(
    "batched_loop",
    capability=CAPABILITY,
    cost=Cost("all", lambda E, T, k: 20 + 4 * E, EFFICIENCY, DEQUANTISE, GPU_EFFICIENCY, passes=PASSES),
    rank=60,
)
class BatchedLoopExperts(BatchedExperts):
    def batches(
        self, output: Tensor, x: Tensor, experts: Experts, spec: MoESpec, meta: ExpertTokensMetadata, routed: int
    ) -> None:
        dtype, known = compute_dtype(experts, spec.expert, x.dtype), meta.expert_num_tokens_cpu
        for e in range(x.shape[0]):
            rows = x.shape[1] if known is None else int(known[e])
            if rows:
                output[e, :rows] = self._expert(x[e, :rows].to(dtype), e, experts, spec)

    def _expert(self, inputs: Tensor, e: int, experts: Experts, spec: MoESpec) -> Tensor:
        """inputs [n, H] through expert e → [n, H]."""
        chunk: list[Segment] = [(e, 0, inputs.shape[0])]
        up = up_products(rounded(inputs, "a1", experts, spec, chunk), experts, chunk)
        hidden = rounded(activate(up, experts, spec.expert), "a2", experts, spec, chunk)
        return normalise(down_products(hidden, experts, chunk), experts.norm, spec.expert)
