"""Every registered experts kernel, over all that its capability claims, against the reference in fp64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

import moe_fx.kernels.experts  # noqa: F401  registers the kernels
from moe_fx.binding import Experts
from moe_fx.hardware import detect
from moe_fx.kernels.build import run
from moe_fx.kernels.capability import PLAIN
from moe_fx.kernels.experts.backward import experts_backward
from moe_fx.kernels.experts.reference import ANYTHING
from moe_fx.kernels.experts.rows import gather_rows, sizes_of, sort_rows, up_products
from moe_fx.kernels.experts.torch_experts import TorchExperts
from moe_fx.kernels.libraries import LIBRARIES
from moe_fx.kernels.registry import KERNELS, Kernel, kernel
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.reference import ACTIVATIONS, experts_forward
from moe_fx.reference import experts_backward as reference_backward
from moe_fx.reference.experts import compute_dtype
from moe_fx.spec import MoESpec
from tests.device_code.here import INTERPRETED

if INTERPRETED:
    from tests.device_code import interpreter

from .cases import Block, Case, E, H, K, assert_as_exact, error, make, sample

COUNT = 100
OURS = "moe_fx.triton"
HERE = ["cpu"] + ["cuda"] * (torch.cuda.is_available() and not INTERPRETED)
DEVICES = [pytest.param(d, marks=[pytest.mark.gpu] * (d != "cpu")) for d in HERE]
INSTALLED = detect(torch.device("cpu")).installed


def runs(chosen: Kernel, device: str) -> bool:
    """Device code on the CPU needs the interpreter; its process is for device code alone."""
    if INTERPRETED:
        return OURS in chosen.capability.packages
    return device in chosen.capability.devices


RUNNABLE = [  # those of libraries read packed weights: test_libraries_cpu.py
    k
    for k in KERNELS.values()
    if k.capability.packages <= INSTALLED and any(runs(k, d) for d in HERE) and not k.capability.monolithic
    if k.name not in LIBRARIES or (OURS in k.capability.packages and PLAIN in k.capability.schemes)
]
CASES = {k.name: sample(k.capability, COUNT) for k in RUNNABLE}


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


def check_forward(chosen: Kernel, case: Case, block: Block) -> None:
    before = [t.clone() for t in (block.x, block.weights, *block.operands)]
    y = run(chosen, block.x, block.ids, block.weights, block.experts, case.spec)
    if INTERPRETED:
        with interpreter.backwards():  # no program depends on another's being done
            assert torch.equal(y, run(chosen, block.x, block.ids, block.weights, block.experts, case.spec))
    if chosen.capability.backward == "save":
        check_saved(chosen, case, block, y)
    usual = experts_forward(block.x, block.ids, block.weights, block.experts, case.spec)
    exact = block.exact()
    truth = experts_forward(exact.x, exact.ids, exact.weights, exact.experts, case.exact_spec)
    assert_as_exact(y, usual, truth, case.eps, f"{chosen.name} {case}")
    after = (block.x, block.weights, *block.operands)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written to"


def check_saved(chosen: Kernel, case: Case, block: Block, y: torch.Tensor) -> None:
    """The backward from what the kernel keeps is as exact as one that computes it again; keeping changes no result."""
    saved: list[torch.Tensor] = []
    kept = run(chosen, block.x, block.ids, block.weights, block.experts, case.spec, keep=saved)
    assert torch.equal(kept, y)
    assert len(saved) == (len(block.experts.up) if len(block.ids) else 0)
    exact = up_of(block.exact(), case.exact_spec)
    for ours, usual, truth in zip(saved, up_of(block, case.spec), exact, strict=len(saved) > 0):
        rows = len(usual)  # those after it are of nobody
        assert_as_exact(ours[:rows], usual, truth, case.eps, f"{chosen.name} keeps {case}")
    if ACTIVATIONS[case.act].name in SMOOTH:
        check_backward(case, block, 3, saved, chosen)


# at a bend of any other, products that differ in the last bit have derivatives that differ
SMOOTH = ("silu", "gelu", "gelu_tanh", "quick_gelu", "swish", "sigmoid", "tanh", "identity", "mish", "swiglu_softcap")


def up_of(block: Block, spec: MoESpec) -> list[torch.Tensor]:
    """The up products with their biases, of the rows by expert, by PyTorch."""
    rows = sort_rows(block.ids, E)
    dtype = compute_dtype(block.experts, spec.expert)
    if not rows.used:
        return [block.x.new_empty((0, sizes_of(matrices)[0]), dtype=dtype) for matrices in block.experts.up]
    inputs = gather_rows(block.x, block.weights, rows.order[: rows.used], spec, dtype)
    return up_products(inputs, block.experts, rows.segments)


def check_backward(
    case: Case, block: Block, seed: int = 0, saved: Sequence[torch.Tensor] = (), chosen: Kernel = KERNELS["sorted_loop"]
) -> None:
    assert issubclass(chosen.experts, TorchExperts)
    differentiate = chosen.experts.differentiate
    dtype = getattr(torch, case.out_dtype) if case.out_dtype else block.x.dtype
    dy = torch.randn(block.x.shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(block.x.device)
    exact = block.exact()
    usual, truth = block.zeros(), exact.zeros()
    ours = [torch.full_like(o, float("nan")) for o in block.operands]  # may hold anything
    spec = case.spec

    def views(grads: list[torch.Tensor]) -> Experts:
        return replace_operands(block, grads).experts

    if INTERPRETED:
        with interpreter.backwards():
            other = [torch.full_like(o, float("nan")) for o in block.operands]
            reverse = differentiate(dy, block.x, block.ids, block.weights, block.experts, spec, views(other), saved)
    results = [
        (differentiate(dy, block.x, block.ids, block.weights, block.experts, spec, views(ours), saved), ours),
        (reference_backward(dy, block.x, block.ids, block.weights, block.experts, spec, views(usual)), usual),
        (
            reference_backward(
                dy.double(), exact.x, exact.ids, exact.weights, exact.experts, case.exact_spec, views(truth)
            ),
            truth,
        ),
    ]
    if INTERPRETED:
        assert all(torch.equal(a, b) for a, b in zip((*reverse, *other), (*results[0][0], *ours), strict=True))
    names = ["dx", "dweights", *(f"gradient of operand {i}" for i in range(len(ours)))]
    for name, *parts in zip(names, *((*first, *grads) for first, grads in results), strict=True):
        assert_as_exact(*parts, case.eps, f"{name} of {case}")
    frozen = differentiate(dy, block.x, block.ids, block.weights, block.experts, spec, None, saved)
    assert all(torch.equal(a, b) for a, b in zip(frozen, results[0][0], strict=True))


def replace_operands(block: Block, operands: list[torch.Tensor]) -> Block:
    return replace(block, operands=operands)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(COUNT))
@pytest.mark.parametrize("name", [k.name for k in RUNNABLE])
def test_forward(name: str, index: int, device: str) -> None:
    chosen = kernel(name)
    if not runs(chosen, device):
        pytest.skip(f"{name} does not run on {device}")
    case = CASES[name][index]
    check_forward(chosen, case, make(case, index, device))


# whose backward is tested: one of those that share it, and each that has one of its own
BACKWARDS = ["triton"] if INTERPRETED else ["sorted_loop", "cpp", *(["triton"] if "cuda" in HERE else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(COUNT))
@pytest.mark.parametrize("name", BACKWARDS)
def test_backward(name: str, index: int, device: str) -> None:
    chosen = kernel(name)
    if not runs(chosen, device):
        pytest.skip(f"{name} does not run on {device}")
    case = (sample(ANYTHING, COUNT) if name == "sorted_loop" else CASES[name])[index]
    if name != "sorted_loop" and ACTIVATIONS[case.act].name not in SMOOTH:  # test_activations.py, test_cpp.py
        case = replace(case, act=("silu", case.act[1]))
    check_backward(case, make(case, index, device), index, chosen=chosen)


EDGES = {
    "no_token": lambda b: replace(b, x=b.x[:0], ids=b.ids[:0], weights=b.weights[:0]),
    "one_token": lambda b: replace(b, x=b.x[3:4], ids=b.ids[3:4], weights=b.weights[3:4]),
    "one_sentinel": lambda b: replace(b, x=b.x[:1], ids=torch.full_like(b.ids[:1], E + 3), weights=b.weights[:1]),
    "all_to_one": lambda b: replace(b, ids=torch.full_like(b.ids, 4)),
    "all_outside": lambda b: replace(b, ids=torch.where(b.ids % 2 == 0, -1, E).to(b.ids.dtype)),
    "far_outside": lambda b: replace(b, ids=torch.where(b.ids % 2 == 0, b.ids, 2**31 - 1).to(b.ids.dtype)),
    "strided_x": lambda b: replace(b, x=torch.stack([b.x, b.x + 1], dim=2)[:, :, 0]),
    "transposed_x": lambda b: replace(b, x=b.x.t().contiguous().t()),
    "strided_ids": lambda b: replace(b, ids=b.ids.t().contiguous().t(), weights=b.weights.t().contiguous().t()),
    "int32": lambda b: replace(b, ids=b.ids.int()),
    "fp32_weights": lambda b: replace(b, weights=b.weights.float()),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", [k.name for k in RUNNABLE])
def test_edges(name: str, edge: str) -> None:
    """bfloat16 wherever a kernel takes it; with biases, which a sentinel must not add."""
    chosen = kernel(name)
    dtype = "bfloat16" if "bfloat16" in chosen.capability.dtypes else sorted(chosen.capability.dtypes)[0]
    biases = chosen.capability.biases
    for weight_on in chosen.capability.weight_on:
        case = Case(dtype=dtype, weight_on=weight_on, w13_bias=biases, w2_bias=biases)
        check_forward(chosen, case, EDGES[edge](make(case)))


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("name", BACKWARDS)
def test_backward_edges(name: str, edge: str, weight_on: str) -> None:
    case = Case(dtype="bfloat16", weight_on=weight_on, w13_bias=True, w2_bias=True)
    check_backward(case, EDGES[edge](make(case)), chosen=kernel(name))


@pytest.mark.slow
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("name", [k.name for k in RUNNABLE if OURS in k.capability.packages])
def test_every_activation_everywhere(name: str, act: tuple[str, bool], dtype: str, edge: str) -> None:
    """Device code has a path for each: forward and, where it has one of its own, backward."""
    chosen = kernel(name)
    known = chosen.capability
    if act[0] not in known.activations or dtype not in known.dtypes or act[1] not in known.gated:
        pytest.skip(f"{name} does not claim it")
    case = Case(act, dtype, w13_bias=known.biases, w2_bias=known.biases, order="interleaved")
    block = EDGES[edge](make(case))
    check_forward(chosen, case, block)
    if name in BACKWARDS and act[0] in SMOOTH:
        check_backward(case, block, chosen=chosen)


@pytest.mark.parametrize("name", [k.name for k in RUNNABLE])
def test_sentinels_hide_nan(name: str) -> None:
    """An id outside [0, E) reads neither its weight nor a row that was never computed."""
    case = Case(dtype="bfloat16", weight_dtype="float32")
    block = make(case)
    outside = (block.ids < 0) | (block.ids >= E)
    assert outside.any()
    clean = run(kernel(name), block.x, block.ids, block.weights, block.experts, case.spec)
    poisoned = block.weights.masked_fill(outside, float("nan"))
    assert torch.equal(run(kernel(name), block.x, block.ids, poisoned, block.experts, case.spec), clean)


def test_grouped_refuses_odd_strides() -> None:
    """A named error with advice, not torch's message about bytes."""
    case = Case(dtype="bfloat16")
    block = make(case)
    w2 = block.operands[1]
    padded = torch.cat([w2, w2[..., :3]], dim=2)[..., : w2.shape[2]]
    block.operands[1] = padded
    with pytest.raises(MoEFxRuntimeError, match="16 bytes"):
        run(kernel("torch_grouped"), block.x, block.ids, block.weights, block.experts, case.spec)


def test_one_expert_reads_one_expert() -> None:
    """sorted_loop and the backward touch no expert without tokens: theirs may hold anything."""
    case = Case(dtype="float32", form="list")
    block = make(case)
    block.ids.fill_(2)
    expected = run(kernel("sorted_loop"), block.x, block.ids, block.weights, block.experts, case.spec)
    for operand in [o for i, o in enumerate(block.operands) if i % E != 2]:
        operand.fill_(float("nan"))
    y = run(kernel("sorted_loop"), block.x, block.ids, block.weights, block.experts, case.spec)
    assert torch.equal(y, expected)
    grads = block.zeros()
    dx, dweights = experts_backward(
        torch.ones_like(block.x),
        block.x,
        block.ids,
        block.weights,
        block.experts,
        case.spec,
        replace_operands(block, grads).experts,
    )
    assert torch.isfinite(dx).all()
    assert torch.isfinite(dweights).all()
    assert all(bool(g.any()) == (i % E == 2) for i, g in enumerate(grads))


MUTANTS = {
    "gate and up swapped": lambda b: replace(b, binding=make(replace(BASE, order="up_gate")).binding),
    "interleaved read as halves": lambda b: replace(b, binding=make(replace(BASE, order="interleaved")).binding),
    "no down bias": lambda b: replace(b, operands=[*b.operands[:3], torch.zeros_like(b.operands[3])]),
    "no up bias": lambda b: replace(b, operands=[*b.operands[:2], torch.zeros_like(b.operands[2]), b.operands[3]]),
    "experts off by one": lambda b: replace(b, ids=(b.ids + 1).where((b.ids >= 0) & (b.ids < E), b.ids)),
    "weights of another slot": lambda b: replace(b, weights=b.weights.roll(1, 1)),
    "one k less": lambda b: replace(b, ids=b.ids.index_fill(1, torch.tensor([K - 1]), -1)),
    "x off by one row": lambda b: replace(b, x=b.x.roll(1, 0)),
}
BASE = Case(dtype="bfloat16", w13_bias=True, w2_bias=True)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("name", [k.name for k in RUNNABLE])
def test_mutants_are_caught(name: str, mutant: str) -> None:
    """The tolerance rule sees each seeded defect with room to spare."""
    block = make(BASE)
    exact = block.exact()
    truth = experts_forward(exact.x, exact.ids, exact.weights, exact.experts, BASE.exact_spec)
    usual = experts_forward(block.x, block.ids, block.weights, block.experts, BASE.spec)
    wrong = MUTANTS[mutant](block)
    y = run(kernel(name), wrong.x, wrong.ids, wrong.weights, wrong.experts, BASE.spec)
    assert error(y, truth) > 4 * (2 * error(usual, truth) + 4 * BASE.eps)
    assert y.shape[1] == H
