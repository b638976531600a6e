"""The modular fused-MoE kernel: [Router] → [Quantise, Prepare] → [Permute, Experts, Unpermute] → [Finalize].

A kernel joins one prepare/finalize (how tokens reach the ranks and the layout of their experts, and come back) with one
experts object (the two products) of the same activation format.
"""

from moe_fx.kernels.modular_kernel.experts import (
    FusedMoEExperts,
    FusedMoEExpertsModular,
    FusedMoEExpertsMonolithic,
)
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata, FusedMoEActivationFormat
from moe_fx.kernels.modular_kernel.kernel import (
    FusedMoEKernel,
    FusedMoEKernelModularImpl,
    FusedMoEKernelMonolithicImpl,
)
from moe_fx.kernels.modular_kernel.prepare_finalize import (
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
    Prepared,
)

__all__ = [
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
    "Prepared",
]
