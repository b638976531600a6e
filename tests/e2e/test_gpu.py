"""What only a GPU shows: whole models on CUDA against eager float32, CUDA graphs, streams, and that nothing waits.

All of it is skipped where there is no CUDA device.  Routers are sharp (`zoo` draws them so): a rounding seldom tips a
routing over in float32, which is what models are compared in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx
import moe_fx.kernels.experts
from moe_fx.kernels.build import run
from moe_fx.kernels.registry import kernel
from moe_fx.reference import experts_forward
from tests.kernels.cases import Case, assert_as_exact, make
from tests.zoo import build, unavailable

from .helpers import Block, all_fused, assert_close, compiled, relative, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these tests need one"),
]
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "olmoe")
WIDE = dict(hidden_size=64, head_dim=16)  # a zoo model at sizes whose rows start at multiples of 16 bytes
BOUND = 1e-4  # float32 both, in another order of summation


class Loop(nn.Module):
    """A list of experts, each on the rows that chose it."""

    def __init__(self, experts: int = 6, hidden: int = 64, inner: int = 32, top_k: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.router = nn.Linear(hidden, experts, bias=False)
            self.experts = nn.ModuleList(
                nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in sizes.items()})
                for sizes in [{"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}] * experts
            )
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            rows = x[token]
            out = expert["down"](F.silu(expert["gate"](rows)) * expert["up"](rows))
            y.index_add_(0, token, out * weights[token, slot, None])
        return y


def on_gpu(inputs: Any) -> dict[str, Any]:
    return {name: v.cuda() if isinstance(v, Tensor) else v for name, v in inputs.items()}


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Any wait of the host for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def kernels(report: Any) -> set[str]:
    """Of all ranges of all plans."""
    return {r.kernel for site in report.sites for r in site.plan.ranges}


# --- whole models against eager float32 ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_eagers(name: str, inner: str) -> None:
    assert unavailable(name) is None
    sample = build(name, config=WIDE)
    expected = sample.output(sample.model(**sample.inputs))[0]  # on the CPU, which shares no code with the GPU
    model = sample.model.cuda()
    ours = sample.output(compiled(model, inner_backend=inner)(**on_gpu(sample.inputs)))[0]
    all_fused(sample.family.moe_layers)
    assert_close(ours.cpu(), expected, BOUND, name)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_in_bfloat16(name: str) -> None:
    """Not further from float32 than the original in bfloat16, by the rule of all kernels."""
    exact = build(name, config=WIDE)
    truth = exact.output(exact.model(**exact.inputs))[0].cuda()
    sample = build(name, dtype=torch.bfloat16, config=WIDE)
    model, inputs = sample.model.cuda(), on_gpu(sample.inputs)
    theirs = sample.output(model(**inputs))[0]
    ours = sample.output(compiled(model, inner_backend="inductor")(**inputs))[0]
    all_fused(sample.family.moe_layers)
    assert_as_exact(ours, theirs, truth.double(), torch.finfo(torch.bfloat16).eps, name)


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_loop_over_a_list_of_experts(inner: str) -> None:
    model, x = Loop(), tokens(37, hidden=64)
    expected = model(x)
    ours = compiled(model.cuda(), inner_backend=inner)(x.cuda())
    all_fused(1)
    assert_close(ours.cpu(), expected, BOUND)


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step(name: str, inner: str) -> None:
    sample = build(name, config=WIDE)
    model = sample.model.train()

    def gradients(target: Any, inputs: Any) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        out = sample.output(target(**inputs))[0]
        pattern = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device)
        (out * pattern).mean().backward()
        return {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}

    theirs = gradients(model, sample.inputs)  # on the CPU
    ours = gradients(compiled(model.cuda(), inner_backend=inner), on_gpu(sample.inputs))
    all_fused(sample.family.moe_layers)
    assert ours.keys() == theirs.keys()
    assert any("expert" in n for n in ours)
    scale = max(float(g.norm()) for g in theirs.values())
    for label, expected in theirs.items():
        if float(expected.norm()) > 1e-6 * scale:
            assert_close(ours[label], expected, 10 * BOUND, label)


# --- CUDA graphs ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 16])
def test_reduce_overhead_follows_the_routing(count: int) -> None:
    """Recorded with one input, replayed with others: the same as without a graph."""
    model = Block(hidden=64, inner=32).cuda().bfloat16()
    chosen = dict(inner_backend="inductor", kernel="triton", dynamic=False)
    plain = compiled(copy.deepcopy(model), **chosen)
    graphed = compiled(model, mode="reduce-overhead", **chosen)
    routes = set()
    for seed in range(6):
        x = tokens(count, hidden=64, seed=seed, dtype=torch.bfloat16).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        ours = graphed(x).clone()
        assert torch.equal(ours, plain(x)), seed
        assert relative(ours.float(), model(x).float()) <= 3e-2
        routes.add(str(model.route(x)[1].tolist()))
    assert len(routes) > 1, "the routing never changed"


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 9, 300])
def test_a_captured_kernel_follows_the_routing(count: int) -> None:
    case = Case(dtype="bfloat16")
    blocks = [make(case, seed, "cuda", tokens=count) for seed in range(3)]
    experts = blocks[0].experts
    inputs = [(b.x, b.ids, b.weights) for b in blocks]
    expected = [run(kernel("triton"), *one, experts, case.spec) for one in inputs]
    places = [t.clone() for t in inputs[0]]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(kernel("triton"), *places, experts, case.spec)
    for one, wanted in zip(inputs[::-1], expected[::-1], strict=True):
        for place, t in zip(places, one, strict=True):
            place.copy_(t)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, wanted)


# --- nothing waits, and the choice ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 9, 700])
@pytest.mark.parametrize("name", ["triton", "torch_grouped"])
def test_the_host_never_waits(name: str, count: int) -> None:
    case = Case(dtype="bfloat16")
    block = make(case, device="cuda", tokens=count)
    call = lambda: run(kernel(name), block.x, block.ids, block.weights, block.experts, case.spec)  # noqa: E731
    expected = call()  # compiles
    with nothing_waits():
        y = call()
    assert torch.equal(y, expected)


@torch.no_grad()
def test_the_host_never_waits_for_a_compiled_block() -> None:
    model, x = Block(hidden=64, inner=32).cuda().bfloat16(), tokens(40, hidden=64, dtype=torch.bfloat16).cuda()
    ours = compiled(model, inner_backend="inductor", dynamic=False)
    expected = ours(x)
    with nothing_waits():
        y = ours(x)
    assert torch.equal(y, expected)


def test_the_watch_for_waits_can_fail() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError), nothing_waits():
        x.sum().item()


@torch.no_grad()
def test_explain_names_triton() -> None:
    sample = build("qwen3_moe", dtype=torch.bfloat16, config=WIDE)
    report = moe_fx.explain(sample.model.cuda(), **on_gpu(sample.inputs))
    assert report.num_fused == sample.family.moe_layers
    assert "triton" in kernels(report), str(report)
    assert "triton" in str(report)


# --- few tokens, and two streams -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["triton", "torch_grouped"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_tokens(count: int, name: str) -> None:
    case = Case(dtype="bfloat16")
    block = make(case, device="cuda", tokens=count)
    y = run(kernel(name), block.x, block.ids, block.weights, block.experts, case.spec)
    assert (y.shape, y.dtype, y.device.type) == (block.x.shape, torch.bfloat16, "cuda")
    if count:
        exact = block.exact()
        truth = experts_forward(exact.x, exact.ids, exact.weights, exact.experts, case.exact_spec)
        usual = experts_forward(block.x, block.ids, block.weights, block.experts, case.spec)
        assert_as_exact(y, usual, truth, case.eps)


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens_compiled(count: int) -> None:
    model = Block(hidden=64, inner=32).cuda()
    ours = compiled(model, inner_backend="inductor")
    for size in (5, count):
        x = tokens(size, hidden=64).cuda()
        y = ours(x)
        assert y.shape == x.shape
        if size:
            assert_close(y, model(x), BOUND)


@torch.no_grad()
@pytest.mark.parametrize("name", ["triton", "torch_grouped"])
def test_two_streams_at_once(name: str) -> None:
    """Each has workspaces of its own: results are those of one after the other."""
    case = Case(dtype="bfloat16")
    blocks = [make(case, seed, "cuda", tokens=600) for seed in range(2)]
    call = lambda b: run(kernel(name), b.x, b.ids, b.weights, b.experts, case.spec)  # noqa: E731
    expected = [call(b) for b in blocks]
    streams = [torch.cuda.Stream() for _ in blocks]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for block, stream, ys in zip(blocks, streams, found, strict=True):
            with torch.cuda.stream(stream):
                ys.append(call(block))
    torch.cuda.synchronize()
    for ys, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(y, wanted) for y in ys)
