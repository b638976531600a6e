"""Experts over codes in Triton: every scheme that they claim against the reference; rounding of rows to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_fx.kernels.experts  # noqa: F401  registers the kernels
from moe_fx.binding import Experts, InputScales, Quantised
from moe_fx.kernels.build import run
from moe_fx.kernels.registry import KERNELS, Kernel, kernel
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_GROUP,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_TENSOR,
    INT8_TOKEN,
    MXFP4,
    QuantKey,
    QuantSpec,
    int_group,
)
from moe_fx.reference import ACTIVATIONS, experts_forward
from moe_fx.reference.quantise import quantise
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec
from tests.kernels import quantised_cases as by_hand
from tests.kernels.cases import PARAMS, assert_as_exact, error

from .here import DEVICE, needs_compiler, on_device

E, K = 6, 3
KERNEL_NAMES = ("triton_wna16", "triton_fp8", "triton_int8")
POINTS = [
    (name, *scheme) for name in KERNEL_NAMES for scheme in sorted(KERNELS[name].capability.schemes, key=str)
]  # fmt: skip
PRODUCTS = ("up_codes_kernel", "down_codes_kernel")


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Case:
    """split: gate and up are two operands.  sizes: H, I.  each: given scales are one for each expert."""

    weights: QuantKey
    inputs: QuantKey | None = None
    dtype: str = "bfloat16"
    act: tuple[str, bool] = ("silu", True)
    order: Any = "gate_up"
    form: str = "stacked"
    split: bool = False
    bias: bool = True
    norm: Any = ""
    weight_on: Any = "output"
    sizes: tuple[int, int] = (160, 96)
    tokens: int = 13
    each: bool = False

    @property
    def spec(self) -> MoESpec:
        name, gated = self.act
        params = tuple(PARAMS[p] for p in ACTIVATIONS[self.act].params)
        expert = ExpertSpec(E, *self.sizes, name, params, gated, self.bias, self.bias, self.norm, 1e-5)
        keys = [str(self.weights)] * 2 + [str(self.inputs or "")] * 2
        return MoESpec(K, expert, CombineSpec(self.weight_on), quant=QuantSpec(*keys))


@dataclass(slots=True)
class Block:
    x: Tensor
    ids: Tensor
    weights: Tensor
    experts: Experts

    def exact(self) -> Block:
        """The same values in float64; codes stay."""
        e = self.experts
        bias = tuple(b.double() for b in e.up_bias)  # type: ignore[union-attr]
        down = None if e.down_bias is None else e.down_bias.double()  # type: ignore[union-attr]
        norm = None if e.norm is None else e.norm.double()
        experts = replace(e, up_bias=bias, down_bias=down, norm=norm)
        return Block(self.x.double(), self.ids, self.weights.double(), experts)


def make(case: Case, seed: int = 0) -> Block:
    """ids with duplicates and values outside [0, E), one expert without tokens and one a hundred times smaller."""
    draw = torch.Generator().manual_seed(seed)
    dtype, gated, (hidden, inner) = getattr(torch, case.dtype), case.act[1], case.sizes

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64) * scale

    def held(out: int, inputs: int) -> Quantised:
        matrices = normal(E, out, inputs, scale=inputs**-0.5)
        matrices[1] *= 0.01
        q = quantise(matrices, case.weights)
        parts = [None if t is None else t.to(DEVICE) for t in (q.codes, q.scale, q.zero)]  # type: ignore[union-attr]
        if case.form == "list":
            parts = [None if t is None else list(t) for t in parts]
        return Quantised(q.key, *parts)  # type: ignore[arg-type]

    widths = [inner] * (1 + gated) if case.split else [inner * (1 + gated)]
    up = tuple(held(width, hidden) for width in widths)
    biases = [normal(E, width, scale=0.5).to(dtype).to(DEVICE) for width in widths] * case.bias
    down = held(hidden, inner)
    down_bias = normal(E, hidden, scale=0.5).to(dtype).to(DEVICE) if case.bias else None
    norm = (normal(hidden, scale=0.3) + 1).to(dtype).to(DEVICE) if case.norm else None
    scales = InputScales()
    if case.inputs and case.inputs.static:
        size = 4 / 448 if case.inputs.dtype != "int8" else 4 / 127
        given = (torch.rand(E, generator=draw) + 0.5) * size if case.each else torch.tensor(size)
        scales = InputScales(given.to(DEVICE), (0.5 * given).to(DEVICE))
    experts = Experts(up, down, tuple(biases), down_bias, norm, case.order, scales)
    ids = torch.randint(0, E - 1, (case.tokens, K), generator=draw)
    if case.tokens > 2:
        ids[0, 0], ids[1, 1], ids[2] = -1, E, ids[2, 0]
    weights = torch.rand((case.tokens, K), generator=draw) + 0.1
    x = normal(case.tokens, hidden).to(dtype)
    return Block(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), experts)


def check(chosen: Kernel, case: Case, block: Block) -> None:
    given = (block.x, block.ids, block.weights, block.experts)
    exact = block.exact()
    truth = experts_forward(exact.x, exact.ids, exact.weights, exact.experts, case.spec)
    eps = torch.finfo(block.x.dtype).eps
    assert_as_exact(run(chosen, *given, case.spec), experts_forward(*given, case.spec), truth, eps, str(case))


def drawn(weights: QuantKey, inputs: QuantKey | None, dtypes: list[str]) -> Case:
    """Everything else by chance."""
    draw = random.Random(f"{weights} {inputs}")
    return Case(
        weights,
        inputs,
        draw.choice(dtypes),
        act=draw.choice(sorted(ACTIVATIONS)),
        order=draw.choice(["gate_up", "up_gate", "interleaved"]),
        form=draw.choice(["stacked", "list"]),
        split=draw.random() < 0.3,
        bias=draw.random() < 0.5,
        norm=draw.choice(["", "", "", "rms", "rms_plus_one", "rms_input_scaled"]),
        weight_on=draw.choice(["output", "input"]),
        sizes=draw.choice([(160, 96), (48, 40), (128, 256), (36, 132)]),
        tokens=draw.choice([1, 13, 13]),
        each=draw.random() < 0.5,
    )


def named(point: tuple[str, QuantKey, QuantKey | None]) -> str:
    return "-".join(map(str, point))


@on_device
@pytest.mark.parametrize("point", POINTS, ids=named)
def test_forward(point: tuple[str, QuantKey, QuantKey | None]) -> None:
    name, weights, inputs = point
    case = drawn(weights, inputs, sorted(kernel(name).capability.dtypes))
    check(kernel(name), case, make(case))


def moved(value: Any) -> Any:
    """Every tensor inside on the device of these tests."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, list | tuple):
        return type(value)(moved(v) for v in value)
    if isinstance(value, Experts | Quantised | InputScales):
        return replace(value, **{f.name: moved(getattr(value, f.name)) for f in fields(value)})
    return value


def claims(name: str, scheme: QuantSpec) -> bool:
    return (scheme.key("w13"), scheme.key("a1")) in kernel(name).capability.schemes


HANDS = [(k, name) for k in KERNEL_NAMES for name, scheme in by_hand.SCHEMES.items() if claims(k, scheme)]


@on_device
@pytest.mark.parametrize(("chosen", "name"), HANDS)
def test_as_computed_by_hand(chosen: str, name: str) -> None:
    """Nothing of ``moe_fx.reference`` is in the truth; no size is a multiple of a group."""
    case = by_hand.Case(by_hand.SCHEMES[name])
    experts, exact = case.experts()
    x, ids, weights = by_hand.inputs(2)
    x, truth = x.bfloat16(), by_hand.dense(case, x.bfloat16().double(), ids, weights, exact)
    usual = experts_forward(x, ids, weights, experts, case.spec)
    y = run(kernel(chosen), *moved((x, ids, weights, experts)), case.spec).cpu()
    assert_as_exact(y, usual, truth, torch.finfo(torch.bfloat16).eps, name)
    assert len(HANDS) >= 18


EDGES: dict[str, Callable[[Block], Block]] = {
    "no_token": lambda b: replace(b, x=b.x[:0], ids=b.ids[:0], weights=b.weights[:0]),
    "one_sentinel": lambda b: replace(b, x=b.x[:1], ids=torch.full_like(b.ids[:1], E + 3), weights=b.weights[:1]),
    "all_to_one": lambda b: replace(b, ids=torch.full_like(b.ids, 4)),
    "all_outside": lambda b: replace(b, ids=torch.where(b.ids % 2 == 0, -1, E)),
    "transposed_x": lambda b: replace(b, x=b.x.t().contiguous().t()),
    "strided_ids": lambda b: replace(b, ids=b.ids.t().contiguous().t(), weights=b.weights.t().contiguous().t()),
    "int32": lambda b: replace(b, ids=b.ids.int()),
}
USUAL = {
    "int4": ("triton_wna16", Case(int_group(4, 32, zero_points=True), order="interleaved")),
    "fp8": ("triton_fp8", Case(FP8_BLOCK, FP8_GROUP)),
    "int8": ("triton_int8", Case(INT8_CHANNEL, INT8_TOKEN, split=True)),
}


@on_device
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", USUAL)
def test_edges(name: str, edge: str) -> None:
    chosen, case = USUAL[name]
    for weight_on in ("output", "input"):
        weighted = replace(case, weight_on=weight_on)
        check(kernel(chosen), weighted, EDGES[edge](make(weighted)))


@on_device
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_activations(act: tuple[str, bool]) -> None:
    case = Case(INT8_CHANNEL, act=act, sizes=(48, 40), dtype="float32")
    check(kernel("triton_wna16"), case, make(case))


@pytest.mark.slow
@on_device
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("point", POINTS, ids=named)
def test_every_activation_of_every_scheme(point: tuple[str, QuantKey, QuantKey | None], act: tuple[str, bool]) -> None:
    name, weights, inputs = point
    dtypes = sorted(kernel(name).capability.dtypes)
    sizes = (48, 40) if inputs is None else (160, 96)  # of a small block one rounded code that flips is too much
    case = Case(weights, inputs, dtypes[list(ACTIVATIONS).index(act) % len(dtypes)], act, "interleaved", sizes=sizes)
    check(kernel(name), case, make(case))


@pytest.mark.slow
@on_device
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("point", POINTS, ids=named)
def test_every_edge_of_every_scheme(point: tuple[str, QuantKey, QuantKey | None], dtype: str, edge: str) -> None:
    name, weights, inputs = point
    if dtype not in kernel(name).capability.dtypes:
        pytest.skip(f"{name} does not claim it")
    case = Case(weights, inputs, dtype, split=True)
    check(kernel(name), case, EDGES[edge](make(case)))


def rows_near_the_middle(key: QuantKey, dtype: torch.dtype) -> Tensor:
    """Numbers at, just below and just above the middle between two codes, and whole groups that are special."""
    draw = torch.Generator().manual_seed(0)
    number = torch.arange(127).float() if key.dtype == "int8" else None
    if number is None:
        number = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middle, largest = (number[1:] + number[:-1]) / 2, number[-1:]
    most = torch.tensor([127.0 if key.dtype == "int8" else 448.0])
    rows = []
    for _ in range(24):
        step = torch.exp2(torch.rand(1, generator=draw) * 8 - 4)
        near = (middle * step)[:, None].nextafter(torch.tensor([-1e9, 1e9])).flatten()
        found = torch.cat([most * step, middle * step, near, -near, number * step, largest * step * 1e-7])
        rows.append(torch.nn.functional.pad(found, (0, -len(found) % 128)))
    found = torch.stack(rows)
    found[:, 128::128] = found[:, :1]  # each group has the same scale
    special = torch.randn(6, found.shape[1], generator=draw)
    special[0], special[1, 3], special[2, 5], special[3, 7] = 0, torch.nan, torch.inf, -torch.inf
    special[4], special[5] = special[4] * 1e-44, -0.0
    return torch.cat([found, special]).to(dtype)


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("key", [FP8_TOKEN, FP8_GROUP, INT8_TOKEN, FP8_TENSOR, INT8_TENSOR], ids=str)
def test_rows_are_rounded_to_the_bit(key: QuantKey, dtype: torch.dtype) -> None:
    from moe_fx.kernels.triton import launch, launch_quantised

    x = rows_near_the_middle(key, dtype)
    x = torch.cat([x, x[:, :55]], 1)  # a last group that is not whole
    ids = torch.zeros((len(x), 1), dtype=torch.int64)
    spec = MoESpec(1, ExpertSpec(1, x.shape[1], 16), quant=QuantSpec("", "", str(key), str(key)))
    given = torch.tensor(0.037) if key.static else None
    experts = Experts((x,), x, (), None, None, "gate_up", InputScales(None if given is None else given.to(DEVICE)))
    job = launch.listed(ids.to(DEVICE), spec, dtype, sort=False)
    found = launch_quantised.rounded(job, x.to(DEVICE), None, experts, "a1", key)
    expected = quantise(x, key, scale=given)
    assert isinstance(expected.codes, Tensor) and isinstance(expected.scale, Tensor)
    scale = found.scales.at.cpu()  # type: ignore[union-attr]
    torch.testing.assert_close(scale, expected.scale.expand_as(scale), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.rows.at.cpu().view(torch.uint8), expected.codes.view(torch.uint8))


def swapped(q: Quantised) -> Quantised:
    return replace(q, codes=(q.codes << 4) | (q.codes >> 4))  # type: ignore[operator]


def next_group(q: Quantised) -> Quantised:
    return replace(q, scale=q.scale.roll(1, -1))  # type: ignore[union-attr]


DEFECTS: dict[str, tuple[Case, Callable[[Quantised], Quantised]]] = {
    "nibbles swapped": (Case(int_group(4, 32)), swapped),
    "e2m1 swapped": (Case(MXFP4), swapped),
    "scale of the next group": (Case(int_group(4, 32)), next_group),
    "zero point of the next group": (
        Case(int_group(4, 32, zero_points=True)),
        lambda q: replace(q, zero=q.zero.roll(1, -1)),  # type: ignore[union-attr]
    ),
    "scale of the next output": (
        Case(FP8_CHANNEL),
        lambda q: replace(q, scale=q.scale.roll(1, -2)),  # type: ignore[union-attr]
    ),
    "block of the next inputs": (Case(FP8_BLOCK, FP8_GROUP, sizes=(256, 128)), next_group),
}


@on_device
@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_caught(defect: str) -> None:
    case, wrong = DEFECTS[defect]
    block, exact = make(case), make(case).exact()
    down, (up,) = block.experts.down, block.experts.up
    assert isinstance(down, Quantised) and isinstance(up, Quantised)
    if "next inputs" in defect:  # blocks of one size would hide it
        for q in (up, down):
            q.scale[..., 0] *= 3  # type: ignore[index]
        exact = block.exact()
    truth = experts_forward(exact.x, exact.ids, exact.weights, exact.experts, case.spec)
    given = (block.x, block.ids, block.weights)
    bound = 2 * error(experts_forward(*given, block.experts, case.spec), truth) + 4 * torch.finfo(block.x.dtype).eps
    rounded = {None: "triton_wna16", INT8_TOKEN: "triton_int8"}
    name = rounded.get(case.inputs, "triton_fp8")
    assert error(run(kernel(name), *given, block.experts, case.spec), truth) <= bound
    experts = replace(block.experts, up=(wrong(up),))
    assert error(run(kernel(name), *given, experts, case.spec), truth) > 2 * bound


COMPILED = {
    "fp8 tensor": ("triton_wna16", Case(FP8_TENSOR, dtype="float16")),
    "fp8 channel": ("triton_wna16", Case(FP8_CHANNEL, order="interleaved")),
    "fp8 block": ("triton_wna16", Case(FP8_BLOCK, weight_on="input")),
    "int8": ("triton_wna16", Case(INT8_CHANNEL, form="list")),
    "int8 groups": ("triton_wna16", Case(int_group(8, 128, zero_points=True))),
    "int4": ("triton_wna16", Case(int_group(4, 128), order="interleaved", act=("swiglu_oai", True))),
    "int4 small groups": ("triton_wna16", Case(int_group(4, 32, zero_points=True))),
    "int4, ungated": ("triton_wna16", Case(int_group(4, 64), act=("relu2", False))),
    "mxfp4": ("triton_wna16", Case(MXFP4, order="interleaved", act=("swiglu_oai", True))),
    "fp8 by token": ("triton_fp8", Case(FP8_CHANNEL, FP8_TOKEN)),
    "fp8 by block": ("triton_fp8", Case(FP8_BLOCK, FP8_GROUP)),
    "fp8 by block, in turn": ("triton_fp8", Case(FP8_BLOCK, FP8_GROUP, order="interleaved", weight_on="input")),
    "fp8 by expert": ("triton_fp8", Case(FP8_TENSOR, FP8_TENSOR, each=True)),
    "int8 by token": ("triton_int8", Case(INT8_CHANNEL, INT8_TOKEN)),
}


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles(name: str, capability: int) -> None:
    from .described import described

    chosen, case = COMPILED[name]
    if f"sm{capability}" not in (kernel(chosen).capability.archs or {f"sm{capability}"}):
        pytest.skip(f"{chosen} does not run there")
    with described(capability) as made:
        for tokens in (1, 40, 3000):
            block = make(replace(case, sizes=(512, 256), tokens=tokens))
            spec = replace(case, sizes=(512, 256)).spec
            run(kernel(chosen), block.x, block.ids, block.weights, block.experts, spec)
    products = [m for m in made if m.name in PRODUCTS]
    assert {m.name for m in made} >= {*PRODUCTS, "_place", "reduce_kernel"}
    assert any(m.name == "round_kernel" for m in made) == (case.inputs is not None)
    shown = [(m.name, m.registers, m.spilled, m.shared) for m in products]
    print(shown)
    assert not [found for found in shown if found[2] > 512]
    assert all("cp.async" in m.ptx for m in products), "nothing is pipelined"
    if capability == 90:
        codes = {"float8_e4m3fn": ".f32.e4m3.e4m3", "int8": ".s32.s8.s8"}
        wanted = "wgmma" if case.inputs is None else codes[case.inputs.dtype]
        assert {m.name for m in products if wanted in m.ptx} == set(PRODUCTS)
