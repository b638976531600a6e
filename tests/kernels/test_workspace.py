"""Workspaces: whose they are, how they grow, what they bound; what a call allocates besides.

Live bytes are counted below every op: the storages of its results, until the last tensor on them dies.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe_fx.kernels.experts  # noqa: F401  registers the kernels
import moe_fx.lowerings.dispatch as lowered
from moe_fx import ops
from moe_fx.binding import Operand, WeightBinding, bind
from moe_fx.kernels.build import run
from moe_fx.kernels.modular_kernel import workspace as buffers
from moe_fx.kernels.modular_kernel.workspace import ALIGNMENT, held_bytes, release, size_of, workspaces
from moe_fx.kernels.registry import kernel
from moe_fx.plan import Plan, Range
from moe_fx.spec import ExpertSpec, MoESpec

CPU = torch.empty(0)
ROOM = 1 << 30
BINDING = WeightBinding((Operand("w13"), Operand("w2")))


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    release()
    yield
    release()


def floats(size: int, most: int = ROOM, like: Tensor = CPU) -> Tensor:
    return workspaces([(size,)], torch.float32, like, most)[0]


# --- whose they are


def test_one_place_is_used_anew() -> None:
    first, second = floats(100), floats(100)
    assert first.data_ptr() == second.data_ptr()


def test_shapes_of_one_call_lie_apart() -> None:
    shapes = [(3, 5), (0,), (7,), (0, 4)]
    found = workspaces(shapes, torch.bfloat16, CPU, ROOM)
    assert [tuple(t.shape) for t in found] == shapes
    assert {t.dtype for t in found} == {torch.bfloat16}
    found[0].fill_(1)
    found[2].fill_(2)
    assert bool((found[0] == 1).all())
    assert found[2].data_ptr() - found[0].data_ptr() == ALIGNMENT == size_of([(3, 5)], torch.bfloat16)
    assert size_of(shapes, torch.bfloat16) == 2 * ALIGNMENT


def test_a_thread_has_its_own() -> None:
    mine = floats(100).fill_(1)
    seen: list[Any] = []

    def other() -> None:
        seen.append(held_bytes())
        seen.append(floats(100).fill_(2).clone())
        release()  # of that thread alone
        seen.append(held_bytes())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert (seen[0], seen[2]) == (0, 0)
    assert bool((seen[1] == 2).all())
    assert bool((mine == 1).all())
    assert floats(100).data_ptr() == mine.data_ptr()


def test_a_thread_that_ends_frees_its_own() -> None:
    died: list[Any] = []

    def other() -> None:
        floats(1000)
        (held,) = buffers._BUFFERS.by_place.values()
        died.append(weakref.ref(held))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    del thread
    assert died[0]() is None


def test_a_stream_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = [7]
    monkeypatch.setattr(buffers, "_place", lambda device: (device, stream[0]))
    first = floats(100).fill_(1)
    stream[0] = 8
    second = floats(100).fill_(2)
    assert first.data_ptr() != second.data_ptr()
    assert bool((first == 1).all())
    stream[0] = 7
    assert floats(100).data_ptr() == first.data_ptr()
    assert len(buffers._BUFFERS.by_place) == 2


def test_a_place_is_device_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        stream_id = 42

    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: asked.append(device) or Stream)
    gpu = torch.device("cuda", 1)
    assert buffers._place(gpu) == (gpu, 42)
    assert buffers._place(torch.device("cpu")) == (torch.device("cpu"), 0)
    assert asked == [gpu]


def test_tensors_of_a_compiler_are_not_kept() -> None:
    """A fake buffer would be handed to the next real call, and a real one to a fake call."""
    block = Block(torch.float32)
    expected = block.run("sorted_loop").clone()
    with FakeTensorMode():
        assert isinstance(floats(100, like=torch.empty(1)), FakeTensor)
    assert not any(isinstance(b, FakeTensor) for b in buffers._BUFFERS.by_place.values())
    release()
    with FakeTensorMode():
        floats(100, like=torch.empty(1))
    assert held_bytes() == 0
    assert torch.equal(block.run("sorted_loop"), expected)


def test_inference_mode_does_not_spoil_them() -> None:
    block = Block(torch.float32)
    with torch.inference_mode():
        expected = block.run("sorted_loop").clone()
    for _ in range(2):
        assert torch.equal(block.run("sorted_loop"), expected)


# --- how they grow


def test_growth_is_in_steps() -> None:
    """A new buffer for a larger call only, at most a quarter more than was asked for."""
    made = 0
    for size in range(1000, 200_000, 1000):
        before = held_bytes()
        floats(size)
        assert size * 4 <= held_bytes() <= size * 4 * 1.25 + ALIGNMENT
        made += held_bytes() != before
    assert made <= 4 * 8 + 1  # octaves from 4 KB to 800 KB, four steps each
    before = held_bytes()
    floats(5)
    assert held_bytes() == before
    release()
    assert held_bytes() == 0


def test_old_and_new_are_never_both_there() -> None:
    floats(1000)
    (old,) = map(weakref.ref, buffers._BUFFERS.by_place.values())
    seen: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.empty.memory_format:
                seen.append(old() is None)
            return func(*args, **(kwargs or {}))

    with Watch():
        floats(10_000)
    assert seen == [True]


@pytest.mark.parametrize("most", [1 << 20, 1_100_000, 1_234_567])
def test_no_more_is_held_than_the_bound(most: int) -> None:
    for size in (1000, most // 8, most // 4 - 64):
        floats(size, most)
        assert held_bytes() <= most
    before = held_bytes()
    large = floats(most, most)  # four times the bound: memory of one call
    assert large.numel() == most
    assert held_bytes() == before
    assert large.data_ptr() != floats(most, most).data_ptr()


# --- what a call allocates


@dataclass(frozen=True, slots=True)
class Made:
    """A storage that an op made: the op's name, bytes, dtype of the tensor on it."""

    op: str
    size: int
    dtype: torch.dtype


class Live(TorchDispatchMode):
    """Bytes of storages that ops made, now and at most, without those of ``known``; made: every one of them."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        self.made: list[Made] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            if isinstance(t, Tensor):
                self._seen(t.untyped_storage(), str(func).split(".")[1], t.dtype)
        return results

    def _seen(self, storage: Any, op: str, dtype: torch.dtype) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.alive:
            return
        self.alive[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        self.made.append(Made(op, size, dtype))
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)


class Block:
    """A layer with weights, tokens and their routing: all to valid experts."""

    def __init__(
        self, dtype: torch.dtype, tokens: int = 300, hidden: int = 8, inner: int = 8, experts: int = 4, top_k: int = 2
    ):
        draw = torch.Generator().manual_seed(0)
        self.spec = MoESpec(top_k, ExpertSpec(experts, hidden, inner))
        self.x = torch.randn(tokens, hidden, generator=draw).to(dtype)
        self.ids = torch.randint(0, experts, (tokens, top_k), generator=draw)
        self.weights = torch.rand(tokens, top_k, generator=draw)
        w13, w2 = (torch.randn(experts, *s, generator=draw).to(dtype) for s in ((2 * inner, hidden), (hidden, inner)))
        self.operands = [w13, w2]

    def run(self, name: str, room: int = ROOM) -> Tensor:
        experts = bind(BINDING, self.operands, self.spec.expert.experts)
        with torch.no_grad():
            return run(kernel(name), self.x, self.ids, self.weights, experts, self.spec, room)

    def live(self, name: str, room: int = ROOM) -> tuple[Tensor, Live]:
        with Live(self.x, self.ids, self.weights, *self.operands, *buffers._BUFFERS.by_place.values()) as live:
            y = self.run(name, room)
        return y, live


def test_the_count_counts() -> None:
    x = torch.ones(10)
    with Live(x) as live:
        y = x + 1
        z = y.view(2, 5)
        del y
        assert live.now == 40
        del z
        assert live.now == 0
        _ = x * x * x
    assert (live.peak, live.made) == (80, [Made("add", 40, x.dtype)] + 2 * [Made("mul", 40, x.dtype)])


@pytest.mark.parametrize(
    "name, tokens, room",
    [("sorted_loop", 65_536, 1 << 20), ("torch_grouped", 65_536, 1 << 20), ("gather_bmm", 16_384, 1 << 18)],
)
def test_memory_is_bounded(name: str, tokens: int, room: int) -> None:
    """Many tokens in a small room: whatever a call holds and makes at one time, but for the result, lies in it, and in
    what a block of 2048 rows takes: here some 48 bytes each."""
    block = Block(torch.bfloat16, tokens)
    y, live = block.live(name, room)
    assert held_bytes() <= room
    assert y.nbytes == tokens * 8 * 2
    assert live.peak <= y.nbytes + room + 2048 * 48  # the workspaces are among what it made
    _, unbounded = block.live(name)
    assert unbounded.peak > live.peak + 4 * room, "the bound bounds nothing"


def test_training_holds_no_more_than_the_bound() -> None:
    """A forward that keeps its products is not chunked; what exceeds the bound goes when the call ends."""
    block, kept = Block(torch.float32, tokens=20_000), []
    experts = bind(BINDING, block.operands, 4)
    with torch.no_grad():
        run(kernel("sorted_loop"), block.x, block.ids, block.weights, experts, block.spec, 1 << 20, keep=kept)
    assert kept[0].shape == (40_000, 16)
    assert held_bytes() == 0


# In the order of a call: the result; masks, keys, order and counts of the rows; for each chunk, its tokens and hidden
# values; the places of the rows; for each block of tokens, what EmbeddingBag asks for and returns: the sums and three
# small ones.
ONCE = ["new_empty", "ge", "lt", "bitwise_and", "scalar_tensor", "where", "sort", "sort", "bincount"]
CHUNK = ["floor_divide", "silu", "mul"]
PLACES = ["empty_like", "arange"]
BLOCK = ["arange", *["_embedding_bag_forward_only"] * 4]


def test_the_steady_path() -> None:
    """From the second call on: of the size of the result there is the result alone."""
    block = Block(torch.bfloat16, tokens=2500, hidden=128, inner=64, experts=16)
    block.weights = block.weights.bfloat16()  # wider ones are split into two of 16 bits
    first, cold = block.live("sorted_loop")
    assert sum(made.op == "empty" for made in cold.made) == 1  # the workspaces
    for _ in range(3):
        y, live = block.live("sorted_loop")
        assert torch.equal(y, first)
        ops_made = [made.op for made in live.made]
        chunks, blocks = ops_made.count("silu"), -(-2500 * 2 // 2048)
        assert chunks > 5
        assert ops_made == ONCE + CHUNK * chunks + PLACES + BLOCK * blocks
        assert [made.op for made in live.made if made.size >= y.nbytes] == ["new_empty"]
        assert live.peak < 2 * y.nbytes


def test_workspaces_serve_products_of_another_dtype() -> None:
    """x in float32 over weights in bfloat16: the products lie in the same bytes."""
    block = Block(torch.bfloat16, tokens=200, hidden=64, inner=32)
    block.x = block.x.float()
    block.run("sorted_loop")
    y, live = block.live("sorted_loop")
    rows = 400 * 64 * 2  # in bfloat16
    assert all(made.size < rows for made in live.made if "empty" in made.op and made.size != y.nbytes)


# --- threads


def trained(block: Block, steps: int) -> list[Tensor]:
    """Results and gradients of so many forward and backward passes through the ops."""
    x, *operands = (t.clone().requires_grad_() for t in (block.x, *block.operands))
    plan = Plan("view", (Range(1, None, "sorted_loop"),), backward="save").op_string()
    found: list[Tensor] = []
    for _ in range(steps):
        y = torch.ops.moe_fx.experts(x, block.ids, block.weights, operands, str(block.spec), str(BINDING), plan)
        found += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *operands])]
    return found


def test_training_beside_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread trains while another runs forward: each gets what it gets alone."""
    monkeypatch.setattr(ops, "_implementation", lowered.Dispatch())
    one, two = Block(torch.float32, tokens=400, hidden=64), Block(torch.float32, tokens=300, hidden=64, inner=48)
    steps = 30
    alone: list[list[Tensor]] = [trained(one, 1), [two.run("sorted_loop")]]
    work: list[Callable[[], list[Tensor]]] = [
        lambda: trained(one, steps),
        lambda: [two.run("sorted_loop") for _ in range(3 * steps)],
    ]
    results: dict[int, list[Tensor]] = {}
    start = threading.Barrier(2)

    def go(i: int) -> None:
        start.wait()
        results[i] = work[i]()

    threads = [threading.Thread(target=go, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert len(results[i]) == len(expected) * (steps if i == 0 else 3 * steps)
        for j, found in enumerate(results[i]):
            assert torch.equal(found, expected[j % len(expected)])
