"""One builder a scheme: the tensors of a layer → its ``FusedMoEQuantConfig``.

w1_scale, w2_scale: scales of the weights, [E, …] as ``moe_fx.binding.Quantised``; a1_scale, a2_scale: given scales of
the activations, None where they are taken from the values.  block_shape: [rows, cols] of the weights' groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fx.binding import Vectors
from moe_fx.kernels.config.quant import OCP_MX, DType, FusedMoEQuantConfig
from moe_fx.reasons import MoEFxOptionError

_make = FusedMoEQuantConfig.make


def fp8_w8a8_moe_quant_config(
    w1_scale: Vectors,
    w2_scale: Vectors,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    w1_bias: Vectors | None = None,
    w2_bias: Vectors | None = None,
    per_act_token_quant: bool = False,
    per_out_ch_quant: bool = False,
    block_shape: list[int] | None = None,
    a1_gscale: Tensor | None = None,
    a2_gscale: Tensor | None = None,
    g1_alphas: Vectors | None = None,
    g2_alphas: Vectors | None = None,
) -> FusedMoEQuantConfig:
    """Weights and activations in e4m3: one scale a tensor, or a token and an output channel, or a block of 128 x 128
    weights and 1 x 128 activations."""
    return _make(
        torch.float8_e4m3fn,
        per_act_token_quant,
        per_out_ch_quant,
        block_shape,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        g1_alphas=g1_alphas,
        g2_alphas=g2_alphas,
        a1_gscale=a1_gscale,
        a2_gscale=a2_gscale,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
    )


def fp8_w8a16_moe_quant_config(
    w1_scale: Vectors, w2_scale: Vectors, block_shape: list[int] | None = None, per_out_ch_quant: bool = False
) -> FusedMoEQuantConfig:
    """Weights in e4m3, activations as they are."""
    return _make(
        weight_dtype=torch.float8_e4m3fn,
        per_out_ch_quant=per_out_ch_quant,
        block_shape=block_shape,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
    )


def int8_w8a8_moe_quant_config(
    w1_scale: Vectors,
    w2_scale: Vectors,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    w1_bias: Vectors | None = None,
    w2_bias: Vectors | None = None,
    per_act_token_quant: bool = False,
    per_out_ch_quant: bool | None = None,
) -> FusedMoEQuantConfig:
    """Weights and activations in int8.  per_out_ch_quant: as per_act_token_quant where it is not given."""
    return _make(
        torch.int8,
        per_act_token_quant,
        per_act_token_quant if per_out_ch_quant is None else per_out_ch_quant,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
    )


def int8_w8a16_moe_quant_config(
    w1_scale: Vectors,
    w2_scale: Vectors,
    w1_zp: Vectors | None = None,
    w2_zp: Vectors | None = None,
    block_shape: list[int] | None = None,
) -> FusedMoEQuantConfig:
    """Weights in int8, one scale an output channel or a group of inputs ([0 or 1, group]), with or without zero points;
    activations as they are."""
    return _integers(torch.int8, w1_scale, w2_scale, w1_zp, w2_zp, block_shape)


def int4_w4a16_moe_quant_config(
    w1_scale: Vectors,
    w2_scale: Vectors,
    w1_zp: Vectors | None = None,
    w2_zp: Vectors | None = None,
    block_shape: list[int] | None = None,
) -> FusedMoEQuantConfig:
    """Weights in int4, one scale an output channel or a group of inputs ([0 or 1, group]), with or without zero points;
    activations as they are."""
    return _integers("int4", w1_scale, w2_scale, w1_zp, w2_zp, block_shape)


def _integers(
    dtype: DType,
    w1_scale: Vectors,
    w2_scale: Vectors,
    w1_zp: Vectors | None,
    w2_zp: Vectors | None,
    block_shape: list[int] | None,
) -> FusedMoEQuantConfig:
    return _make(
        weight_dtype=dtype,
        per_out_ch_quant=block_shape is None,
        block_shape=block_shape,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        w1_zp=w1_zp,
        w2_zp=w2_zp,
    )


def mxfp4_w4a16_moe_quant_config(
    w1_scale: Vectors, w2_scale: Vectors, w1_bias: Vectors | None = None, w2_bias: Vectors | None = None
) -> FusedMoEQuantConfig:
    """Weights in e2m1 with a power of two for 32 inputs, activations as they are (gpt-oss)."""
    return _make(weight_dtype="mxfp4", w1_scale=w1_scale, w2_scale=w2_scale, w1_bias=w1_bias, w2_bias=w2_bias)


def ocp_mx_moe_quant_config(
    quant_dtype: str,
    w1_scale: Vectors,
    w2_scale: Vectors,
    weight_dtype: str | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    w1_bias: Vectors | None = None,
    w2_bias: Vectors | None = None,
) -> FusedMoEQuantConfig:
    """Weights and activations in the microscaling formats of OCP: "mxfp4", "mxfp6_e3m2" or "mxfp6_e2m3", each with a
    power of two for 32 elements.  weight_dtype: that of the activations where it is not given."""
    for name in (quant_dtype, weight_dtype or quant_dtype):
        if name not in OCP_MX:
            raise MoEFxOptionError(f"{name!r} is no microscaling format of OCP; known: {', '.join(OCP_MX)}")
    return _make(
        quant_dtype,
        weight_dtype=weight_dtype,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
    )


def nvfp4_moe_quant_config(
    g1_alphas: Vectors,
    g2_alphas: Vectors,
    a1_gscale: Tensor,
    a2_gscale: Tensor,
    w1_scale: Vectors,
    w2_scale: Vectors,
    w1_bias: Vectors | None = None,
    w2_bias: Vectors | None = None,
) -> FusedMoEQuantConfig:
    """Weights and activations in e2m1 with an e4m3 scale for 16 elements and a float a tensor.  alphas [E]: the product
    of the global scales of weights and activations; gscales: those of the activations."""
    return _make(
        "nvfp4",
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        g1_alphas=g1_alphas,
        g2_alphas=g2_alphas,
        a1_gscale=a1_gscale,
        a2_gscale=a2_gscale,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
    )


def biased_moe_quant_config(w1_bias: Vectors | None, w2_bias: Vectors | None) -> FusedMoEQuantConfig:
    """Not quantised, with biases [E, out]."""
    return _make(w1_bias=w1_bias, w2_bias=w2_bias)
