"""How operands are quantised, as kernels/config describes it, against tables written by hand from SEED-API §1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_fx import quant
from moe_fx.kernels.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEQuantConfig,
    FusedMoEQuantDesc,
    GroupShape,
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
from moe_fx.quant import QuantKey, int_group
from moe_fx.reasons import MoEFxOptionError
from moe_fx.reference.quantise import quantise

FP8, INT8 = torch.float8_e4m3fn, torch.int8
S1, S2, Z1, Z2, B1, B2, A1, A2, G1, G2, P1, P2 = (torch.full((1,), float(i)) for i in range(12))
NAMED: dict[str, QuantKey] = {name: key for name, key in vars(quant).items() if isinstance(key, QuantKey)}
GROUPS = {
    "INT4_32": int_group(4, 32),
    "INT4_CHANNEL_F16": int_group(4, -1, scale="float16"),
    "INT4_128_ZERO": int_group(4, 128, zero_points=True),
    "INT8_32": int_group(8, 32),
    "INT8_64_ZERO_F32": int_group(8, 64, zero_points=True, scale="float32"),
    "NF4_128_BF16": QuantKey("nf4", GroupShape(1, 128), "bfloat16"),
    "FP4_BNB_32_F16": QuantKey("fp4_bnb", GroupShape(1, 32), "float16"),
}


# --- operands

SHAPES = {
    "tensor": (GroupShape(-1, -1), (1, 1)),
    "row": (GroupShape(1, -1), (6, 1)),
    "column": (GroupShape(-1, 1), (1, 300)),
    "blocks": (GroupShape(128, 128), (1, 3)),
    "groups": (GroupShape(1, 128), (6, 3)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_group_shapes(name: str) -> None:
    """What a descriptor's shape says is what ``quantise`` gives."""
    group, scales = SHAPES[name]
    key = FusedMoEQuantDesc(INT8, group).key(static=True)
    assert key == QuantKey("int8", group)
    assert tuple(quantise(torch.randn(6, 300), key).scale.shape) == scales


@pytest.mark.parametrize("name", NAMED)
def test_a_named_key_survives_its_descriptor(name: str) -> None:
    key = NAMED[name]
    assert FusedMoEQuantDesc.of(key).key(static=key.static) == key
    q = quantise(torch.randn(4, 256), key)
    whole = FusedMoEQuantDesc.of(key, q.scale, whole=q.global_scale)
    assert whole.key(static=key.static) == key
    assert whole.scale is q.scale
    assert whole.alpha_or_gscale is q.global_scale


@pytest.mark.parametrize("form", ["stacked", "list"])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_survive_with_their_tensors(name: str, form: str) -> None:
    """Zero points and the dtype of scales are said by the tensors."""
    key = GROUPS[name]
    q = quantise(torch.randn(3, 4, 256), key)
    assert isinstance(q.scale, Tensor)
    scale, zero = (t if form == "stacked" or t is None else list(t) for t in (q.scale, q.zero))
    desc = FusedMoEQuantDesc.of(key, scale, zero=zero)  # type: ignore[arg-type]
    assert desc.key(static=True) == key
    assert (desc.zp is None) == (not key.zero_points)


def test_no_key_is_no_quantisation() -> None:
    desc = FusedMoEQuantDesc.of(None, bias=B1)
    assert desc.key(static=True) is None
    assert (desc.dtype, desc.shape, desc.bias) == (None, None, B1)
    assert FusedMoEQuantDesc() == FusedMoEQuantDesc(None, None, None, None, None, None)


@pytest.mark.parametrize("dtype", ["int5", "fp8", torch.bfloat16, torch.float8_e5m2, 8])
def test_an_unknown_dtype_lists_the_known(dtype: Any) -> None:
    with pytest.raises(MoEFxOptionError, match=r"known: torch.float8_e4m3fn, torch.int8, int4, .*mxfp4.*nvfp4"):
        FusedMoEQuantDesc(dtype)


# --- builders: every property of every scheme

PLAIN: dict[str, Any] = dict(
    quant_dtype=None, is_quantized=False, is_per_act_token=False, per_act_token_quant=False, per_out_ch_quant=False,
    is_per_tensor=False, block_shape=None, is_block_quantized=False,
    a1_scale=None, a1_gscale=None, a2_scale=None, a2_gscale=None,
    w1_scale=None, w1_zp=None, w1_bias=None, w1_precision=None, g1_alphas=None,
    w2_scale=None, w2_zp=None, w2_bias=None, w2_precision=None, g2_alphas=None,
    use_fp8_w8a8=False, use_fp8_w8a16=False, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False,
    ocp_mx_scheme=None, use_mxfp4_w4a16=False, use_nvfp4_w4a4=False,
    weight_key=None, activation_key=None,
)  # fmt: skip
W = dict(w1_scale=S1, w2_scale=S2)
A = dict(a1_scale=A1, a2_scale=A2)
B = dict(w1_bias=B1, w2_bias=B2)
Z = dict(w1_zp=Z1, w2_zp=Z2)
GS = dict(a1_gscale=G1, a2_gscale=G2)
TOKEN = dict(is_per_act_token=True, per_act_token_quant=True)
BLOCK = dict(block_shape=[128, 128], is_block_quantized=True)
FP8_USED = dict(quant_dtype=FP8, is_quantized=True, use_fp8_w8a8=True)
INT8_USED = dict(quant_dtype=INT8, is_quantized=True, use_int8_w8a8=True)


def keys(weights: QuantKey, inputs: QuantKey) -> dict[str, Any]:
    return dict(weight_key=weights, activation_key=inputs)


def grouped(size: int) -> dict[str, Any]:
    return dict(block_shape=[1, size], is_block_quantized=True)


def alphas(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    return dict(g1_alphas=first, g2_alphas=second, w1_precision=first, w2_precision=second)


# what is called → what differs from PLAIN
BUILT: dict[str, tuple[Callable[[], FusedMoEQuantConfig], dict[str, Any]]] = {
    "plain": (lambda: FUSED_MOE_UNQUANTIZED_CONFIG, {}),
    "make nothing": (lambda: FusedMoEQuantConfig.make(), {}),
    "biased": (lambda: biased_moe_quant_config(B1, B2), B),
    "fp8 tensor": (
        lambda: fp8_w8a8_moe_quant_config(S1, S2, A1, A2),
        W | A | FP8_USED | dict(is_per_tensor=True, **keys(quant.FP8_TENSOR, quant.FP8_TENSOR)),
    ),
    "fp8 tensor dynamic": (
        lambda: fp8_w8a8_moe_quant_config(S1, S2),
        W | FP8_USED | dict(is_per_tensor=True, **keys(quant.FP8_TENSOR, quant.FP8_DYNAMIC)),
    ),
    "fp8 token channel": (
        lambda: fp8_w8a8_moe_quant_config(S1, S2, per_act_token_quant=True, per_out_ch_quant=True),
        W | FP8_USED | TOKEN | dict(per_out_ch_quant=True, **keys(quant.FP8_CHANNEL, quant.FP8_TOKEN)),
    ),
    "fp8 token tensor": (
        lambda: fp8_w8a8_moe_quant_config(S1, S2, per_act_token_quant=True),
        W | FP8_USED | TOKEN | dict(**keys(quant.FP8_TENSOR, quant.FP8_TOKEN)),
    ),
    "fp8 channel tensor": (
        lambda: fp8_w8a8_moe_quant_config(S1, S2, per_out_ch_quant=True),
        W | FP8_USED | dict(per_out_ch_quant=True, is_per_tensor=True, **keys(quant.FP8_CHANNEL, quant.FP8_DYNAMIC)),
    ),
    "fp8 block": (
        lambda: fp8_w8a8_moe_quant_config(S1, S2, w1_bias=B1, w2_bias=B2, block_shape=[128, 128]),
        W | B | FP8_USED | BLOCK | dict(**keys(quant.FP8_BLOCK, quant.FP8_GROUP)),
    ),
    "fp8 alphas": (
        lambda: fp8_w8a8_moe_quant_config(S1, S2, A1, A2, a1_gscale=G1, a2_gscale=G2, g1_alphas=P1, g2_alphas=P2),
        W | A | GS | alphas(P1, P2) | FP8_USED | dict(is_per_tensor=True, **keys(quant.FP8_TENSOR, quant.FP8_TENSOR)),
    ),
    "fp8 w8a16": (
        lambda: fp8_w8a16_moe_quant_config(S1, S2),
        W | dict(use_fp8_w8a16=True, weight_key=quant.FP8_TENSOR),
    ),
    "fp8 w8a16 block": (
        lambda: fp8_w8a16_moe_quant_config(S1, S2, block_shape=[128, 128]),
        W | BLOCK | dict(use_fp8_w8a16=True, weight_key=quant.FP8_BLOCK),
    ),
    "int8 tensor": (
        lambda: int8_w8a8_moe_quant_config(S1, S2, A1, A2),
        W | A | INT8_USED | dict(is_per_tensor=True, **keys(quant.INT8_TENSOR, quant.INT8_TENSOR)),
    ),
    "int8 token": (
        lambda: int8_w8a8_moe_quant_config(S1, S2, w1_bias=B1, w2_bias=B2, per_act_token_quant=True),
        W | B | INT8_USED | TOKEN | dict(per_out_ch_quant=True, **keys(quant.INT8_CHANNEL, quant.INT8_TOKEN)),
    ),
    "int8 w8a16": (
        lambda: int8_w8a16_moe_quant_config(S1, S2),
        W | dict(per_out_ch_quant=True, use_int8_w8a16=True, weight_key=quant.INT8_CHANNEL),
    ),
    "int8 w8a16 zero": (
        lambda: int8_w8a16_moe_quant_config(S1, S2, Z1, Z2, [0, 32]),
        W
        | Z
        | dict(**grouped(32), use_int8_w8a16=True, weight_key=QuantKey("int8", GroupShape(1, 32), zero_points=True)),
    ),
    "int4 w4a16": (
        lambda: int4_w4a16_moe_quant_config(S1.bfloat16(), S2, block_shape=[1, 64]),
        dict(
            w2_scale=S2,
            **grouped(64),
            use_int4_w4a16=True,
            weight_key=int_group(4, 64),
        ),
    ),
    "int4 w4a16 zero": (
        lambda: int4_w4a16_moe_quant_config(S1, S2, Z1, Z2),
        W
        | Z
        | dict(
            per_out_ch_quant=True, use_int4_w4a16=True, weight_key=int_group(4, -1, zero_points=True, scale="float32")
        ),
    ),
    "mxfp4 w4a16": (
        lambda: mxfp4_w4a16_moe_quant_config(S1, S2, B1, B2),
        W | B | dict(**grouped(32), use_mxfp4_w4a16=True, ocp_mx_scheme="w_mxfp4", weight_key=quant.MXFP4),
    ),
    "mxfp4": (
        lambda: ocp_mx_moe_quant_config("mxfp4", S1, S2),
        W
        | dict(
            quant_dtype="mxfp4",
            is_quantized=True,
            **grouped(32),
            ocp_mx_scheme="w_mxfp4_a_mxfp4",
            **keys(quant.MXFP4, quant.MXFP4_DYNAMIC),
        ),
    ),
    "mxfp6 e3m2": (
        lambda: ocp_mx_moe_quant_config("mxfp6_e3m2", S1, S2, w1_bias=B1, w2_bias=B2),
        W
        | B
        | dict(
            quant_dtype="mxfp6_e3m2",
            is_quantized=True,
            **grouped(32),
            ocp_mx_scheme="w_mxfp6_e3m2_a_mxfp6_e3m2",
            **keys(quant.MXFP6_E3M2, quant.MXFP6_E3M2_DYNAMIC),
        ),
    ),
    "mxfp4 mxfp6 e2m3": (
        lambda: ocp_mx_moe_quant_config("mxfp6_e2m3", S1, S2, weight_dtype="mxfp4"),
        W
        | dict(
            quant_dtype="mxfp6_e2m3",
            is_quantized=True,
            **grouped(32),
            ocp_mx_scheme="w_mxfp4_a_mxfp6_e2m3",
            **keys(quant.MXFP4, quant.MXFP6_E2M3_DYNAMIC),
        ),
    ),
    "nvfp4": (
        lambda: nvfp4_moe_quant_config(P1, P2, G1, G2, S1, S2, B1, B2),
        W
        | B
        | GS
        | alphas(P1, P2)
        | dict(
            quant_dtype="nvfp4",
            is_quantized=True,
            **grouped(16),
            use_nvfp4_w4a4=True,
            **keys(quant.NVFP4, quant.NVFP4_DYNAMIC),
        ),
    ),
}


@pytest.mark.parametrize("name", BUILT)
def test_builders(name: str) -> None:
    make, differs = BUILT[name]
    config, expected = make(), PLAIN | differs
    for prop, value in expected.items():
        found = getattr(config, prop)
        if name == "int4 w4a16" and prop == "w1_scale":
            assert found.dtype == torch.bfloat16
        else:
            assert found is value if isinstance(value, Tensor) else found == value, f"{prop} is {found}, not {value}"
    a1, a2 = config.activation_key, config.spec.key("a2")
    assert (config.weight_key, a1) == (config.spec.key("w13"), config.spec.key("a1"))
    assert config.spec.key("w2") == (config.weight_key if name != "int4 w4a16" else int_group(4, 64, scale="float32"))
    assert a2 == a1


def test_every_property_stands_in_the_table() -> None:
    own = {n for n, v in vars(FusedMoEQuantConfig).items() if isinstance(v, property)}
    assert own - {"spec"} == PLAIN.keys()


CONFIG_NAMES = {
    "plain": None, "biased": None, "fp8 tensor": "fp8_w8a8", "fp8 token channel": "fp8_w8a8", "fp8 block": "fp8_w8a8",
    "int8 token": None, "int8 w8a16": "int8_w8a16", "int8 w8a16 zero": "int8_w8a16", "int4 w4a16": "int4_w4a16",
    "int4 w4a16 zero": "int4_w4a16", "mxfp4 w4a16": None, "mxfp4": None, "nvfp4": None,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_config_name(name: str) -> None:
    """The five answers of the page; float32 is the name of a plain layer in that dtype."""
    config, expected = BUILT[name][0](), CONFIG_NAMES[name]
    for dtype in (torch.bfloat16, torch.float16):
        assert config.config_name(dtype) == expected
    if name in ("plain", "biased"):
        assert config.config_name(torch.float32) == "float32"
    if "mxfp4" in name:
        assert config.config_name(torch.float32) is None


T, H, E = 7, 300, 3
SCALE_SHAPES = {
    "plain": None, "fp8 w8a16": None, "int4 w4a16": None, "mxfp4 w4a16": None,
    "fp8 tensor": (1, 1), "fp8 tensor dynamic": (1, 1), "fp8 channel tensor": (1, 1), "int8 tensor": (1, 1),
    "fp8 token channel": (T, 1), "fp8 token tensor": (T, 1), "int8 token": (T, 1),
    "fp8 block": (T, 3), "mxfp4": (T, 10), "mxfp6 e3m2": (T, 10), "nvfp4": (T, 19),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALE_SHAPES)
def test_scale_shapes(name: str) -> None:
    config, expected = BUILT[name][0](), SCALE_SHAPES[name]
    assert config.scale_shape(T, H) == expected
    assert config.batched_scale_shape(E, T, H) == (None if expected is None else (E, *expected))


PAIRS = [
    (name, weights)
    for name, key in NAMED.items()
    for weights in (quant.INT8_CHANNEL, quant.MXFP4, quant.FP8_BLOCK, int_group(4, 32))
    if not key.static and (name, weights) != ("FP8_TOKEN", quant.FP8_BLOCK)  # an error, see below
]


@pytest.mark.parametrize("tokens", [1, T])
@pytest.mark.parametrize("inputs, weights", PAIRS, ids=str)
def test_scale_shape_is_that_of_the_activations(inputs: str, weights: QuantKey, tokens: int) -> None:
    """Whatever the weights' groups are: as many scales as quantising tokens gives."""
    key = NAMED[inputs]
    desc, of_weights = FusedMoEQuantDesc.of(key), FusedMoEQuantDesc.of(weights)
    config = FusedMoEQuantConfig(desc, desc, of_weights, of_weights)
    assert config.scale_shape(tokens, 256) == tuple(quantise(torch.randn(tokens, 256), key).scale.shape)


def test_scale_shape_without_tokens() -> None:
    found = [BUILT[n][0]().scale_shape(0, H) for n in ("fp8 tensor", "fp8 token channel", "fp8 block")]
    assert found == [(1, 1), (0, 1), (0, 3)]


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "token and block": (
        lambda: fp8_w8a8_moe_quant_config(S1, S2, per_act_token_quant=True, block_shape=[128, 128]),
        r"per token or per block \[128, 128\], not both",
    ),
    "token and block, by hand": (
        lambda: FusedMoEQuantConfig(
            FusedMoEQuantDesc(FP8, GroupShape(1, -1)), _w1=FusedMoEQuantDesc(FP8, GroupShape(128, 128))
        ),
        "not both",
    ),
    "channel and block": (
        lambda: fp8_w8a16_moe_quant_config(S1, S2, [128, 128], per_out_ch_quant=True),
        r"per output channel or per block \[128, 128\], not both",
    ),
    "no microscaling": (lambda: ocp_mx_moe_quant_config("nvfp4", S1, S2), "'nvfp4' is no microscaling format"),
    "no microscaling weights": (lambda: ocp_mx_moe_quant_config("mxfp4", S1, S2, "int4"), "'int4' is no microscaling"),
    "unknown dtype": (lambda: FusedMoEQuantConfig.make("fp3"), "cannot be quantised to 'fp3'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    """Errors, not asserts: python -O keeps them."""
    make, message = WRONG[name]
    with pytest.raises(MoEFxOptionError, match=message):
        make()


def test_integer_weights_in_groups_take_fp8_tokens() -> None:
    """W4A8: the groups are of the weights alone, so scales per token do not exclude them."""
    token, groups = FusedMoEQuantDesc.of(quant.FP8_TOKEN), FusedMoEQuantDesc.of(int_group(4, 128))
    config = FusedMoEQuantConfig(token, token, groups, groups)
    assert config.scale_shape(T, H) == (T, 1)
    assert (config.weight_key, config.activation_key) == (int_group(4, 128), quant.FP8_TOKEN)


def test_make_says_any_scheme() -> None:
    config = FusedMoEQuantConfig.make(
        FP8, weight_dtype="mxfp4", block_shape=None, w1_scale=S1, w2_scale=S2, per_act_token_quant=False
    )
    assert (config.quant_dtype, config._w1.dtype, config.block_shape) == (FP8, "mxfp4", [1, 32])
    assert config.ocp_mx_scheme is None
    config = FusedMoEQuantConfig.make("mxfp8", weight_dtype="mxfp4", w1_scale=S1, w2_scale=S2)
    assert config.ocp_mx_scheme == "w_mxfp4_a_mxfp8"
    assert config.activation_key == quant.MXFP8_DYNAMIC
