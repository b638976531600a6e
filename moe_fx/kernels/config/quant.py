"""How the four operands of the two products are quantised, with the tensors that say so.

A ``FusedMoEQuantDesc`` describes one operand; a ``FusedMoEQuantConfig`` holds four: the inputs of both products (a1,
a2) and their weights (w1 = w13, w2).  The meaning of the numbers is ``moe_fx.quant``; ``weight_key`` and
``activation_key`` give it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_fx.binding import Vectors
from moe_fx.quant import (
    PER_TENSOR,
    PER_TOKEN,
    Code,
    GroupShape,
    QuantKey,
    QuantSpec,
    ScaleDType,
)
from moe_fx.reasons import MoEFxOptionError

DType = torch.dtype | str | None
Parts = Vectors | tuple[Vectors, ...]  # of w13, or of its gate and its up part apart
CODES: dict[DType, tuple[Code, ScaleDType]] = {  # dtype of a descriptor → its codes, and its scales by default
    torch.float8_e4m3fn: ("float8_e4m3fn", "float32"),
    torch.int8: ("int8", "float32"),
    "int4": ("int4", "bfloat16"),
    "mxfp8": ("float8_e4m3fn", "float8_e8m0fnu"),
    "mxfp4": ("float4_e2m1", "float8_e8m0fnu"),
    "mxfp6_e3m2": ("float6_e3m2", "float8_e8m0fnu"),
    "mxfp6_e2m3": ("float6_e2m3", "float8_e8m0fnu"),
    "nvfp4": ("float4_e2m1", "float8_e4m3fn"),
    "nf4": ("nf4", "float32"),
    "fp4_bnb": ("fp4_bnb", "float32"),
}
OCP_MX = ("mxfp4", "mxfp6_e3m2", "mxfp6_e2m3")
MX_GROUP, NVFP4_GROUP = GroupShape(1, 32), GroupShape(1, 16)
GROUPS: dict[DType, GroupShape] = {"nvfp4": NVFP4_GROUP, "mxfp8": MX_GROUP, **dict.fromkeys(OCP_MX, MX_GROUP)}
# their scales are of the dtype of the tensor
ANY_SCALE: tuple[DType, ...] = (torch.float8_e4m3fn, torch.int8, "int4", "nf4", "fp4_bnb")
SCALES: dict[torch.dtype, ScaleDType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True, slots=True)
class FusedMoEQuantDesc:
    """One operand.

    dtype: torch.float8_e4m3fn, torch.int8, "int4", "mxfp8", "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "nvfp4", "nf4" or
        "fp4_bnb"; None where it is not quantised, or comes quantised already.
    shape: elements that share a scale (``moe_fx.quant.GroupShape``), None where the dtype says it.
    scale, zp, bias: of all experts, [E, …] or one tensor an expert; of an activation one tensor.
    alpha_or_gscale: the second factor of two-level schemes: of an activation its global scale, of weights the product
        of both global scales (alpha) or a library's own description of the precision.
    Raises MoEFxOptionError for a dtype that is none of these.
    """

    dtype: DType = None
    shape: GroupShape | None = None
    scale: Vectors | None = None
    alpha_or_gscale: Vectors | None = None
    zp: Vectors | None = None
    bias: Parts | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in CODES:
            known = ", ".join(map(str, CODES))
            raise MoEFxOptionError(f"an operand cannot be quantised to {self.dtype!r}; known: {known}")

    @staticmethod
    def of(
        key: QuantKey | None,
        scale: Vectors | None = None,
        bias: Parts | None = None,
        whole: Vectors | None = None,
        zero: Vectors | None = None,
    ) -> FusedMoEQuantDesc:
        """The descriptor of an operand whose codes mean ``key``, with its tensors; whole: its global scale.

        Zero points, and other scale dtypes than that of CODES, are in no field: ``zero`` and ``scale`` say them.
        """
        if key is None:
            return FusedMoEQuantDesc(bias=bias)
        fits = [dtype for dtype, (code, kind) in CODES.items() if code == key.dtype and kind == key.scale]
        named = fits or [dtype for dtype, (code, _) in CODES.items() if code == key.dtype]
        return FusedMoEQuantDesc(named[0], key.group, scale, whole, zero, bias)

    @property
    def group(self) -> GroupShape:
        """Elements that share a scale."""
        return self.shape or GROUPS.get(self.dtype, PER_TENSOR)

    def key(self, static: bool) -> QuantKey | None:
        """What the codes mean; None for plain floats."""
        if self.dtype is None:
            return None
        code, scale = CODES[self.dtype]
        if self.dtype in ANY_SCALE and self.scale is not None:
            scale = SCALES.get(self.scale[0].dtype if isinstance(self.scale, list) else self.scale.dtype, scale)
        return QuantKey(code, self.group, scale, static, self.zp is not None, self.dtype == "nvfp4")


UNQUANTIZED = FusedMoEQuantDesc()


@dataclass(frozen=True, slots=True)
class FusedMoEQuantConfig:
    """The quantisation of one MoE layer; see the builders in ``kernels.config.schemes``.

    Raises MoEFxOptionError where scales per token and per block are asked for at once: for weights of the dtype of the
    activations.  Integer weights in groups leave the activations free.
    """

    _a1: FusedMoEQuantDesc = field(default=UNQUANTIZED)
    _a2: FusedMoEQuantDesc = field(default=UNQUANTIZED)
    _w1: FusedMoEQuantDesc = field(default=UNQUANTIZED)
    _w2: FusedMoEQuantDesc = field(default=UNQUANTIZED)

    def __post_init__(self) -> None:
        if self.per_act_token_quant and self.is_block_quantized and self._a1.dtype == self._w1.dtype:
            raise MoEFxOptionError(
                f"activations are quantised per token or per block {self.block_shape}, not both: give "
                "per_act_token_quant=True or block_shape, not the two of them"
            )

    @property
    def quant_dtype(self) -> DType:
        """To which activations are quantised; None if they are not."""
        return self._a1.dtype

    @property
    def is_quantized(self) -> bool:
        """Activations are quantised."""
        return self.quant_dtype is not None

    @property
    def is_per_act_token(self) -> bool:
        """Every token has a scale of its own."""
        return self._a1.shape == PER_TOKEN

    @property
    def per_act_token_quant(self) -> bool:
        """The same, under the name of the builders' argument."""
        return self.is_per_act_token

    @property
    def per_out_ch_quant(self) -> bool:
        """Every output channel of the weights has a scale of its own."""
        return self._w1.shape == PER_TOKEN

    @property
    def is_per_tensor(self) -> bool:
        """All tokens share one scale."""
        return self._a1.shape == PER_TENSOR

    @property
    def block_shape(self) -> list[int] | None:
        """[rows, cols] of the weights' groups where they are blocks or groups of inputs, else None."""
        shape = self._w1.shape
        whole = shape is None or -1 in shape
        return None if shape is None or whole else [shape.row, shape.col]

    @property
    def is_block_quantized(self) -> bool:
        return self.block_shape is not None

    @property
    def a1_scale(self) -> Vectors | None:
        return self._a1.scale

    @property
    def a1_gscale(self) -> Vectors | None:
        return self._a1.alpha_or_gscale

    @property
    def a2_scale(self) -> Vectors | None:
        return self._a2.scale

    @property
    def a2_gscale(self) -> Vectors | None:
        return self._a2.alpha_or_gscale

    @property
    def w1_scale(self) -> Vectors | None:
        return self._w1.scale

    @property
    def w1_zp(self) -> Vectors | None:
        return self._w1.zp

    @property
    def w1_bias(self) -> Parts | None:
        return self._w1.bias

    @property
    def w1_precision(self) -> Vectors | None:
        """What a library describes its packed weights with."""
        return self._w1.alpha_or_gscale

    @property
    def g1_alphas(self) -> Vectors | None:
        """Factor of the up product's result, [E]."""
        return self._w1.alpha_or_gscale

    @property
    def w2_scale(self) -> Vectors | None:
        return self._w2.scale

    @property
    def w2_zp(self) -> Vectors | None:
        return self._w2.zp

    @property
    def w2_bias(self) -> Parts | None:
        return self._w2.bias

    @property
    def w2_precision(self) -> Vectors | None:
        """What a library describes its packed weights with."""
        return self._w2.alpha_or_gscale

    @property
    def g2_alphas(self) -> Vectors | None:
        """Factor of the down product's result, [E]."""
        return self._w2.alpha_or_gscale

    @property
    def use_fp8_w8a8(self) -> bool:
        return self._a1.dtype == self._w1.dtype == torch.float8_e4m3fn

    @property
    def use_fp8_w8a16(self) -> bool:
        return self._a1.dtype is None and self._w1.dtype == torch.float8_e4m3fn

    @property
    def use_int8_w8a8(self) -> bool:
        return self._a1.dtype == self._w1.dtype == torch.int8

    @property
    def use_int8_w8a16(self) -> bool:
        return self._a1.dtype is None and self._w1.dtype == torch.int8

    @property
    def use_int4_w4a16(self) -> bool:
        return self._a1.dtype is None and self._w1.dtype == "int4"

    @property
    def use_mxfp4_w4a16(self) -> bool:
        return self._a1.dtype is None and self._w1.dtype == "mxfp4"

    @property
    def use_nvfp4_w4a4(self) -> bool:
        return self._a1.dtype == self._w1.dtype == "nvfp4"

    @property
    def ocp_mx_scheme(self) -> str | None:
        """ "w_<weights>[_a_<activations>]" of the microscaling formats of OCP; None for other schemes."""
        if self._w1.dtype not in OCP_MX or self._a1.dtype not in (None, "mxfp8", *OCP_MX):
            return None
        return f"w_{self._w1.dtype}" + (f"_a_{self._a1.dtype}" if self._a1.dtype else "")

    @property
    def weight_key(self) -> QuantKey | None:
        """What the codes of the weights mean; None for plain floats."""
        return self._w1.key(static=True)

    @property
    def activation_key(self) -> QuantKey | None:
        """What activations are rounded to before a product; None if they are not."""
        return self._a1.key(static=self._a1.scale is not None)

    @property
    def spec(self) -> QuantSpec:
        """The same without tensors, as a block's specification has it."""
        keys = (
            self._w1.key(static=True),
            self._w2.key(static=True),
            self._a1.key(static=self._a1.scale is not None),
            self._a2.key(static=self._a2.scale is not None),
        )
        return QuantSpec(*("" if key is None else str(key) for key in keys))

    def config_name(self, dtype: torch.dtype) -> str | None:
        """Key of the scheme in the names of tuned-config files; None where they name none."""
        names = {
            "fp8_w8a8": self.use_fp8_w8a8,
            "int8_w8a16": self.use_int8_w8a16,
            "int4_w4a16": self.use_int4_w4a16,
            "float32": self.ocp_mx_scheme is None and dtype == torch.float32,
        }
        return next((name for name, used in names.items() if used), None)

    def scale_shape(self, max_tokens: int, hidden_dim: int) -> tuple[int, int] | None:
        """Shape of the scales of activations [max_tokens, hidden_dim]; None if they are not quantised."""
        if not self.is_quantized:
            return None
        rows, cols = self._a1.group
        return 1 if rows == -1 else -(-max_tokens // rows), 1 if cols == -1 else -(-hidden_dim // cols)

    def batched_scale_shape(self, num_experts: int, max_tokens: int, hidden_dim: int) -> tuple[int, int, int] | None:
        """The same for activations [num_experts, max_tokens, hidden_dim]."""
        shape = self.scale_shape(max_tokens, hidden_dim)
        return None if shape is None else (num_experts, *shape)

    @staticmethod
    def make(
        quant_dtype: DType = None,
        per_act_token_quant: bool = False,
        per_out_ch_quant: bool = False,
        block_shape: list[int] | None = None,
        w1_scale: Vectors | None = None,
        w2_scale: Vectors | None = None,
        a1_scale: Tensor | None = None,
        a2_scale: Tensor | None = None,
        g1_alphas: Vectors | None = None,
        g2_alphas: Vectors | None = None,
        a1_gscale: Tensor | None = None,
        a2_gscale: Tensor | None = None,
        w1_bias: Vectors | None = None,
        w2_bias: Vectors | None = None,
        w1_zp: Vectors | None = None,
        w2_zp: Vectors | None = None,
        weight_dtype: DType = None,
    ) -> FusedMoEQuantConfig:
        """Any scheme, from the pieces.

        quant_dtype: of activations.  weight_dtype: of weights, where it is another.  block_shape: [rows, cols] of the
        weights' groups; activations quantised with such weights have groups of [1, cols].
        """
        if block_shape is not None and per_out_ch_quant:
            raise MoEFxOptionError(
                f"weights are quantised per output channel or per block {block_shape}, not both: give "
                "per_out_ch_quant=True or block_shape, not the two of them"
            )
        weights = quant_dtype if weight_dtype is None else weight_dtype
        of_weights, of_inputs = GROUPS.get(weights), GROUPS.get(quant_dtype)
        if block_shape is not None:
            rows, cols = block_shape
            of_weights = GroupShape(max(rows, 1), cols)
            of_inputs = GroupShape(1, cols)
        elif weights is not None and of_weights is None:
            of_weights = PER_TOKEN if per_out_ch_quant else PER_TENSOR
        if per_act_token_quant:
            of_inputs = PER_TOKEN
        elif quant_dtype is not None and of_inputs is None:
            of_inputs = PER_TENSOR
        of_inputs = None if quant_dtype is None else of_inputs
        return FusedMoEQuantConfig(
            _a1=FusedMoEQuantDesc(quant_dtype, of_inputs, a1_scale, a1_gscale),
            _a2=FusedMoEQuantDesc(quant_dtype, of_inputs, a2_scale, a2_gscale),
            _w1=FusedMoEQuantDesc(weights, of_weights, w1_scale, g1_alphas, w1_zp, w1_bias),
            _w2=FusedMoEQuantDesc(weights, of_weights, w2_scale, g2_alphas, w2_zp, w2_bias),
        )


FUSED_MOE_UNQUANTIZED_CONFIG = FusedMoEQuantConfig.make()
