"""Products of libraries over codes, as ops: a graph names what a library's kernel computes.

``moe_fx::int8_linear``     x [..., in], codes int8 [out, in], magnitudes float32 [out] → x @ (codes * magnitude / 127)

is bitsandbytes' product of 8 bits, which rounds inputs to int8 but for columns with outliers (``threshold``).

``moe_fx::fp8_linear``      x [..., in], codes [out, in], scales of blocks → rounded x @ matrix + bias [..., out]
``moe_fx::fp8_grouped_mm``  x [S, in] by expert, codes [E, out, in], ends [E] → [S, out]; rows after the last end are 0

Inputs are rounded to e4m3, a scale for each row, or for each 128 of it where the weights have blocks; a given
``input_scale`` is the one scale of all.  Codes of int8 are pairs of e2m1, 32 of which share a scale.  That is what
transformers' kernels do, which the ops call.  It has none for the CPU: there inputs are not rounded, as nothing
multiplies such numbers, and the products are those of the dequantised weights.  The ops have no backward.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.binding import Quantised
from moe_fx.quant import FP8_GROUP, FP8_TOKEN, GroupShape, QuantKey
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.reference.quantise import dequantise

LIBRARY = "transformers.integrations.finegrained_fp8"
_SCALES: dict[torch.dtype, Any] = {t: str(t).removeprefix("torch.") for t in (torch.float32, torch.float8_e8m0fnu)}
_SCALES |= {t: str(t).removeprefix("torch.") for t in (torch.bfloat16, torch.float16)}


def scheme(weight: Tensor, scale: Tensor, block: list[int] | None) -> tuple[QuantKey, QuantKey]:
    """Keys of the weights and of dynamic inputs.  weight [..., out, in]; scale one number, or [..., rows, columns] of
    the blocks; MoEFxRuntimeError for a scale of another dtype."""
    if scale.dtype not in _SCALES:
        raise MoEFxRuntimeError(f"scales of fp8 weights are one of {', '.join(map(str, _SCALES))}, not {scale.dtype}")
    four = weight.dtype is torch.int8
    rows, columns = int(weight.shape[-2]), int(weight.shape[-1]) * (2 if four else 1)
    down, across = grid(scale)
    sizes = tuple(block) if block and not four else (-(-rows // down), -(-columns // across))
    group = GroupShape(*(-1 if size >= whole else size for size, whole in zip(sizes, (rows, columns), strict=True)))
    key = QuantKey("float4_e2m1" if four else "float8_e4m3fn", group, _SCALES[scale.dtype])
    return key, FP8_TOKEN if across == 1 else FP8_GROUP


def grid(scale: Tensor) -> tuple[int, int]:
    """How many blocks a matrix has down and across, by its scales: [..., rows, columns], or one number."""
    *_, down, across = (1, 1, *(int(s) for s in scale.shape))
    return down, across


def _matrix(weight: Tensor, scale: Tensor, key: QuantKey, dtype: torch.dtype) -> Tensor:
    """codes [out, in] → the matrix."""
    scale = scale.reshape(grid(scale))
    return dequantise(Quantised(key, weight.view(torch.uint8) if key.bits == 4 else weight, scale), dtype)


def _library(device: torch.device) -> Any:
    """transformers' module, for tensors that its kernels take."""
    found = sys.modules.get(LIBRARY)
    if found is None:
        raise MoEFxRuntimeError(f"fp8 products on {device} are transformers' kernels: import transformers first")
    return found


@torch.library.custom_op("moe_fx::fp8_linear", mutates_args=())
def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, block: list[int] | None, bias: Tensor | None, input_scale: Tensor | None
) -> Tensor:
    """See the module's text."""
    if x.device.type != "cpu":
        found: Tensor = _library(x.device).fp8_linear(x, weight, scale, block, bias, input_scale)
        return found
    return F.linear(x, _matrix(weight, scale, scheme(weight, scale, block)[0], x.dtype), bias)


@fp8_linear.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, block: list[int] | None, bias: Tensor | None, input_scale: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("moe_fx::fp8_grouped_mm", mutates_args=())
def fp8_grouped_mm(x: Tensor, weight: Tensor, scale: Tensor, ends: Tensor, block: list[int] | None) -> Tensor:
    """See the module's text.  One expert's matrix at a time."""
    if x.device.type != "cpu":
        counts = ends.diff(prepend=ends.new_zeros(1))
        matmul = _library(x.device).load_finegrained_fp8_kernel().grouped_matmul
        found: Tensor = matmul(x, weight, scale, offsets=ends, tokens_per_expert=counts, block_size=block)
        used = torch.arange(len(x), device=x.device) < ends[-1]
        return found.where(used[:, None], 0)
    key, _ = scheme(weight, scale, block)
    out, start = x.new_zeros(x.shape[0], weight.shape[1]), 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = x[start:end] @ _matrix(weight[e], scale[e], key, x.dtype).t()
        start = end
    return out


@fp8_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, ends: Tensor, block: list[int] | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("moe_fx::int8_linear", mutates_args=())
def int8_linear(x: Tensor, codes: Tensor, magnitude: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """See the module's text; as bitsandbytes computes it in inference."""
    ops, rows = torch.ops.bitsandbytes, x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], codes.shape[0])
    found, scale, outliers = ops.int8_vectorwise_quant.default(rows.to(torch.float16, copy=True), threshold)
    if threshold > 0.0:
        y = ops.int8_mixed_scaled_mm.default(rows, found, codes, scale, magnitude, outliers, bias)[0]
    else:
        y = ops.int8_scaled_mm.default(found, codes, scale, magnitude, bias=bias, dtype=x.dtype)
    out: Tensor = y.reshape(*x.shape[:-1], codes.shape[0])
    return out


@int8_linear.register_fake
def _(x: Tensor, codes: Tensor, magnitude: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])
