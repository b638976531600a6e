"""options={"quantize": …}: what the codes take, in the making too, and who keeps them fresh."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moe_fx
from moe_fx.binding import Operand
from moe_fx.kernels.layouts import quantised
from moe_fx.quant import SCHEMES, scheme_of
from moe_fx.weights import STORE

from .helpers import Block, Stack, all_fused, assert_close, compiled, relative, tokens
from .rounding import BYTES, INDEPENDENT, SIZES, E, H, I, K, block, dense


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_bytes_are_those_of_the_store(name: str) -> None:
    model, scheme = Stack(lambda: Block(E, H, I, K), hidden=H), INDEPENDENT[name]
    compiled(model, quantize=name)(tokens(2, hidden=H))
    before = E * 3 * H * I * 4
    elements = E * 3 * H * I // (2 if scheme.element in ("int4", "e2m1", "nf4") else 1)
    scales = sum(rows // (scheme.group[0] or rows) * (cols // (scheme.group[1] or cols)) for rows, cols in SIZES)
    after = elements + E * (scales * BYTES[scheme.scale] + (2 * 4 if scheme.scale == "two" else 0))
    assert [(q.scheme, q.before, q.after) for q in (s.quantised for s in all_fused(2).sites)] == [
        (name, before, after)
    ] * 2
    assert STORE.bytes() == 2 * after


class Live(TorchDispatchMode):
    """The most bytes of storages that were alive at once, beyond those that were there."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = {t.untyped_storage()._cdata for t in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.device.type != "meta":
                storage = t.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, storage: int, size: int) -> None:
        self.seen.discard(storage)
        self.now -= size


@pytest.mark.parametrize("name", ["int8_w8a16", "int4_w4a16", "fp8_w8a8_tensor", "nvfp4"])
@torch.no_grad()
def test_one_expert_at_a_time(name: str) -> None:
    """Temporaries: float64 of a piece; of one matrix where it has one scale; of all experts never."""
    experts, rows, cols = 24, 1024, 512
    one = rows * cols
    bank = torch.randn(experts, rows, cols)
    layout = quantised.QuantisedLayout(scheme_of(name, cols, cols))
    with Live(bank) as live:
        out = layout.write(Operand("w2"), [bank], experts, [])
    held = sum(t.numel() * t.element_size() for t in out)
    assert held == layout.bytes(Operand("w2"), [bank], experts)
    piece = one if INDEPENDENT[name].group[0] == 0 or name == "nvfp4" else quantised.PIECE
    assert live.most >= held
    assert live.most - held <= 8 * 8 * piece < 8 * experts * one / 2


# --- staleness -------------------------------------------------------------------------------------------------------


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.w13.copy_(model.w13 * torch.linspace(0.5, 2, model.w13.shape[1])[:, None])


def fused_step(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()  # changes values, not versions


def behind(model: nn.Module) -> None:
    model.w2.data.mul_(torch.linspace(0.5, 2, H)[:, None])


@pytest.mark.parametrize("write", [in_place, fused_step, behind])
@pytest.mark.parametrize("name", ["fp8_w8a16", "nvfp4"])
@torch.no_grad()
def test_written_weights_are_quantised_anew_in_place(name: str, write: Callable[[nn.Module], None]) -> None:
    model, x = block().double(), tokens(5, hidden=H, dtype=torch.float64)
    run = compiled(model, quantize=name)
    before = run(x)
    (copy,) = STORE._copies.values()
    places = [b.data_ptr() for held in copy.buffers for b in held]
    with torch.enable_grad():
        write(model)
    if write is behind:
        assert torch.equal(run(x), before), "seen after all: the documentation can be relaxed"
        assert moe_fx.invalidate(Block()) == 0
        assert moe_fx.invalidate(model) == 1
    assert_close(run(x), dense(model, x, INDEPENDENT[name]), 1e-12)
    assert relative(run(x), before) > 1e-2
    assert [b.data_ptr() for held in copy.buffers for b in held] == places
    assert list(STORE._copies.values()) == [copy]


@torch.no_grad()
def test_models_share_nothing_and_take_their_codes_with_them() -> None:
    models, x = [block(seed).double() for seed in (1, 2)], tokens(5, hidden=H, dtype=torch.float64)
    runs = [compiled(m, quantize="int8_w8a16") for m in models]
    for run, model in zip(runs, models, strict=True):
        assert_close(run(x), dense(model, x, INDEPENDENT["int8_w8a16"]), 1e-12)
    both = STORE.bytes()
    in_place(models[0])
    for run, model in zip(runs, models, strict=True):
        assert_close(run(x), dense(model, x, INDEPENDENT["int8_w8a16"]), 1e-12)
    del run, model
    runs.pop()
    models.pop()
    torch._dynamo.reset()
    gc.collect()
    assert STORE.bytes() == both // 2
