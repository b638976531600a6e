"""Gradients and training runs equal eager's, for every experts class that is fused.

An expert that no token reached: eager may leave ``grad=None`` on its own parameters (a list of Linear), the fused op
gives zeros.  AdamW's weight decay then moves such a parameter where eager leaves it: documented, and held below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx
from tests.zoo.samples import Sample, build, unavailable

from .helpers import Block, ListBlock, Stack, all_fused, assert_close, compiled, relative, tokens, twin

# experts class → families
FAMILIES = {
    "E1": ("mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe"),
    "E1t": ("aria",),
    "E6": ("gpt_oss", "minimax_m3_vl"),
    "E1c": ("deepseek_v4",),
    "E1a": ("gemma4",),
    "E2": ("nemotron_h",),
    "E1f": ("beam",),
    "E1n": ("muse_spark",),
    "E1s": ("inkling2",),
    "E9": ("llama4",),
    "E5": ("jetmoe",),
}
SLOW = {"nemotron_h", "inkling2", "deepseek_v3", "ernie4_5_moe"}  # whose attention or mixers take long to capture
CASES = [
    pytest.param(name, id=f"{kind}-{name}", marks=[pytest.mark.slow] if name in SLOW else [])
    for kind, names in FAMILIES.items()
    for name in names
]
BOUND = 1e-4


def loss_of(sample: Sample, model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """A loss to which every token contributes with its own sign and size."""
    total = torch.zeros(())
    for out in sample.output(model(**inputs)):
        pattern = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        total = total + (out.float() * pattern).mean()
    return total


def gradients(sample: Sample, model: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor | None]:
    """By parameter, and of the embeddings that enter ("input")."""
    sample.model.zero_grad(set_to_none=True)
    embedded: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.retain_grad()
            embedded.append(out)

    hook = None
    if model is sample.model:
        hook = sample.model.get_input_embeddings().register_forward_hook(keep)
    loss_of(sample, model, inputs).backward()
    if hook is not None:
        hook.remove()
    return {n: None if p.grad is None else p.grad.clone() for n, p in sample.model.named_parameters()}


def through_embeddings(sample: Sample) -> dict[str, Any] | None:
    """The inputs with embeddings that want a gradient in place of token ids, where the family takes them."""
    inputs = dict(sample.inputs)
    ids = inputs.pop("input_ids", None)
    if ids is None or sample.family.name in NEEDS_IDS:
        return None
    with torch.no_grad():
        embedded = sample.model.get_input_embeddings()(ids)
    return {**inputs, "inputs_embeds": embedded.clone().requires_grad_()}


NEEDS_IDS = {"deepseek_v4", "gemma4"}  # hash routes and per-layer inputs are looked up by token id


def check(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    scale = max(float(g.norm()) for g in theirs.values() if g is not None)
    for name, expected in theirs.items():
        mine = ours[name]
        if expected is None:
            assert mine is None or not mine.any(), f"{name}: eager has no gradient"
            continue
        assert mine is not None, f"{name}: no gradient, eager has one"
        if float(expected.norm()) > 1e-7 * scale:
            assert_close(mine, expected, BOUND, name)
        else:
            assert float((mine - expected).norm()) <= 1e-7 * scale, name


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_eagers(name: str, train: bool) -> None:
    assert unavailable(name) is None
    sample = build(name)
    sample.model.train(train)
    model = compiled(sample.model)

    def call(target: Any, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        torch.manual_seed(5)  # dropout and jitter, where training has them
        return gradients(sample, target, inputs)

    theirs = call(sample.model, dict(sample.inputs))
    ours = call(model, dict(sample.inputs))
    left = [] if name == "jetmoe" else [s for s in moe_fx.last_report().sites if not s.fused]  # its MoA is no MoE
    assert not left
    assert moe_fx.last_report().num_fused == sample.family.moe_layers
    assert any("expert" in n and g is not None for n, g in theirs.items())
    check(ours, theirs)
    if (inputs := through_embeddings(sample)) is not None:
        x = inputs["inputs_embeds"]
        (expected,) = torch.autograd.grad(loss_of(sample, sample.model, inputs), x)
        (mine,) = torch.autograd.grad(loss_of(sample, model, inputs), x)
        assert_close(mine, expected, BOUND, "inputs_embeds")


@pytest.mark.parametrize("frozen", ["experts", "router", "all-but-experts", "first-layer"])
def test_frozen_parameters(frozen: str) -> None:
    sample = build("qwen3_moe")
    for name, p in sample.model.named_parameters():
        expert, router = ".experts." in name, ".gate." in name
        wanted = {"experts": not expert, "router": not router, "all-but-experts": expert}
        p.requires_grad_(wanted.get(frozen, "layers.0" not in name))
    theirs = gradients(sample, sample.model, dict(sample.inputs))
    ours = gradients(sample, compiled(sample.model), dict(sample.inputs))
    all_fused(2)
    assert [n for n, g in ours.items() if g is None] == [n for n, g in theirs.items() if g is None]
    check(ours, theirs)


@pytest.mark.parametrize("aux", [False, True])
def test_loss_with_labels_and_router_logits(aux: bool) -> None:
    sample = build("mixtral", config=dict(output_router_logits=aux, router_aux_loss_coef=0.1))
    inputs = {**sample.inputs, "labels": sample.inputs["input_ids"]}

    def run(model: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
        sample.model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        return loss, {n: None if p.grad is None else p.grad.clone() for n, p in sample.model.named_parameters()}

    (expected, theirs), (loss, ours) = run(sample.model), run(compiled(sample.model))
    all_fused(2)
    assert_close(loss, expected, 1e-5)
    check(ours, theirs)


def test_gradient_checkpointing() -> None:
    sample = build("qwen3_moe")
    sample.model.train()
    theirs = gradients(sample, sample.model, dict(sample.inputs))
    sample.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    ours = gradients(sample, compiled(sample.model), dict(sample.inputs))
    check(ours, theirs)
    all_fused(2)


def test_accumulation_over_batches() -> None:
    sample = build("qwen3_moe")
    model, calls = compiled(sample.model), [sample.inputs_of(2, n, seed=n) for n in (7, 9, 11)]

    def run(target: Any) -> dict[str, Tensor | None]:
        sample.model.zero_grad(set_to_none=True)
        for inputs in calls:
            loss_of(sample, target, inputs).backward()
        return {n: None if p.grad is None else p.grad.clone() for n, p in sample.model.named_parameters()}

    check(run(model), run(sample.model))
    all_fused(2)


def test_backward_twice_through_one_graph() -> None:
    model, x = Stack(), tokens(3, 7).requires_grad_()
    y = compiled(model)(x).square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)


# --- whole runs ------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
}
STEPS = 20


def curve(sample: Sample, model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for i in range(STEPS):
        inputs = sample.inputs_of(2, 11, seed=i % 4)
        optimizer.zero_grad()
        logits = sample.output(model(**inputs))[0]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_the_loss_curve_is_eagers(name: str, optimizer: str) -> None:
    ours, theirs = build(name), build(name)
    expected = curve(theirs, theirs.model, OPTIMIZERS[optimizer](theirs.model.parameters()))
    losses = curve(ours, compiled(ours.model), OPTIMIZERS[optimizer](ours.model.parameters()))
    all_fused(2)
    assert losses[-1] < 0.9 * losses[0], "nothing was learnt"
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[:3] == pytest.approx(expected[:3], rel=1e-5)


@pytest.mark.slow
def test_the_loss_curve_under_inductor() -> None:
    config = dict(num_hidden_layers=1)
    ours, theirs = build("mixtral", config=config), build("mixtral", config=config)
    expected = curve(theirs, theirs.model, OPTIMIZERS["adamw-fused"](theirs.model.parameters()))
    model = compiled(ours.model, inner_backend="inductor")
    losses = curve(ours, model, OPTIMIZERS["adamw-fused"](ours.model.parameters()))
    all_fused(1)
    assert losses == pytest.approx(expected, rel=1e-3)


# --- experts without tokens ------------------------------------------------------------------------------------------


class LoopBlock(ListBlock):
    """Runs only the experts that ``live`` names, so that eager has no gradient at all for the others."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        weights, ids = logits[:, : len(self.down) - 1].softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(rows)
        for e in range(len(self.down)):
            share = (weights * (ids == e)).sum(-1, keepdim=True)
            out = out + share * self.down[e](nn.functional.silu(self.gate[e](rows)) * self.up[e](rows))
        return out.view(x.shape)


def test_an_expert_without_tokens_has_zeros() -> None:
    model, x = LoopBlock(), tokens(3, 7)
    compiled(model)(x).square().sum().backward()
    all_fused(1)
    idle = [m[-1].weight.grad for m in (model.gate, model.up, model.down)]
    assert all(g is not None and not g.any() for g in idle)
    busy = [m[0].weight.grad for m in (model.gate, model.up, model.down)]
    assert all(g is not None and bool(g.any()) for g in busy)


def test_adamw_decays_an_expert_without_tokens_as_zeros_do() -> None:
    """Where eager leaves grad=None, AdamW does not touch the parameter; with zeros it decays it by lr * decay."""
    model = LoopBlock()
    before = twin(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    compiled(model)(tokens(3, 7)).square().sum().backward()
    optimizer.step()
    assert_close(model.down[-1].weight, before.down[-1].weight * 0.95, 1e-6)
    optimizer.zero_grad()
    model.down[-1].weight.grad = None
    kept = model.down[-1].weight.detach().clone()
    optimizer.step()
    assert relative(model.down[-1].weight, kept) == 0


class _OverwritesItsInput(Block):
    """Eager saves copies of the rows that experts read; the fused op would save the rows themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.route(x)
        rows = x * 1.0
        flat = ids.reshape(-1)
        chosen = rows.repeat_interleave(self.top_k, 0).unsqueeze(-1)
        gate, up = torch.bmm(self.w13[flat], chosen).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        y = (out.view(-1, self.top_k, self.hidden) * weights.unsqueeze(-1)).sum(1)
        rows.mul_(2.0)
        return y + rows


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_an_input_that_is_overwritten_later(inner: str) -> None:
    model, grads = _OverwritesItsInput(), []
    for target in (compiled(model, inner_backend=inner), model):
        x = tokens(7).requires_grad_()
        target(x).square().sum().backward()
        grads.append(x.grad)
    assert_close(grads[0], grads[1], 1e-5)
    with torch.no_grad():
        compiled(model)(tokens(7))
    all_fused(1)


def test_checkpointing_around_a_compiled_block() -> None:
    """What we run while compiling is not counted among what the caller saves."""
    from torch.utils.checkpoint import checkpoint

    model, x = Block(), tokens(7).requires_grad_()
    y = checkpoint(compiled(model), x, use_reentrant=False)
    y.square().sum().backward()
    all_fused(1)
    mine, x.grad = x.grad, None
    model(x).square().sum().backward()
    assert_close(mine, x.grad, 1e-5)
