"""Models of transformers with its fine-grained fp8 modules, and the same models with what the codes stand for.

transformers has no fp8 kernel for the CPU, so the original of such a model is the dequantised one, in float64.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations import finegrained_fp8

HIDDEN, INTERMEDIATE, EXPERTS = 256, 160, 6  # the last block of a row is smaller than 128
_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
_MOE: dict[str, Any] = {"moe_intermediate_size": INTERMEDIATE, "num_experts_per_tok": 2, "head_dim": 64}
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": EXPERTS, "decoder_sparse_step": 1, **_MOE},
    "Mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": INTERMEDIATE},
    "DeepseekV3": {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_key_value_heads": 4,
        **_LATENT,
        **_MOE,
        "head_dim": 16,
    },
}


class Pair(NamedTuple):
    """quantised: bfloat16 around codes.  exact: the same numbers, float64."""

    quantised: nn.Module
    exact: nn.Module


class Scheme(NamedTuple):
    """block: None for one scale a matrix.  scales: "float" or "ue8m0".  four: experts of e2m1 pairs."""

    block: tuple[int, int] | None = (128, 128)
    scales: str = "float"
    four: bool = False


SCHEMES = {
    "blocks": Scheme(),
    "blocks of powers of two": Scheme(scales="ue8m0"),
    "tensor": Scheme(None),
    "fp4": Scheme(scales="ue8m0", four=True),
}


def pair(family: str, scheme: Scheme = Scheme(), activations: str = "dynamic") -> Pair:  # noqa: B008  immutable
    """A tiny model of the family with random weights, its Linears and experts fp8."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **FAMILIES[family]})
    config.num_experts = config.num_local_experts = getattr(config, "n_routed_experts", EXPERTS)
    exact = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    exact.set_experts_implementation("eager")
    model = copy.deepcopy(exact).to(torch.bfloat16)
    arguments = {
        "weight_block_size": scheme.block,
        "activation_scheme": activations,
        "scale_fmt": scheme.scales,
        "expert_dtype": "fp4" if scheme.four else "fp8",
    }
    finegrained_fp8.replace_with_fp8_linear(model, ["gate", "lm_head"], transformers.FineGrainedFP8Config(**arguments))
    plain = dict(exact.named_modules())
    for name, module in model.named_modules():
        kinds = {"weight": "weight_scale_inv"} if isinstance(module, finegrained_fp8.FP8Linear) else {}
        if isinstance(module, finegrained_fp8.FP8Experts):
            kinds = {"gate_up_proj": "gate_up_proj_scale_inv", "down_proj": "down_proj_scale_inv"}
        for weight, scale in kinds.items():
            held = getattr(plain[name], weight)
            codes, scales, stands = _quantise(held.data, getattr(module, weight), getattr(module, scale), scheme.block)
            setattr(module, weight, nn.Parameter(codes, requires_grad=False))
            setattr(module, scale, nn.Parameter(scales, requires_grad=False))
            held.data = stands
        for name_, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:  # static scales of inputs
                setattr(module, name_, nn.Parameter(torch.full(p.shape, 0.02), requires_grad=False))
    return Pair(model.eval(), exact)


def _quantise(w: Tensor, codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, what they stand for) as the module declares them."""
    *_, rows, cols = w.shape
    four = codes.dtype is torch.int8
    halves = scales.shape[-2] if scales.ndim >= 2 else 1  # a scale for gate and one for up
    down, across = (1, 32) if four else block or (rows // halves, cols)
    corners = [(i, j) for i in range(0, rows, down) for j in range(0, cols, across)]
    largest = torch.stack([w.abs()[..., i : i + down, j : j + across].amax((-2, -1)) for i, j in corners], -1)
    step = largest.unflatten(-1, (-(-rows // down), -(-cols // across))) / (6 if four else 448)
    step = torch.exp2(step.log2().ceil()) if scales.dtype is torch.float8_e8m0fnu else step.float().double()
    full = step.repeat_interleave(down, -2)[..., :rows, :].repeat_interleave(across, -1)[..., :cols]
    kept = step.to(scales.dtype).reshape(scales.shape)
    if not four:
        found = (w / full).float().to(torch.float8_e4m3fn)
        return found, kept, found.double() * full
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    numbers = torch.cat([numbers, -numbers])
    nearest = ((w / full)[..., None] - numbers).abs().argmin(-1)
    packed = (nearest[..., ::2] | nearest[..., 1::2] << 4).to(torch.uint8).view(torch.int8)
    return packed, kept, numbers[nearest] * full
