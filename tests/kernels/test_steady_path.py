"""From the second call on: what a kernel allocates at a real layer's sizes and for any mathematics, and that no kernel
meant for a GPU waits for it.

Allocations are counted below every op (``test_workspace.Live``).  For waiting, calls run on fake tensors of a GPU,
where a value cannot be read; a copy from one device to another, which they let pass, raises too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import moe_fx.kernels.experts  # noqa: F401  registers the kernels
from moe_fx.kernels.build import run
from moe_fx.kernels.modular_kernel import workspace as buffers
from moe_fx.kernels.modular_kernel.workspace import held_bytes, release
from moe_fx.kernels.registry import kernel
from moe_fx.lowerings.dispatch import Dispatch
from moe_fx.ops import Call
from moe_fx.plan import Plan, Range

from . import cases
from .cases import Case, error
from .test_no_waiting import Unguarded
from .test_workspace import Block, Live, Made

MB = 1 << 20
SIZES = dict(hidden=1024, inner=512, experts=32, top_k=8)  # Granite-3.0-1B-A400M
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    release()
    yield
    release()


# --- what a call allocates


def exact(block: Block, token: int) -> Tensor:
    """y of one token in fp64."""
    w13, w2 = block.operands
    y = torch.zeros(block.x.shape[1], dtype=torch.float64)
    for e, weight in zip(block.ids[token].tolist(), block.weights[token].tolist(), strict=True):
        gate, up = (w13[e].double() @ block.x[token].double()).chunk(2)
        y += weight * (w2[e].double() @ (F.silu(gate) * up))
    return y


def larger(made: list[Made], size: int) -> list[Made]:
    """The storages of numbers, not of indices, that are larger."""
    return [one for one in made if one.dtype.is_floating_point and one.size > size]


@pytest.mark.parametrize("tokens, cap", [(8192, 32 * MB), pytest.param(65_536, 256 * MB, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, products", [("sorted_loop", 0), ("torch_grouped", 2)])
def test_a_long_prompt(name: str, products: int, tokens: int, cap: int) -> None:
    """The output, workspaces within the bound, and what ``temporary_shapes`` counts within it too: indices, and of
    torch_grouped what grouped_mm returns.  Of anything else, a block of rows at most."""
    block = Block(BF16, tokens, **SIZES)
    first = block.run(name, cap)
    held = held_bytes()
    assert cap / 4 < held <= cap
    y, live = block.live(name, cap)
    assert torch.equal(y, first)
    assert held_bytes() == held
    assert held + live.peak <= cap + y.nbytes
    output, *rest = live.made
    assert (output.op, output.size) == ("new_empty", y.nbytes)
    chunks = sum(made.op == "empty_like" for made in rest)  # of tokens: the places of their rows
    assert chunks > 1
    assert max(made.size for made in rest if not made.dtype.is_floating_point) <= 8 * -(-tokens // chunks) * 8
    block_bytes = (256 + 2048) * 512 * 2  # hidden values, or the sums of 256 tokens
    assert [made.op for made in larger(rest, block_bytes)] == ["_grouped_mm"] * products * chunks
    some = [0, tokens // 2, tokens - 1]
    assert error(y[some], torch.stack([exact(block, token) for token in some])) < 4 * torch.finfo(BF16).eps


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("inner", [512, 2048])
def test_a_long_prompt_on_a_gpu(inner: int) -> None:
    """A device takes larger blocks, and they are counted.  Of fake tensors no workspace is held: it is fresh."""
    real = Block(BF16, 1, **SIZES | dict(inner=inner))
    with FakeTensorMode(), Unguarded():
        real.x, real.ids, real.weights = (
            torch.empty(65_536, t.shape[1], dtype=t.dtype, device="cuda") for t in (real.x, real.ids, real.weights)
        )
        real.operands = on_a_gpu(real.operands)
        y, live = real.live("torch_grouped", 256 * MB)
    assert y.nbytes < live.peak <= 256 * MB + y.nbytes
    assert live.peak > 200 * MB + y.nbytes, "the count is far from what is used"


def test_copied_weights_are_counted() -> None:
    """gather_bmm copies 2 MB for each of Granite's rows: it takes fewer tokens at a time, not more memory."""
    block = Block(BF16, 6, **SIZES)
    expected = block.run("gather_bmm")
    for cap, tokens in ((34 * MB, 2), (20 * MB, 1)):
        release()
        y, live = block.live("gather_bmm", cap)
        assert live.peak <= cap + y.nbytes
        assert max(made.size for made in live.made) == tokens * 8 * 2 * MB
        assert error(y, expected.double()) < torch.finfo(BF16).eps


PLAIN = [
    Case(dtype="bfloat16"),
    Case(dtype="bfloat16", weight_dtype="float32", ids_dtype="int32"),
    Case(dtype="bfloat16", accumulate="float32", out_dtype="float32"),
    Case(dtype="bfloat16", weight_on="input", split=True),
    Case(dtype="bfloat16", norm="rms", act_dtype="float32"),
    Case(dtype="bfloat16", act=("swiglu_oai", True), w13_bias=True, w2_bias=True, order="interleaved"),
]
OTHER = [Case(), Case(dtype="float16"), Case(dtype="bfloat16", compute_dtype="float32")]
TOKENS = 20_000  # three rows each, of 24 elements: a result of a megabyte in 16 bits


def named(case: Case) -> str:
    usual = Case()
    return ",".join(str(getattr(case, f)) for f in Case.__slots__ if getattr(case, f) != getattr(usual, f)) or "usual"


@pytest.mark.parametrize(
    "name, case",
    [
        *(pytest.param("sorted_loop", case, id=f"sorted_loop-{named(case)}") for case in PLAIN + OTHER),
        *(pytest.param("torch_grouped", case, id=f"torch_grouped-{named(case)}") for case in PLAIN),
        pytest.param("gather_bmm", PLAIN[1], id="gather_bmm"),
    ],
)
def test_whatever_the_mathematics(name: str, case: Case) -> None:
    """Ids outside [0, E) among them."""
    block = cases.make(case, tokens=TOKENS)

    def call() -> Tensor:
        with torch.no_grad():
            return run(kernel(name), block.x, block.ids, block.weights, block.experts, case.spec)

    first = call()
    with Live(block.x, block.ids, block.weights, *block.operands, *buffers._BUFFERS.by_place.values()) as live:
        y = call()
    assert torch.equal(y, first)
    output, *rest = live.made
    assert (output.op, output.size) == ("new_empty", y.nbytes)
    most = (256 + 2048) * 32 * 8  # a block of rows in the widest dtype
    assert most < y.nbytes
    assert {made.op for made in larger(rest, most)} == ({"_grouped_mm"} if name == "torch_grouped" else set())


# --- nothing waits


class Apart(TorchDispatchMode):
    """A copy from one device to another raises: the host waits for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device.type != results.device.type:
                raise AssertionError(f"a copy from {source.device} to {results.device}")
        return results


def on_a_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("tokens", [1, TOKENS, 40_000])  # 40 000: two blocks of a device
@pytest.mark.parametrize("case", PLAIN, ids=named)
@pytest.mark.parametrize("name", ["torch_grouped", "gather_bmm"])
def test_nothing_waits_whatever_the_mathematics(name: str, case: Case, tokens: int) -> None:
    """From the op's implementation on: the choice by token count, the weights' view, the kernel, the sum."""
    real = cases.make(case, tokens=min(tokens, 400) if name == "gather_bmm" else tokens)
    attrs = (str(case.spec), str(real.binding), Plan("view", (Range(1, None, name),)).op_string())
    with FakeTensorMode(), Apart(), Unguarded(), torch.no_grad():
        x, ids, weights, *operands = on_a_gpu([real.x, real.ids, real.weights, *real.operands])
        y = Dispatch().forward(Call(x, ids, weights, operands, attrs))
    assert (y.shape, y.device.type) == (real.x.shape, "cuda")


WAITING: dict[str, Callable[[Tensor], object]] = {
    "cpu": lambda t: t.cpu(),
    "copy": lambda t: torch.zeros(3).copy_(t),
    "item": lambda t: t[0].item(),
    "tolist": lambda t: t.tolist(),
    "bool": lambda t: bool(t.any()),
    "nonzero": torch.ops.aten.nonzero.default,
    "unique": lambda t: t.unique(),
    "bincount": lambda t: t.long().bincount(),
    "upload": lambda t: t + torch.tensor([1.0, 2.0, 3.0]).to(t.device),
}


@pytest.mark.parametrize("how", WAITING)
def test_the_check_for_waiting_sees(how: str) -> None:
    raised = (AssertionError, DataDependentOutputException, DynamicOutputShapeException)
    with FakeTensorMode(), Apart(), Unguarded(), pytest.raises(raised):
        WAITING[how](torch.empty(3, device="cuda"))
