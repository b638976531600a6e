"""Every launch of the experts compiles to machine code for the architectures that it claims."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moe_fx.kernels.experts  # noqa: F401  registers the kernels
from moe_fx.kernels.build import run
from moe_fx.kernels.registry import kernel
from tests.kernels import cases
from tests.kernels.cases import Case, make

from .here import needs_compiler

pytestmark = needs_compiler
TOKENS = (1, 40, 200, 3000)  # apart, and sorted with one, two and four kinds of tiles
CASES = {
    "plain": Case(dtype="bfloat16"),
    "half": Case(dtype="float16", weight_dtype="float32"),
    "single": Case(dtype="float32"),
    "biases and a list": Case(dtype="bfloat16", form="list", w13_bias=True, w2_bias=True),
    "transposed and interleaved": Case(
        dtype="bfloat16", transposed=True, order="interleaved", act=("swiglu_oai", True)
    ),
    "weights on the input": Case(dtype="bfloat16", weight_on="input", act=("gelu", True), norm="rms"),
    "ungated": Case(dtype="bfloat16", act=("relu2", False), compute_dtype="float32", x_dtype="float32"),
}


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of a real layer's shape, so that pointers and strides are what they are there."""
    for name, size in dict(E=8, K=2, H=512, I=256).items():
        monkeypatch.setattr(cases, name, size)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("_wide")
def test_compiles(name: str, capability: int) -> None:
    from .described import described

    case = CASES[name]
    with described(capability) as made:
        for tokens in TOKENS:
            block = make(case, tokens=tokens)
            run(kernel("triton"), block.x, block.ids, block.weights, block.experts, case.spec)
        if case.weight_on == "output" and not case.norm:
            run(kernel("batched_triton"), block.x, block.ids, block.weights, block.experts, case.spec)
            if not case.norm:
                grads = replace(block, operands=block.zeros()).experts
                given = (block.x, block.x, block.ids, block.weights, block.experts, case.spec, grads, ())
                kernel("triton").experts.differentiate(*given)  # type: ignore[attr-defined]
    products = [m for m in made if m.name in ("up_kernel", "down_kernel", "hidden_kernel", "outer_kernel")]
    forward = {"_count", "_scan", "_place", "up_kernel", "down_kernel", "reduce_kernel"}
    backward = {"hidden_kernel", "outer_kernel", "weights_kernel"}
    assert {m.name for m in made} == (forward if case.norm else forward | backward)
    narrow = case.dtype != "float32" and case.compute_dtype != "float32"
    most = 256 if narrow and capability < 100 else 1536  # float32 has no matrix instructions to wait for
    assert not [(m.name, m.registers, m.spilled, m.shared) for m in products if m.spilled > most]
    if capability == 90 and narrow:
        assert any("wgmma" in m.ptx for m in products), "Hopper's matrix instructions are not used"
    if narrow:
        assert all("cp.async" in m.ptx for m in products), "nothing is pipelined"


def test_token_counts_are_not_compiled_for() -> None:
    """Of each kernel one variant for a kind of tiles, whatever the number of tokens."""
    from .described import described

    case = CASES["plain"]
    with described(90) as made:
        for tokens in (140, 141, 144, 160, 176):  # rows of one expert that take the same tiles
            block = make(case, tokens=tokens)
            run(kernel("triton"), block.x, block.ids, block.weights, block.experts, case.spec)
    assert len(made) == len({m.name for m in made}) == 4


def test_what_does_not_compile_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is no rubber stamp."""
    from triton.compiler.errors import CompilationError

    from .described import described

    case = replace(CASES["plain"], act=("silu", True))
    block = make(case)
    monkeypatch.setattr("moe_fx.kernels.triton.launch.DTYPES", {torch.bfloat16: "no dtype"})
    with described(90), pytest.raises(CompilationError):
        run(kernel("triton"), block.x, block.ids, block.weights, block.experts, case.spec)
