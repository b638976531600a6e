"""What quantising the weights of a block does to its output: the same few tokens through both.

The plan, the spec with its codes, and the model's own weights enter; bytes and an error leave.  The copy that is made
for it is the one that the compiled model then runs on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_fx.binding import WeightBinding, bind
from moe_fx.kernels.build import run
from moe_fx.kernels.layouts.quantised import QuantisedLayout
from moe_fx.kernels.registry import kernel
from moe_fx.plan import Plan
from moe_fx.quant import UNQUANTISED
from moe_fx.reference import experts_forward
from moe_fx.spec import MoESpec
from moe_fx.weights import STORE, by_operand

TOKENS = 4  # each goes to k experts: enough rows for an average, and few matrices to dequantise


def sizes(spec: MoESpec, binding: WeightBinding, like: Sequence[Tensor]) -> tuple[int, int]:
    """(bytes of the matrices that become codes, bytes of the codes and what belongs to them).

    like: the operands, or fake ones.
    """
    layout, experts = QuantisedLayout(spec.quant), spec.expert.experts
    groups = [g for g in by_operand(binding, list(like), experts) if layout.copies(g[0])]
    before = sum(t.numel() * t.element_size() for _, tensors in groups for t in tensors)
    return before, sum(layout.bytes(operand, tensors, experts) for operand, tensors in groups)


def output_error(
    spec: MoESpec, binding: WeightBinding, plan: Plan, operands: list[Tensor], dtype: torch.dtype
) -> float | None:
    """Root mean square of the difference that quantising makes to the block's output, over that of the output itself.

    x: TOKENS normal rows of ``dtype``, the same for every block; ids and weights random.  The kernel that ``plan`` has
    for so many tokens, against the reference on the model's weights as they are.  None where that is not finite.
    """
    e, device = spec.expert, operands[0].device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, e.hidden, generator=generator).to(device, dtype)
    scores, ids = torch.rand(TOKENS, e.experts, generator=generator).topk(spec.top_k)
    ids, weights = ids.to(device), (scores / scores.sum(-1, keepdim=True)).to(device, dtype)
    with torch.no_grad(), torch._C._DisableAutocast():
        original = experts_forward(
            x, ids, weights, bind(binding, operands, e.experts), replace(spec, quant=UNQUANTISED)
        )
        experts = STORE.get(plan.layout, binding, operands, e.experts, spec.quant)
        y = run(kernel(plan.kernel_for(TOKENS)), x, ids, weights, experts, spec, plan.workspace_bytes)
    scale = original.double().norm()
    if not bool(scale.isfinite()):
        return None
    error = float((y.double() - original.double()).norm() / scale) if scale > 0 else float(y.double().norm())
    return error if error == error else float("inf")
