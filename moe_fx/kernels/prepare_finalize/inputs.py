"""What is done with tokens and ids before the experts: the routing weight on the input, quantisation, local ids."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fx.kernels.config import FusedMoEQuantConfig
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.reference.quantise import quantise


def weighted(a1: Tensor, topk_weights: Tensor) -> Tensor:
    """a1 [T, H] times its routing weight [T, 1], in the dtype of a1.  MoEFxRuntimeError for more than one a token: the
    token would need one input for each."""
    if topk_weights.shape[1] != 1:
        raise MoEFxRuntimeError(
            f"apply_router_weight_on_input needs top_k = 1, got {topk_weights.shape[1]}: a token has one input for all "
            "of its experts; apply the weights on the output"
        )
    return a1 * topk_weights.to(a1.dtype)


def quantised(a1: Tensor, quant_config: FusedMoEQuantConfig) -> tuple[Tensor, Tensor | None]:
    """a1 [T, H] → (codes, scales as ``quant_config.scale_shape`` says); a1 itself where it is not quantised."""
    key = quant_config.activation_key
    if key is None:
        return a1, None
    given = quant_config.a1_scale
    assert given is None or isinstance(given, Tensor)
    whole = quant_config.a1_gscale
    assert whole is None or isinstance(whole, Tensor)
    found = quantise(a1, key, None if whole is None else whole.reshape(()), given)
    assert isinstance(found.codes, Tensor)
    assert isinstance(found.scale, Tensor)
    shape = quant_config.scale_shape(*a1.shape)
    without_tokens = found.scale.shape != shape  # then nothing says the scale that all of them share
    return found.codes, torch.ones(shape, dtype=found.scale.dtype, device=a1.device) if without_tokens else found.scale


def local_ids(ids: Tensor, expert_map: Tensor) -> Tensor:
    """ids of all ranks → local ones; -1 for those of other ranks, and for those that name no expert."""
    most = expert_map.numel()
    known = (ids >= 0) & (ids < most)
    return torch.where(known, expert_map[ids.clamp(0, most - 1).long()].to(ids.dtype), -1)
