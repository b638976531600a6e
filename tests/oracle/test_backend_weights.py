"""From a chosen backend to what runs: weights in its layout, the configuration of its scales, the kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from moe_fx.binding import Experts, Quantised
from moe_fx.kernels.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
)
from moe_fx.kernels.layouts.packed import PACKED
from moe_fx.kernels.registry import KERNELS as REGISTERED
from moe_fx.oracle import fp8, int8, int_wna16, mxfp4, mxfp8, nvfp4, unquantized, w4a8
from moe_fx.oracle.conditions import Asked
from moe_fx.oracle.fp8 import Fp8MoeBackend
from moe_fx.oracle.nvfp4 import NvFp4MoeBackend
from moe_fx.oracle.unquantized import UnquantizedMoeBackend
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_GROUP,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_TOKEN,
    MXFP4,
    MXFP8,
    MXFP8_DYNAMIC,
    NVFP4,
    NVFP4_DYNAMIC,
    QuantSpec,
    int_group,
)
from moe_fx.reasons import MoEFxOptionError, MoEFxUnsupportedError
from moe_fx.reference import experts_forward
from moe_fx.spec import CombineSpec

from .candidates import moe
from .golden_selection import DEVICES, SCHEMES

CONFIG = FusedMoEConfig(8, 2, 256, 8, intermediate_size=128)
H100 = DEVICES["h100"]


def asked(device: str = "h100", scheme: str = "bf16", **config) -> Asked:
    return Asked(replace(CONFIG, **config), DEVICES[device], SCHEMES[scheme])


SPEC = moe(8, 2, 256, 128)


class Layer:
    def __init__(self, **config) -> None:
        self.moe_config = replace(CONFIG, **config)


E, H, I = 4, 256, 128  # noqa: E741


def fp8_weights(per: str) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    codes = [torch.randn(E, r, c, generator=draw).to(torch.float8_e4m3fn) for r, c in ((2 * I, H), (H, I))]
    shapes = {"tensor": [(E,), (E,)], "channel": [(E, 2 * I, 1), (E, H, 1)], "block": [(E, 2, 2), (E, 2, 1)]}[per]
    return [*codes, *(torch.rand(s, generator=draw) + 0.5 for s in shapes)]


@pytest.mark.parametrize("per", ["tensor", "channel", "block"])
def test_triton_reads_fp8_weights_as_they_are(per: str) -> None:
    given = fp8_weights(per)
    got = fp8.convert_to_fp8_moe_kernel_format(Fp8MoeBackend.TRITON, Layer(), *given)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(got, given, strict=True))


def test_flashinfer_wants_up_before_gate() -> None:
    w13, w2, s13, s2 = fp8_weights("block")
    s13[0, 0, 0] = 0.0
    got = fp8.convert_to_fp8_moe_kernel_format(Fp8MoeBackend.FLASHINFER_CUTLASS, Layer(), w13, w2, s13, s2)
    assert torch.equal(got[0].float(), torch.cat([w13[:, I:], w13[:, :I]], 1).float())
    assert got[1] is w2
    assert torch.equal(got[2], torch.cat([s13[:, 1:], s13[:, :1]], 1).clamp(min=1e-10))
    plain = torch.randn(E, 2 * I, H)
    swapped, _ = unquantized.convert_to_unquantized_kernel_format(
        UnquantizedMoeBackend.FLASHINFER_CUTLASS, Layer(), plain, plain.new_empty(E, H, I)
    )
    assert torch.equal(swapped, torch.cat([plain[:, I:], plain[:, :I]], 1))


def test_static_scales_of_one_tensor_need_those_of_the_inputs() -> None:
    given = fp8_weights("tensor")
    for backend in (Fp8MoeBackend.FLASHINFER_CUTLASS, Fp8MoeBackend.FLASHINFER_TRTLLM):
        with pytest.raises(MoEFxOptionError, match="give w13_input_scale and w2_input_scale"):
            fp8.convert_to_fp8_moe_kernel_format(backend, Layer(), *given)
        fp8.convert_to_fp8_moe_kernel_format(backend, Layer(), *given, torch.ones(()), torch.ones(()))


def test_marlin_packs_for_the_dtype_of_the_layer() -> None:
    given = fp8_weights("channel")
    for dtype, name in ((torch.bfloat16, "fp8_channel"), (torch.float16, "fp8_channel_fp16")):
        got = fp8.convert_to_fp8_moe_kernel_format(Fp8MoeBackend.MARLIN, Layer(in_dtype=dtype), *given)
        back = PACKED["marlin", name].unpack("w13", got[0], given[0][0])
        assert torch.equal(back.float(), given[0].float())
        assert got[2].dtype == dtype


def test_what_cannot_be_packed_is_a_named_error() -> None:
    w13, w2, s13, s2 = fp8_weights("channel")
    with pytest.raises(MoEFxOptionError, match="are none of: fp8_tensor"):
        fp8.convert_to_fp8_moe_kernel_format(Fp8MoeBackend.TRITON, Layer(), w13, w2, s13[:, :3], s2)
    with pytest.raises(MoEFxUnsupportedError, match="no packed layout of 'deepgemm' for 'fp8_channel'"):
        fp8.convert_to_fp8_moe_kernel_format(Fp8MoeBackend.DEEPGEMM, Layer(), w13, w2, s13, s2)
    with pytest.raises(MoEFxUnsupportedError, match="ungated"):
        fp8.convert_to_fp8_moe_kernel_format(Fp8MoeBackend.MARLIN, Layer(activation="relu2_no_mul"), w13, w2, s13, s2)
    fp8.convert_to_fp8_moe_kernel_format(Fp8MoeBackend.TRITON, Layer(activation="relu2_no_mul"), w13, w2, s13, s2)


def test_a_role_that_a_kernel_does_not_take_is_a_named_error() -> None:
    codes = [torch.zeros(E, r, c // 2, dtype=torch.uint8) for r, c in ((2 * I, H), (H, I))]
    scales = [torch.zeros(E, r, c // 32, dtype=torch.uint8) for r, c in ((2 * I, H), (H, I))]
    backend = mxfp4.Mxfp4MoeBackend.CUTLASS_MXFP4
    with pytest.raises(MoEFxUnsupportedError, match="vllm_cutlass takes no w2_bias of mxfp4"):
        mxfp4.convert_to_mxfp4_moe_kernel_format(backend, Layer(), *codes, *scales, None, torch.zeros(E, H))


def test_a_kernel_that_runs_here_says_itself_how_its_weights_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(REGISTERED["sorted_loop"].experts):  # type: ignore[name-defined, misc]
        asked: ClassVar[list] = []

        @classmethod
        def layout_for(cls, spec):
            cls.asked.append(spec.quant)
            return "aiter.fp8_block"

    here = replace(REGISTERED["sorted_loop"], name="aiter_block", experts=Mine)
    monkeypatch.setitem(REGISTERED, "aiter_block", here)
    monkeypatch.delitem(REGISTERED, "aiter", raising=False)
    given = fp8_weights("block")
    got = fp8.convert_to_fp8_moe_kernel_format(Fp8MoeBackend.AITER, Layer(), *given)
    assert torch.equal(PACKED["aiter", "fp8_block"].unpack("w13", got[0], given[0][0]).float(), given[0].float())
    assert not torch.equal(got[0].view(-1).float(), given[0].reshape(-1).float())
    assert Mine.asked == [QuantSpec(*map(str, (FP8_BLOCK, FP8_BLOCK, FP8_GROUP, FP8_GROUP)))]
    as_they_are = fp8.convert_to_fp8_moe_kernel_format(Fp8MoeBackend.CPU_W8A8, Layer(), *given)
    assert all(a is b for a, b in zip(as_they_are, given, strict=True))


def test_marlin_lowers_the_global_scales_by_what_it_lifts_the_others() -> None:
    codes = [torch.randint(0, 256, (E, r, c // 2), dtype=torch.uint8) for r, c in ((2 * I, H), (H, I))]
    scales = [torch.full((E, r, c // 16), 0.5).to(torch.float8_e4m3fn) for r, c in ((2 * I, H), (H, I))]
    whole = [torch.full((E,), 3.0), torch.full((E,), 5.0)]
    got = nvfp4.convert_to_nvfp4_moe_kernel_format(NvFp4MoeBackend.MARLIN, Layer(), *codes, *scales, *whole)
    lifted = 2.0**9  # the largest power of two that keeps 0.5 within 448
    assert lifted * 0.5 <= 448 < 2 * lifted * 0.5
    assert torch.equal(got[4], whole[0] / lifted)
    assert torch.equal(got[5], whole[1] / lifted)
    same = nvfp4.convert_to_nvfp4_moe_kernel_format(NvFp4MoeBackend.EMULATION, Layer(), *codes, *scales, *whole)
    assert [a is b for a, b in zip(same, [*codes, *scales, *whole], strict=True)] == [True] * 6


def test_the_other_schemes_are_packed_by_their_tables() -> None:
    draw = torch.Generator().manual_seed(1)
    ints = [torch.randint(-127, 128, (E, r, c), generator=draw).to(torch.int8) for r, c in ((2 * I, H), (H, I))]
    rows = [torch.rand(E, r, 1, generator=draw) for r in (2 * I, H)]
    got = int8.convert_to_int8_moe_kernel_format(int8.Int8MoeBackend.TRITON, Layer(), *ints, *rows)
    assert got[0] is ints[0]
    nibbles = [torch.randint(0, 256, (E, r, c // 2), dtype=torch.uint8) for r, c in ((2 * I, H), (H, I))]
    groups = [torch.rand(E, r, c // 128).bfloat16() for r, c in ((2 * I, H), (H, I))]
    marlin = int_wna16.IntWNA16MoeBackend.MARLIN
    key = int_group(4, 128)
    got = int_wna16.convert_to_int_wna16_moe_kernel_format(marlin, Layer(), key, *nibbles, *groups)
    assert torch.equal(PACKED["marlin", "int4_128"].unpack("w2", got[1], nibbles[1][0]), nibbles[1])
    zero = int_group(4, 128, zero_points=True)
    with pytest.raises(MoEFxUnsupportedError, match="zero points"):
        int_wna16.convert_to_int_wna16_moe_kernel_format(marlin, Layer(), zero, *nibbles, *groups)
    e8m0 = [torch.full((E, r, c // 32), 127, dtype=torch.uint8) for r, c in ((2 * I, H), (H, I))]
    triton = mxfp4.Mxfp4MoeBackend.TRITON
    assert mxfp4.convert_to_mxfp4_moe_kernel_format(triton, Layer(), *nibbles, *e8m0)[0] is nibbles[0]
    packed = mxfp4.convert_to_mxfp4_moe_kernel_format(mxfp4.Mxfp4MoeBackend.MARLIN, Layer(), *nibbles, *e8m0)
    assert torch.equal(PACKED["marlin", "mxfp4"].unpack("w13", packed[0], nibbles[0][0]), nibbles[0])
    assert packed[4:] == (None, None)
    bytes_ = [t.repeat(1, 1, 2).view(torch.float8_e4m3fn) for t in nibbles]
    got = mxfp8.convert_to_mxfp8_moe_kernel_format(Fp8MoeBackend.EMULATION, Layer(), *bytes_, *e8m0)
    assert got[0] is bytes_[0]


def test_quant_config_of_fp8() -> None:
    B, make = Fp8MoeBackend, fp8.make_fp8_moe_quant_config
    w1, w2 = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])
    a1, a2 = torch.tensor(0.5), torch.tensor(0.25)
    assert make(B.FLASHINFER_TRTLLM, w1, w2, a1, a2) is None
    for backend in (B.MARLIN, B.CPU):
        config = make(backend, w1, w2, a1, a2, [128, 128])
        assert config.use_fp8_w8a16
        assert not config.is_quantized
        assert config.block_shape == [128, 128]
    config = make(B.FLASHINFER_CUTLASS, w1, w2, a1, a2)
    assert config.g1_alphas.tolist() == [1.0, 1.5]
    assert config.g2_alphas.tolist() == [1.25, 1.75]
    assert (config.a1_gscale.item(), config.a2_gscale.item()) == (2.0, 4.0)
    assert config.use_fp8_w8a8
    with pytest.raises(MoEFxOptionError, match="needs a1_scale and a2_scale"):
        make(B.FLASHINFER_CUTLASS, w1, w2)
    assert make(B.FLASHINFER_CUTLASS, w1, w2, None, None, [128, 128]).g1_alphas is None
    config = make(B.TRITON, w1, w2, None, None, [128, 128])
    assert (config.weight_key, config.activation_key) == (FP8_BLOCK, FP8_GROUP)
    config = make(B.VLLM_CUTLASS, w1, w2, per_act_token_quant=True, per_out_ch_quant=True)
    assert (config.per_act_token_quant, config.per_out_ch_quant) == (True, True)
    config = make(B.TRITON, w1, w2, a1, a2)
    assert (config.weight_key, config.activation_key) == (FP8_TENSOR, FP8_TENSOR)
    with pytest.raises(MoEFxOptionError, match="NONE runs no fp8 layer"):
        make(B.NONE, w1, w2)


def test_quant_configs_of_the_others() -> None:
    s = torch.ones(2, 1, 1)
    config = int8.make_int8_moe_quant_config(int8.Int8MoeBackend.TRITON, s, s, per_act_token_quant=True)
    assert (config.weight_key, config.activation_key) == (INT8_CHANNEL, INT8_TOKEN)
    for key in (int_group(4, 128), int_group(8, 32), int_group(4, -1)):
        backend = int_wna16.IntWNA16MoeBackend.MARLIN
        config = int_wna16.make_int_wna16_moe_quant_config(backend, key, s, s)
        assert (config.weight_key.dtype, config.weight_key.group) == (key.dtype, key.group)
        assert config.activation_key is None
    half = s.bfloat16()
    config = int_wna16.make_int_wna16_moe_quant_config(backend, int_group(4, 32, True), half, half, s.byte(), s.byte())
    assert config.weight_key == int_group(4, 32, True)
    config = mxfp8.make_mxfp8_moe_quant_config(Fp8MoeBackend.DEEPGEMM, s, s)
    assert (config.weight_key, config.activation_key) == (MXFP8, MXFP8_DYNAMIC)
    assert mxfp8.make_mxfp8_moe_quant_config(Fp8MoeBackend.MARLIN, s, s).activation_key is None
    config = mxfp4.make_mxfp4_moe_quant_config(mxfp4.Mxfp4MoeBackend.TRITON, s, s, s, s)
    assert config.use_mxfp4_w4a16
    assert config.w1_bias is s
    config = mxfp4.make_mxfp4_moe_quant_config(mxfp4.Mxfp4MoeBackend.FLASHINFER_TRTLLM_MXFP8, s, s)
    assert (config.weight_key, config.activation_key) == (MXFP4, MXFP8_DYNAMIC)
    config = mxfp4.make_mxfp4_moe_quant_config(mxfp4.Mxfp4MoeBackend.DEEPGEMM_MXFP4, s, s)
    assert config.activation_key == FP8_GROUP
    config = w4a8.make_w4a8_moe_quant_config(w4a8.W4A8MoeBackend.CUTLASS, half, half)
    assert (config.weight_key, config.activation_key) == (int_group(4, 128), FP8_TOKEN)
    assert unquantized.make_unquantized_moe_quant_config(UnquantizedMoeBackend.CPU) is FUSED_MOE_UNQUANTIZED_CONFIG
    assert unquantized.make_unquantized_moe_quant_config(UnquantizedMoeBackend.CPU, s, s).w2_bias is s


def test_quant_config_of_nvfp4() -> None:
    s, w1, w2 = torch.ones(2, 1, 1), torch.tensor([2.0, 4.0]), torch.tensor([8.0, 16.0])
    a1, a2 = torch.tensor(0.5), torch.tensor(0.25)
    config = nvfp4.make_nvfp4_moe_quant_config(NvFp4MoeBackend.VLLM_CUTLASS, s, s, w1, w2, a1, a2)
    assert config.use_nvfp4_w4a4
    assert config.g1_alphas.tolist() == [1.0, 2.0]
    assert config.g2_alphas.tolist() == [2.0, 4.0]
    assert (config.a1_gscale.item(), config.a2_gscale.item()) == (2.0, 4.0)
    for backend in (NvFp4MoeBackend.MARLIN, NvFp4MoeBackend.HUMMING):
        config = nvfp4.make_nvfp4_moe_quant_config(backend, s, s, w1, w2)
        assert (config.weight_key, config.activation_key) == (NVFP4, None)
        assert config.g1_alphas is w1
    config = nvfp4.make_nvfp4_moe_quant_config(NvFp4MoeBackend.EMULATION, s, s, w1, w2, a1, a2)
    assert (config.activation_key, config.a1_gscale, config.g1_alphas) == (NVFP4_DYNAMIC, a1, w1)
    with pytest.raises(MoEFxOptionError, match="a13_scale, a2_scale"):
        nvfp4.make_nvfp4_moe_quant_config(NvFp4MoeBackend.EMULATION, s, s, w1, w2)


@pytest.mark.parametrize("batched", [False, True])
def test_the_chosen_kernel_computes_what_the_reference_does(batched: bool) -> None:
    """fp8 in blocks with rounded activations, from selection to result."""
    config = FusedMoEConfig(E, 2, H, E, in_dtype=torch.float32, max_num_tokens=16, intermediate_size=I)
    B = Fp8MoeBackend.CPU_W8A8
    experts = REGISTERED["batched_loop" if batched else "sorted_loop"].experts
    w13, w2, s13, s2 = fp8_weights("block")
    w13, w2, s13, s2 = fp8.convert_to_fp8_moe_kernel_format(B, Layer(), w13, w2, s13, s2)
    quant = fp8.make_fp8_moe_quant_config(B, s13, s2, block_shape=[128, 128])
    kernel, inplace = fp8.make_fp8_moe_kernel(quant, config, B, experts)
    assert inplace is False
    draw = torch.Generator().manual_seed(2)
    x, weights = torch.randn(9, H, generator=draw), torch.rand(9, 2, generator=draw)
    ids = torch.stack([torch.randperm(E, generator=draw)[:2] for _ in range(9)])
    got = kernel.apply(x, w13, w2, ids, weights, "silu")
    spec = replace(config.mathematics, quant=QuantSpec(*map(str, (FP8_BLOCK, FP8_BLOCK, FP8_GROUP, FP8_GROUP))))
    codes = [Quantised(FP8_BLOCK, c, s) for c, s in ((w13, s13), (w2, s2))]
    view = Experts((codes[0],), codes[1], (), None, None, "gate_up")
    assert torch.allclose(got, experts_forward(x, ids, weights, view, spec), rtol=1e-5, atol=1e-5)
    plain = replace(spec, quant=QuantSpec(spec.quant.w13, spec.quant.w2))
    assert not torch.allclose(got, experts_forward(x, ids, weights, view, plain), rtol=1e-3, atol=1e-3)


def test_a_kernel_that_sends_tokens_away_needs_what_carries_them() -> None:
    spread = replace(CONFIG, moe_parallel_config=FusedMoEParallelConfig.make(dp_size=2, use_ep=True))
    with pytest.raises(MoEFxUnsupportedError, match="allgather_reducescatter: pass the prepare_finalize"):
        unquantized.make_unquantized_moe_kernel(
            FUSED_MOE_UNQUANTIZED_CONFIG, spread, UnquantizedMoeBackend.CPU, REGISTERED["sorted_loop"].experts
        )


def test_the_monolithic_and_the_plain_kernel_are_made_too() -> None:
    B, none = UnquantizedMoeBackend.CPU, FUSED_MOE_UNQUANTIZED_CONFIG
    config = replace(CONFIG, in_dtype=torch.float32, spec=replace(SPEC, combine=CombineSpec()))
    shared = lambda x: x * 3  # noqa: E731
    experts = REGISTERED["sorted_loop"].experts
    kernel, _ = unquantized.make_unquantized_moe_kernel(none, config, B, experts, shared_experts=shared)
    x = torch.randn(3, 256)
    ids, weights = torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    both = kernel.apply(x, torch.zeros(8, 256, 256), torch.zeros(8, 256, 128), ids, weights, "silu")
    assert torch.equal(both[0], x * 3)
    assert torch.equal(both[1], torch.zeros(3, 256))
    routed, _ = unquantized.make_unquantized_moe_kernel(none, config, B, REGISTERED["routed_loop"].experts)
    assert routed.experts.capability.monolithic
