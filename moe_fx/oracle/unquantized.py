"""Backends of layers without quantisation.

Orders: "seed" is the one that the field's modular kernel came with: FlashInfer where it is installed and able, its
CUTLASS kernel with expert parallelism and without data parallelism only.  "today" is that of vLLM 0.33: on Hopper
FlashInfer stands behind Triton (TPOT of Mixtral 8x7B on 8 H200 was 21 % worse), its CUTLASS kernel last where tokens
are spread over ranks (a crash).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import Tensor

from moe_fx.hardware import Device, detect
from moe_fx.kernels.capability import PLAIN
from moe_fx.kernels.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.config.schemes import biased_moe_quant_config
from moe_fx.kernels.modular_kernel import FusedMoEExperts, FusedMoEKernel, FusedMoEPrepareAndFinalize
from moe_fx.oracle.assemble import Layer, layout_of, make_kernel, packed
from moe_fx.oracle.backends import Backend, Move, Oracle, Order, Refusal
from moe_fx.oracle.conditions import DP, ELSEWHERE, EP_WITHOUT_DP, HOPPER, LORA, OAI, Asked, no, on, this_device


class UnquantizedMoeBackend(Enum):
    FLASHINFER_TRTLLM = "flashinfer_trtllm"
    FLASHINFER_CUTLASS = "flashinfer_cutlass"
    AITER = "aiter"
    TRITON = "triton"
    BATCHED_TRITON = "batched_triton"
    CPU = "cpu"
    XPU = "xpu"
    TPU = "tpu"
    OOT = "oot"  # out of tree: a platform's own plugin


B = UnquantizedMoeBackend
TABLE: tuple[Backend[B], ...] = (
    Backend(
        B.FLASHINFER_TRTLLM,
        ("flashinfer_trtllm_monolithic", "flashinfer_trtllm"),
        lora=("flashinfer_trtllm_lora",),
    ),
    Backend(B.FLASHINFER_CUTLASS, ("flashinfer_cutlass",)),
    Backend(B.AITER, ("aiter",)),
    Backend(B.TRITON, ("triton",), twin=B.BATCHED_TRITON),
    Backend(B.BATCHED_TRITON, ("batched_triton",)),
    Backend(
        B.CPU,
        ("zentorch", "vllm_cpu_sgl", "vllm_cpu", "torch_grouped", "sorted_loop", "batched_loop", "reference"),
        where=on("cpu"),
    ),
    Backend(B.XPU, ("xpu",), where=on("xpu")),
    Backend(B.TPU, where=on("tpu")),
    Backend(B.OOT, where=ELSEWHERE),
)
FLASHINFER = (B.FLASHINFER_TRTLLM, B.FLASHINFER_CUTLASS)
ALL = (*FLASHINFER, B.AITER, B.XPU, B.TRITON, B.BATCHED_TRITON, B.CPU, B.TPU, B.OOT)
SEED = Order(
    ALL,
    refusals=(
        Refusal(
            "veto.parallel",
            "it is for layers where experts are spread over ranks and tokens are not",
            (no(EP_WITHOUT_DP),),
            (B.FLASHINFER_CUTLASS,),
        ),
        Refusal("veto.lora", "experts with LoRA adapters run on TRITON", (LORA,), but=(B.TRITON,)),
    ),
)
TODAY = Order(
    ALL,
    (
        Move(FLASHINFER, "after", (HOPPER,), B.BATCHED_TRITON),
        Move((B.FLASHINFER_CUTLASS,), "back", (DP,)),
        Move(FLASHINFER, "back", (OAI,)),
    ),
    (
        Refusal(
            "veto.lora",
            "experts with LoRA adapters run on FLASHINFER_TRTLLM or TRITON",
            (LORA,),
            but=(B.FLASHINFER_TRTLLM, B.TRITON),
        ),
    ),
)
UNQUANTIZED = Oracle("unquantized", TABLE, {"seed": SEED, "today": TODAY}, (PLAIN,))


def map_unquantized_backend(name: str) -> UnquantizedMoeBackend:
    """The backend that ``moe_backend`` calls ``name``; MoEFxOptionError lists the known names."""
    return UNQUANTIZED.map(name)


def backend_2_kernel_cls(backend: UnquantizedMoeBackend) -> type[FusedMoEExperts]:
    """The experts class of a backend; MoEFxUnsupportedError says which kernel is missing."""
    return UNQUANTIZED.kernel_class(backend)


def select_unquantized_moe_backend(
    moe_config: FusedMoEConfig,
    use_ep: bool | None = None,
    use_dp: bool | None = None,
    *,
    order: str = "seed",
    device: Device | None = None,
) -> tuple[UnquantizedMoeBackend, type[FusedMoEExperts] | None]:
    """(backend, experts class; None where a plugin brings its own).

    use_ep, use_dp: experts, tokens are spread over ranks; None: as ``moe_config`` says.  order: "seed" or "today".
    device: None this machine's.  Raises as ``Oracle.select`` does.
    """
    found = this_device() if device is None else device
    selection = UNQUANTIZED.select(Asked(moe_config, found, PLAIN, use_ep, use_dp), order)
    return selection.backend, selection.experts_class


def convert_to_unquantized_kernel_format(
    backend: UnquantizedMoeBackend, layer: Layer, w13: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor]:
    """Canonical w13 [E, 2I, H] and w2 [E, H, I] → the same two as the backend reads them."""
    row = layout_of(UNQUANTIZED, backend, PLAIN, "bf16", layer, detect(w13.device))
    out = packed(row, {"w13": w13, "w2": w2}, layer)
    return out["w13"], out["w2"]


def make_unquantized_moe_quant_config(
    backend: UnquantizedMoeBackend, w1_bias: Tensor | None = None, w2_bias: Tensor | None = None
) -> FusedMoEQuantConfig:
    """Biases [E, out], if there are any."""
    UNQUANTIZED.backend(backend)
    none = w1_bias is None and w2_bias is None
    return FUSED_MOE_UNQUANTIZED_CONFIG if none else biased_moe_quant_config(w1_bias, w2_bias)


def make_unquantized_moe_kernel(
    quant_config: FusedMoEQuantConfig,
    moe_config: FusedMoEConfig,
    backend: UnquantizedMoeBackend,
    experts_cls: type[FusedMoEExperts] | None = None,
    prepare_finalize: FusedMoEPrepareAndFinalize | None = None,
    **more: Any,
) -> tuple[FusedMoEKernel, bool]:
    """(the kernel, whether its result may take the place of its input: never).  See ``fp8.make_fp8_moe_kernel``."""
    experts = backend_2_kernel_cls(backend) if experts_cls is None else experts_cls
    return make_kernel(experts, moe_config, quant_config, prepare_finalize, **more), False
