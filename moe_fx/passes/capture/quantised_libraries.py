"""Route A for modules over codes: functions of libraries that Dynamo cannot trace, or that find no kernel here, in a
form that says the same.

before: ``fp8_linear(x, w, scale, …)``           → a kernel fetched from a hub while Dynamo traces
after:  ``moe_fx::fp8_linear(x, w, scale, …)``   → an op with that meaning, and with that kernel where there is one

A form of a loop is trusted once the two agreed on random codes; the others are the library's own lines without what
asks for the number of rows, which Dynamo does not know of an expert's tokens.  No library is imported here.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn import Parameter

from moe_fx.ops_library import LIBRARY, fp8_grouped_mm, fp8_linear, int8_linear
from moe_fx.passes.capture.hooks import decline, substitute
from moe_fx.passes.capture.hugging_face import asked_for, plain_attributes
from moe_fx.passes.isolation import isolated
from moe_fx.reasons import Reject

_TRUSTED: dict[tuple[Any, ...], str] = {}


def _linear(
    input: Tensor,  # noqa: A002  the library's names
    weight: Tensor,
    weight_scale_inv: Tensor,
    block_size: list[int] | None = None,
    bias: Tensor | None = None,
    activation_scale: Tensor | None = None,
    allow_deepgemm: bool = True,
) -> Tensor:
    """``transformers.integrations.finegrained_fp8.fp8_linear``."""
    block = None if block_size is None else list(block_size)
    found: Tensor = fp8_linear(input, weight, weight_scale_inv, block, bias, activation_scale)
    return found


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``FP8Experts``, of every implementation: rows sorted by expert, one product for all experts of a projection."""
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        kept: Tensor = sys.modules[LIBRARY].fp8_grouped_mm_experts_forward(
            self, hidden_states, top_k_index, top_k_weights
        )
        return kept
    block = None if self.block_size is None else list(self.block_size)
    up = (self.gate_up_proj, self.gate_up_proj_scale_inv) if self.has_gate else (self.up_proj, self.up_proj_scale_inv)
    tokens, k = top_k_index.shape
    expert, order = torch.sort(top_k_index.reshape(-1))
    counted = expert.float() if expert.device.type == "cpu" else expert.int()
    counts = torch.histc(counted, bins=self.num_experts, min=0, max=self.num_experts - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    rows = fp8_grouped_mm(hidden_states[order // k], up[0], up[1], ends, block)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = fp8_grouped_mm(rows, self.down_proj, self.down_proj_scale_inv, ends, block)
    rows = rows * top_k_weights.reshape(-1)[order].to(rows.dtype).unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.size(0), device=order.device)
    return rows[back].view(tokens, k, hidden_states.size(-1)).sum(dim=1).to(hidden_states.dtype)


def _matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: Any,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``bitsandbytes.matmul_4bit``."""
    gradient = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    packed = getattr(quant_state, "packing_format_for_cpu", False) or A.shape[-1] != quant_state.shape[1]
    if gradient or packed or out is not None or (quant_state.nested and quant_state.state2.blocksize != 256):
        kept: Tensor = sys.modules["bitsandbytes.autograd._functions"].matmul_4bit(A, B, quant_state, out, bias)
        return kept
    if guard_or_false(A.numel() == 0):
        return A.new_empty((*A.shape[:-1], quant_state.shape[0]))
    nested: dict[str, Tensor] = {}
    absmax = quant_state.absmax
    if quant_state.nested:
        absmax = quant_state.state2.absmax
        nested = {"absmax_8bit": quant_state.absmax, "absmax_code": quant_state.state2.code}
        nested["absmax_offset"] = quant_state.offset
    found: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        A, B.view(-1, 1), quant_state.shape, absmax, quant_state.blocksize, quant_state.quant_type, bias=bias, **nested
    )
    return found


def _matmul_8bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: Any = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``bitsandbytes.matmul`` of weights that are codes already, in inference."""
    gradient = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    if gradient or out is not None or state is None or state.CB is None or state.has_fp16_weights or state.is_training:
        kept: Tensor = sys.modules["bitsandbytes.autograd._functions"].matmul(A, B, out, state, threshold, bias)
        return kept
    found: Tensor = int8_linear(A, state.CB, state.SCB, bias, threshold if threshold > 0.0 else state.threshold)
    return found


def _row_scaled_linear(self: Any, input: Tensor) -> Tensor:  # noqa: A002  the library's name
    """``CompressedTensorsFP8Linear.forward``."""
    library = sys.modules["transformers.integrations.compressed_tensors"]
    codes, scale = library.quantize_fp8_per_row(input.reshape(-1, input.shape[-1]))
    found: Tensor = library._scaled_mm_rowwise(
        codes,
        self.weight.t(),
        scale_a=scale.unsqueeze(-1),
        scale_b=self.weight_scale,
        out_dtype=input.dtype,
        bias=self.bias,
    )
    return found.reshape(*input.shape[:-1], self.weight.shape[0])


def _mxfp4_matrices(
    blocks: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.bfloat16, rows_per_chunk: int = 0
) -> Tensor:
    """``_convert_moe_packed_tensors`` of transformers, without its buffers: pairs of e2m1 [E, out, G, 16]
    and exponents [E, out, G] → [E, in, out]."""
    values = sys.modules["transformers.integrations.mxfp4"].FP4_VALUES
    numbers = torch.tensor(values, dtype=dtype, device=blocks.device)
    pairs = torch.stack((numbers[(blocks & 15).int()], numbers[(blocks >> 4).int()]), dim=-1).flatten(-2)
    wide = torch.ldexp(pairs, (scales.to(torch.int32) - 127).unsqueeze(-1))
    return wide.flatten(-2).transpose(1, 2).contiguous()


# (module, function) of a library → a form of it
FORMS: dict[tuple[str, str], Any] = {
    (LIBRARY, "fp8_linear"): _linear,
    ("transformers.integrations.mxfp4", "_convert_moe_packed_tensors"): _mxfp4_matrices,
    ("bitsandbytes.autograd._functions", "matmul"): _matmul_8bit,
    ("bitsandbytes.autograd._functions", "matmul_4bit"): _matmul_4bit,
    ("transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear.forward"): _row_scaled_linear,
}


@substitute
def library_function(tracer: Any, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Answers a call of one of ``FORMS``."""
    called = getattr(function, "fn", None)
    for (module, path), body in FORMS.items():
        found: Any = sys.modules.get(module)
        for name in path.split("."):
            found = getattr(found, name, None)
        # a form may leave a call to the library
        if _own(module, found) and called is found and tracer.f_code is not body.__code__:
            from torch._dynamo.variables import UserFunctionVariable

            return UserFunctionVariable(body).call_function(tracer, args, kwargs)
    return None


def _own(module: str, function: Any) -> bool:
    """Whether a function found in a library was written there, and put there by nobody else."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == getattr(sys.modules.get(module), "__file__", "")


@substitute
def fp8_experts(tracer: Any, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Answers ``FP8ExpertsInterface.get_interface(implementation, loop)`` for the implementations of transformers."""
    known: Any = getattr(sys.modules.get(LIBRARY), "FP8ExpertsInterface", None)
    name, asked, module = asked_for(tracer, function, args) or ("", None, None)
    interface: Any = getattr(asked, "value", None)
    if known is None or module is None or not isinstance(interface, known):
        return None
    own = interface.get(name)
    if own is None and name != "eager":
        return None
    if own is not None and not own.__module__.startswith("transformers."):
        return None  # somebody's own
    if problem := _distrust(module):
        decline(type(module).__name__, Reject("capture.untrusted", problem, type(module).__qualname__))
        return None
    from torch._dynamo.variables import UserFunctionVariable

    form: Any = _experts
    return UserFunctionVariable(form)


def _distrust(module: Any) -> str:
    """ "" when the class's loop and ``_experts`` agree, else how they differ."""
    if module.activation_scheme != "dynamic" or module.has_bias or getattr(module, "_is_expert_parallel", False):
        return "static scales of inputs, biases and expert parallelism are not read"
    library = sys.modules[LIBRARY]
    if not _own(LIBRARY, module.linear) or not _own(LIBRARY, getattr(library, "fp8_linear", None)):
        return "its products are not transformers'"
    if any(p.element_size() > 1 for n, p in module.named_parameters() if n.endswith("_proj")):
        return "its weights are floats"
    shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in module.named_parameters())
    key: tuple[Any, ...] = (
        type(module),
        module.has_gate,
        module.block_size and tuple(module.block_size),
        shapes,
        str(module.act_fn),
    )
    key += plain_attributes(module), plain_attributes(getattr(module, "config", None))
    key += inspect.unwrap(type(module).forward), getattr(module._apply_gate, "__func__", module._apply_gate)
    if key not in _TRUSTED:
        with isolated(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            _TRUSTED[key] = _compare(module)
    return _TRUSTED[key]


def _compare(module: Any) -> str:
    """On four experts with random codes, two of them with tokens."""
    generator = torch.Generator().manual_seed(0)
    few = copy.copy(module)
    few.num_experts = 4
    few.__dict__["_parameters"] = {
        name: None if p is None else Parameter(_drawn(p, generator), requires_grad=False)
        for name, p in module._parameters.items()
    }
    few.__dict__["linear"] = lambda x, weight, scale, activation_scale=None: _linear(x, weight, scale, few.block_size)
    x = torch.randn(7, module.hidden_dim, generator=generator)
    ids = torch.tensor([[3, 1]] * 4 + [[1, 3]] * 3)
    weights = torch.rand(ids.shape, generator=generator) + 0.1
    truth = inspect.unwrap(type(module).forward)(few, x, ids, weights).double()
    error = float((_experts(few, x, ids, weights).double() - truth).norm() / truth.norm())
    # a rounding that falls the other way costs a sixteenth of one value
    return "" if error <= 1e-2 else f"the loop and its traceable form differ by {error:.1e} in float32"


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    """Codes, or scales for about unit weights, of four experts."""
    size = (4, *p.shape[1:])
    if p.dtype is torch.int8:
        return torch.randint(-128, 128, size, generator=generator, dtype=torch.int8)
    if p.dtype is torch.float8_e4m3fn:
        return torch.randn(size, generator=generator).mul_(64).to(torch.float8_e4m3fn)
    return torch.rand(size, generator=generator).add_(1).mul_(2.0**-9).to(p.dtype)
