"""Which routers the device code of ``kernels/triton/routing`` serves, and the call of it.  Imports no triton."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moe_fx.hardware import detect
from moe_fx.reference.experts import dtype_of
from moe_fx.reference.router import weights_dtype
from moe_fx.spec import RouterSpec

MOST_EXPERTS, MOST_CHOSEN = 1024, 32  # all of a token's lie in registers
SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def serves(
    spec: RouterSpec,
    logits: torch.dtype,
    top_k: int,
    experts: int,
    bias: torch.dtype = torch.float32,
    expert_scale: torch.dtype = torch.float32,
) -> str | None:
    """Why the kernel does not serve this router; None where it does.

    bias, expert_scale: dtypes of those operands, where the spec has them.  The kernel chooses by float32.  A choice by
    16 bits has ties that are torch's to resolve, unless it is on the logits themselves.  What is no router is not
    served: the reference says why.
    """
    scores, late = dtype_of(spec.score_dtype, logits), spec.order == "topk_first"
    result = weights_dtype(logits, expert_scale if spec.expert_scale else None, spec)
    if not {logits, scores, result} <= set(_FLOATS):
        return f"the kernel computes in float32, not from {logits} by {scores} to {result}"
    if not 1 <= top_k <= experts or top_k > MOST_CHOSEN or experts > MOST_EXPERTS:
        return f"{top_k} of {experts} experts: the kernel chooses up to {MOST_CHOSEN} of up to {MOST_EXPERTS}"
    if not late and scores != torch.float32:
        return f"scores are rounded to {scores} before the choice"
    added = torch.promote_types(logits if spec.bias == "logits" else scores, bias)
    if spec.bias and added != torch.float32:
        return f"the choice is by biased values of {added}"
    if spec.score not in SCORES or (late and (spec.bias == "scores" or spec.groups > 1)):
        return f"{spec} is no router"
    if spec.groups < 1 or experts % spec.groups or not 1 <= spec.topk_groups <= spec.groups:
        return f"{spec.topk_groups} of {spec.groups} groups of {experts} experts are no groups"
    if spec.groups > 1 and spec.group_score == "top2_sum" and experts // spec.groups < 2:
        return "groups of one expert have no two best"
    return None


@lru_cache(maxsize=64)
def runs_on(device: torch.device) -> bool:
    """Whether device code of ours runs there."""
    if device.type != "cuda":
        return False
    found = detect(device)
    return found.kind == "cuda" and "moe_fx.triton" in found.installed and int(found.arch.removeprefix("sm")) >= 80


def route(
    logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, spec: RouterSpec, top_k: int
) -> tuple[Tensor, Tensor] | None:
    """What ``reference.router.route`` gives, by the kernel; None where that does not run on the device of the logits or
    does not serve the router."""
    dtypes = [torch.float32 if operand is None else operand.dtype for operand in (bias, expert_scale)]
    if not runs_on(logits.device) or serves(spec, logits.dtype, top_k, logits.shape[-1], *dtypes):
        return None
    from moe_fx.kernels.triton.routing import route as launch

    with torch.cuda.device_of(logits):  # triton launches on the current one
        return launch(logits, bias, expert_scale, spec, top_k)
