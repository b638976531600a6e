"""Adapters to libraries that cannot run here: their calls fit the functions.

A call is bound to the function's real signature where the package is installed, and always to the one written down;
what is written down is compared with what is installed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_fx.kernels.experts
import moe_fx.kernels.libraries  # noqa: F401  both register kernels
from moe_fx.kernels.libraries import (
    LIBRARIES,
    flashinfer_cutlass,
    flashinfer_trtllm,
    marlin,
    rocm_aiter,
    vllm_cpu,
    zentorch,
)
from moe_fx.kernels.libraries.adapter import routing
from moe_fx.kernels.registry import KERNELS, kernel
from moe_fx.quant import (
    MXFP4,
    MXFP8_DYNAMIC,
    NVFP4,
    NVFP4_DYNAMIC,
    QuantSpec,
)
from moe_fx.weights import WeightStore

from .library_cases import Shape, make
from .library_signatures import (
    BASE,
    FP8_BLOCKS,
    FP8_ROWS,
    FP8_TENSORS,
    SCHEMAS,
    SIGNATURES,
    Built,
    E,
    H,
    T,
    bound,
    fits,
    held,
    installed,
    quant,
    written,
)


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_that_are_installed(name: str) -> None:
    real = installed(name)
    if real is None:
        pytest.skip(f"{name} is not here, or does not import without a GPU")
    ours, theirs = written(name), inspect.signature(real)
    assert list(ours.parameters) == list(theirs.parameters)
    for parameter in ours.parameters.values():
        other = theirs.parameters[parameter.name]
        assert (parameter.default is parameter.empty) == (other.default is other.empty), parameter.name
        assert parameter.kind == other.kind, parameter.name


@pytest.mark.parametrize("name", [n for n in SCHEMAS if n.startswith(("_C", "zentorch"))])
def test_schemas_are_those_that_are_installed(name: str) -> None:
    try:
        (vllm_cpu if name.startswith("_C") else zentorch).ops()
    except Exception as error:  # noqa: BLE001  whatever it is that keeps it from loading
        pytest.skip(str(error))
    (real,) = torch._C._jit_get_schemas_for_operator(name)
    ours = torch._C.parse_schema(name + SCHEMAS[name])
    assert [(a.name, str(a.type), a.kwarg_only) for a in ours.arguments] == [
        (a.name, str(a.type), a.kwarg_only) for a in real.arguments
    ]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("flashinfer_cutlass_nvfp4", quant(NVFP4, NVFP4_DYNAMIC)),
        ("flashinfer_cutlass_mxfp4_mxfp8", quant(MXFP4, MXFP8_DYNAMIC)),
    ],
)
def test_flashinfer_cutlass_fp4_binds(name: str, scheme: QuantSpec) -> None:
    block = make(replace(BASE, quant=scheme))
    made = Built(name, block)
    routed = routing(block.ids, block.weights, E)
    found = flashinfer_cutlass.arguments(block.x, routed, made.view, block.spec, made.config)
    a = bound("flashinfer.fused_moe.cutlass_fused_moe", **found)
    assert a["fc1_expert_weights"].dtype == torch.int64 == a["fc2_expert_weights"].dtype
    assert not a["swizzled_input_sf"]
    assert a["input_sf"].shape == (T, H // (16 if "nvfp4" in name else 32))
    assert [s.dtype for s in a["quant_scales"]].count(torch.int32) == 2
    assert a["use_mxfp8_act_scaling"] == ("mxfp8" in name)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("flashinfer_trtllm_fp8_tensor_monolithic", FP8_TENSORS),
        ("flashinfer_trtllm_nvfp4", quant(NVFP4, NVFP4_DYNAMIC)),
        ("flashinfer_trtllm_nvfp4_monolithic", quant(NVFP4, NVFP4_DYNAMIC)),
        ("flashinfer_trtllm_mxfp4", quant(MXFP4)),
        ("flashinfer_trtllm_mxfp4_monolithic", quant(MXFP4)),
        ("flashinfer_trtllm_mxfp4_mxfp8", quant(MXFP4, MXFP8_DYNAMIC)),
        ("flashinfer_trtllm_mxfp4_mxfp8_monolithic", quant(MXFP4, MXFP8_DYNAMIC)),
    ],
)
def test_flashinfer_trtllm_binds(name: str, scheme: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    block, seen = make(replace(BASE, quant=scheme)), []

    def function(called: str) -> Callable[..., Tensor]:
        def record(**kwargs: Any) -> Tensor:
            seen.append(bound(f"flashinfer.fused_moe.{called}", **kwargs))
            return torch.zeros(T, H, dtype=torch.bfloat16)

        return record

    monkeypatch.setattr(flashinfer_trtllm, "attribute", lambda module, called: function(called))
    made = Built(name, block)
    if "monolithic" in name:
        made.experts.apply(
            block.x, held(name, block).up, held(name, block).down, torch.randn(T, E), "silu", E, None, None, False
        )
    else:
        made.experts.call(block.x, routing(block.ids, block.weights, E), made.view, block.spec)
    (a,) = seen
    if scheme is FP8_TENSORS:
        gate, both = a["output1_scales_gate_scalar"], a["output1_scales_scalar"]
        a2 = float(made.config.a2_scale)  # type: ignore[arg-type]
        assert torch.allclose(both, gate / a2)
        assert gate.shape == (E,)
    elif "nvfp4" in name:
        assert torch.allclose(a["output1_scale_scalar"] * made.config.a2_gscale, a["output1_scale_gate_scalar"])
        assert a["hidden_states_scale"].shape == (T, H // 16)


@pytest.mark.parametrize(
    ("name", "scheme", "kind"),
    [
        ("aiter", FP8_TENSORS, "per_Tensor"),
        ("aiter", FP8_ROWS, "per_Token"),
        ("aiter_block", FP8_BLOCKS, "per_128x128"),
        ("aiter_mxfp4_bf16", quant(MXFP4), "per_1x32"),
    ],
)
def test_aiter_binds(name: str, scheme: QuantSpec, kind: str) -> None:
    block = make(replace(BASE, quant=scheme, bias="mxfp4" in name, inner=256))  # eight scales a row at least
    made = Built(name, block)
    a1, a2 = made.config.a1_scale, made.config.a2_scale
    found = rocm_aiter.arguments(block.x, routing(block.ids, block.weights, E), made.view, block.spec, a1, a2)
    a = bound("aiter.fused_moe.fused_moe", **found)
    assert a["quant_type"] == kind
    assert (a["a1_scale"] is not None) == (scheme is FP8_TENSORS)
    assert (a["bias1"] is not None) == ("mxfp4" in name)


def test_numbers_of_types_are_vllms() -> None:
    """As its ScalarType computes them, where vllm is (its file needs no GPU)."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vllm is not installed")
    path = spec.submodule_search_locations[0] + "/scalar_type.py"
    found = importlib.util.spec_from_file_location("scalar_type_of_vllm", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    importlib.import_module("sys").modules["scalar_type_of_vllm"] = module
    found.loader.exec_module(module)
    types = module.scalar_types
    theirs = {"fp8": types.float8_e4m3fn, "mxfp8": types.float8_e4m3fn, "mxfp4": types.float4_e2m1f}
    theirs |= {"int4": types.uint4b8, "int8": types.uint8b128}
    assert {name: t.id for name, t in theirs.items()} == marlin.TYPES


# --- CPU ops


@pytest.mark.parametrize("bias", [False, True])
def test_cpu_ops_fit_their_schemas(bias: bool) -> None:
    block = make(Shape(act="swiglu_oai", bias=bias))
    store, routed = WeightStore(), routing(block.ids, block.weights, 8)
    packed = {
        name: store.get(kernel(name).experts.layout_for(block.spec), block.binding, block.operands, 8)
        for name in ("vllm_cpu", "vllm_cpu_sgl", "zentorch")
    }
    out = torch.empty_like(block.x)
    plain = routed.ids, routed.weights
    fits("_C::cpu_fused_moe", vllm_cpu.fused_moe_arguments(out, block.x, *plain, packed["vllm_cpu"], block.spec))
    sgl = vllm_cpu.fused_experts_arguments(0, out, block.x, routed, packed["vllm_cpu_sgl"], block.spec)
    fits("_C::fused_experts_cpu", sgl)
    fits(
        "zentorch::zentorch_fused_moe",
        zentorch.fused_moe_arguments(out, block.x, routed, packed["zentorch"], block.spec),
    )


def test_a_call_that_does_not_fit_is_seen() -> None:
    """The checks themselves."""
    with pytest.raises(TypeError):
        bound("deep_gemm.m_grouped_fp8_gemm_nt_masked", a=1, b=2, d=3, masked_m=4)
    with pytest.raises(TypeError):
        bound("torch.nn.functional.scaled_grouped_mm", mat_a=1, mat_b=2, scale=3)
    with pytest.raises(AssertionError):
        fits("_C::prepack_moe_weight", (torch.ones(1), torch.ones(1), 3))
    with pytest.raises(AssertionError):
        fits("_C::prepack_moe_weight", (torch.ones(1), torch.ones(1)))


def test_every_adapter_is_a_row_of_the_table_and_has_a_layout() -> None:
    adapted = [n for n in KERNELS if n in LIBRARIES and "moe_fx.triton" not in LIBRARIES[n].capability.packages]
    assert len(adapted) >= 30
    for name in adapted:
        row, chosen = LIBRARIES[name], KERNELS[name]
        assert chosen.cost is row.cost
        for field in ("devices", "activations", "schemes", "archs", "dtypes", "packages"):
            narrow, wide = (getattr(c.capability, field) for c in (chosen, row))
            assert wide is None or narrow <= wide, f"{name} claims more {field} than the library"
