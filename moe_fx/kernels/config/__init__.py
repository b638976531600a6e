"""Descriptors: how operands are quantised, how experts are spread over ranks, and what one MoE layer is.

Names and argument lists are those of the field's modular fused-MoE kernel.
"""

from moe_fx.kernels.config.moe import FusedMoEConfig, RoutingMethodType, activation_name, routing_method
from moe_fx.kernels.config.parallel import ALL2ALL_BACKENDS, FusedMoEParallelConfig
from moe_fx.kernels.config.quant import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEQuantConfig,
    FusedMoEQuantDesc,
)
from moe_fx.kernels.config.schemes import (
    biased_moe_quant_config,
    fp8_w8a8_moe_quant_config,
    fp8_w8a16_moe_quant_config,
    int4_w4a16_moe_quant_config,
    int8_w8a8_moe_quant_config,
    int8_w8a16_moe_quant_config,
    mxfp4_w4a16_moe_quant_config,
    nvfp4_moe_quant_config,
    ocp_mx_moe_quant_config,
)
from moe_fx.quant import GroupShape

__all__ = [
    "ALL2ALL_BACKENDS",
    "FUSED_MOE_UNQUANTIZED_CONFIG",
    "FusedMoEConfig",
    "FusedMoEParallelConfig",
    "FusedMoEQuantConfig",
    "FusedMoEQuantDesc",
    "GroupShape",
    "RoutingMethodType",
    "activation_name",
    "biased_moe_quant_config",
    "fp8_w8a8_moe_quant_config",
    "fp8_w8a16_moe_quant_config",
    "int4_w4a16_moe_quant_config",
    "int8_w8a8_moe_quant_config",
    "int8_w8a16_moe_quant_config",
    "mxfp4_w4a16_moe_quant_config",
    "nvfp4_moe_quant_config",
    "ocp_mx_moe_quant_config",
    "routing_method",
]
