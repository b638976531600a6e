"""Kernels: pure tensor functions behind one registry.  Nothing here knows graphs, plans' reasons or torch.fx.

The public names of the modular fused-MoE kernel are below, each at home in the module that the table says.  They load
on first use, so that importing one module of this package imports no other.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_fx.kernels.config import (
        FUSED_MOE_UNQUANTIZED_CONFIG,
        FusedMoEConfig,
        FusedMoEParallelConfig,
        FusedMoEQuantConfig,
        FusedMoEQuantDesc,
        GroupShape,
        RoutingMethodType,
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
    from moe_fx.kernels.modular_kernel import (
        ExpertTokensMetadata,
        FusedMoEActivationFormat,
        FusedMoEExperts,
        FusedMoEExpertsModular,
        FusedMoEExpertsMonolithic,
        FusedMoEKernel,
        FusedMoEKernelModularImpl,
        FusedMoEKernelMonolithicImpl,
        FusedMoEPrepareAndFinalize,
        FusedMoEPrepareAndFinalizeModular,
        FusedMoEPrepareAndFinalizeMonolithic,
    )
    from moe_fx.kernels.weight_and_reduce import (
        TopKWeightAndReduce,
        TopKWeightAndReduceContiguous,
        TopKWeightAndReduceDelegate,
        TopKWeightAndReduceNaiveBatched,
        TopKWeightAndReduceNoOP,
    )

_HOMES = {
    "moe_fx.kernels.config": (
        "FUSED_MOE_UNQUANTIZED_CONFIG",
        "FusedMoEConfig",
        "FusedMoEParallelConfig",
        "FusedMoEQuantConfig",
        "FusedMoEQuantDesc",
        "GroupShape",
        "RoutingMethodType",
        "biased_moe_quant_config",
        "fp8_w8a16_moe_quant_config",
        "fp8_w8a8_moe_quant_config",
        "int4_w4a16_moe_quant_config",
        "int8_w8a16_moe_quant_config",
        "int8_w8a8_moe_quant_config",
        "mxfp4_w4a16_moe_quant_config",
        "nvfp4_moe_quant_config",
        "ocp_mx_moe_quant_config",
    ),
    "moe_fx.kernels.modular_kernel": (
        "ExpertTokensMetadata",
        "FusedMoEActivationFormat",
        "FusedMoEExperts",
        "FusedMoEExpertsModular",
        "FusedMoEExpertsMonolithic",
        "FusedMoEKernel",
        "FusedMoEKernelModularImpl",
        "FusedMoEKernelMonolithicImpl",
        "FusedMoEPrepareAndFinalize",
        "FusedMoEPrepareAndFinalizeModular",
        "FusedMoEPrepareAndFinalizeMonolithic",
    ),
    "moe_fx.kernels.weight_and_reduce": (
        "TopKWeightAndReduce",
        "TopKWeightAndReduceContiguous",
        "TopKWeightAndReduceDelegate",
        "TopKWeightAndReduceNaiveBatched",
        "TopKWeightAndReduceNoOP",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "FUSED_MOE_UNQUANTIZED_CONFIG",
    "ExpertTokensMetadata",
    "FusedMoEActivationFormat",
    "FusedMoEConfig",
    "FusedMoEExperts",
    "FusedMoEExpertsModular",
    "FusedMoEExpertsMonolithic",
    "FusedMoEKernel",
    "FusedMoEKernelModularImpl",
    "FusedMoEKernelMonolithicImpl",
    "FusedMoEParallelConfig",
    "FusedMoEPrepareAndFinalize",
    "FusedMoEPrepareAndFinalizeModular",
    "FusedMoEPrepareAndFinalizeMonolithic",
    "FusedMoEQuantConfig",
    "FusedMoEQuantDesc",
    "GroupShape",
    "RoutingMethodType",
    "TopKWeightAndReduce",
    "TopKWeightAndReduceContiguous",
    "TopKWeightAndReduceDelegate",
    "TopKWeightAndReduceNaiveBatched",
    "TopKWeightAndReduceNoOP",
    "biased_moe_quant_config",
    "fp8_w8a8_moe_quant_config",
    "fp8_w8a16_moe_quant_config",
    "int4_w4a16_moe_quant_config",
    "int8_w8a8_moe_quant_config",
    "int8_w8a16_moe_quant_config",
    "mxfp4_w4a16_moe_quant_config",
    "nvfp4_moe_quant_config",
    "ocp_mx_moe_quant_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_fx.kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
