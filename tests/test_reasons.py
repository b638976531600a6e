"""Every reason code is given by something: a small model, a planted fault or a kernel that can do nothing."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx
from moe_fx.kernels.capability import Capability
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEParallelConfig
from moe_fx.kernels.experts.torch_experts import TorchExperts
from moe_fx.kernels.ladder import ladder
from moe_fx.kernels.registry import KERNELS, Cost, Kernel
from moe_fx.oracle.request import Request
from moe_fx.oracle.vetoes import Case, vetoes
from moe_fx.reasons import CODES, Reject
from tests.e2e.helpers import Block, compiled, fresh, tokens


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fresh()


class Variant(Block):
    """The block, with one step replaced."""

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, routing weights and ids."""
        rows = x.reshape(-1, self.hidden)
        return rows, *self.route(rows)

    def up(self, rows: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        chosen = rows.repeat_interleave(self.top_k, 0).unsqueeze(-1)
        gate, up = torch.bmm(self.w13[flat], chosen).squeeze(-1).chunk(2, -1)
        return gate, up

    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def combine(self, out: Tensor, weights: Tensor, ids: Tensor) -> Any:
        return (out.view(-1, self.top_k, self.hidden) * weights.unsqueeze(-1)).sum(1)

    def forward(self, x: Tensor) -> Any:
        rows, weights, ids = self.select(x)
        flat = ids.reshape(-1)
        inner = self.between(*self.up(rows, flat))
        return self.combine(torch.bmm(self.w2[flat], inner.unsqueeze(-1)).squeeze(-1), weights, ids)


class NoExperts(Variant):
    def forward(self, x: Tensor) -> Tensor:
        _, weights, ids = self.select(x)
        return x * (weights * ids).sum(-1, keepdim=True)


class SoftMixture(Variant):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("th,eih->tei", x, self.w13).chunk(2, -1)
        out = torch.einsum("tei,ehi->teh", F.silu(gate) * up, self.w2)
        return torch.einsum("te,teh->th", F.linear(x, self.router).softmax(-1), out)


class NotCombined(Variant):
    def combine(self, out: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return out.view(-1, self.top_k, self.hidden) * weights.unsqueeze(-1)


class Escapes(Variant):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, weights, ids = self.select(x)
        flat = ids.reshape(-1)
        inner = self.between(*self.up(rows, flat))
        out = torch.bmm(self.w2[flat], inner.unsqueeze(-1)).squeeze(-1)
        return self.combine(out, weights, ids), inner


class TwoInputs(Variant):
    def up(self, rows: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        gate, _ = super().up(rows, flat)
        _, up = super().up(rows.roll(1, 0), flat)
        return gate, up


class Random(Variant):
    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.dropout(F.silu(gate) * up, 0.5, training=True)


class ModeInside(Variant):
    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        with torch.no_grad():
            gate = F.silu(gate)
        return gate * up


class OnlyUp(Variant):
    """As many rows out as in: one projection per routed row, summed."""

    def forward(self, x: Tensor) -> Tensor:
        rows, weights, ids = self.select(x)
        gate, up = self.up(rows, ids.reshape(-1))
        out = torch.cat([gate, up], -1)[:, : self.hidden]
        return self.combine(out, weights, ids)


class UnknownActivation(Variant):
    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.sin(gate) * up


class PassesThroughFloat8(Variant):
    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        return (F.silu(gate) * up).to(torch.float8_e5m2).to(torch.float32)


class Halves(Variant):
    """Each half of a row goes to one expert: as many values out as in, but the experts are of size H / 2."""

    def __init__(self) -> None:
        super().__init__(hidden=16)
        generator = torch.Generator().manual_seed(0)
        self.w13 = nn.Parameter(torch.randn(6, 24, 8, generator=generator))
        self.w2 = nn.Parameter(torch.randn(6, 8, 12, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        flat = ids.reshape(-1)
        gate, up = torch.bmm(self.w13[flat], x.view(-1, 8, 1)).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.w2[flat], self.between(gate, up).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(x.shape)


class DependsOnTheNumberOfTheExpert(Variant):
    def combine(self, out: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        scaled = out.view(-1, self.top_k, self.hidden) * (ids + 1).unsqueeze(-1)
        return (scaled * weights.unsqueeze(-1)).sum(1)


class StopsAGradient(Variant):
    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.detach()) * up


class NeverSeenFromBothSides(Variant):
    """A capacity that no sample can reach."""

    def combine(self, out: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().combine(out * (ids.reshape(-1, 1).cumsum(0) < 1 << 40), weights, ids)


class FailsOnSamples(Variant):
    """Fine on the user's inputs, an error on large ones."""

    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        room = (1e3 - gate.abs().amax()).view(1, 1)
        return F.silu(gate) * up * torch.linalg.cholesky(room).sign()


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "find.no_experts": (NoExperts, False),
    "find.no_routing": (SoftMixture, False),
    "find.no_exit": (NotCombined, False),
    "find.escape": (Escapes, False),
    "find.inputs": (TwoInputs, False),
    "find.effect": (Random, False),
    "find.autocast": (ModeInside, True),
    "match.products": (OnlyUp, False),
    "match.activation": (UnknownActivation, False),
    "match.shapes": (Halves, False),
    "match.weights": (PassesThroughFloat8, False),
    "verify.values": (DependsOnTheNumberOfTheExpert, False),
    "verify.gradients": (StopsAGradient, True),
    "verify.coverage": (NeverSeenFromBothSides, False),
    "verify.run": (FailsOnSamples, False),
}
VETOES = {code for code in CODES if code.startswith("veto.")}
ELSEWHERE = {"verify.rounding", "verify.memory", "internal"}
ELSEWHERE |= {"capture.untrusted", "capture.unavailable", "capture.data_dependent"}


def reasons(model: Any, *arguments: Tensor, grad: bool = False, **options: Any) -> list[Reject]:
    """Every reject of the report after one run, whose result must be eager's."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = compiled(model, **options)(*arguments)
        torch.manual_seed(0)
        expected = model(*arguments)
    random = isinstance(model, Random)
    for mine, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (results, expected)), strict=True):
        assert random or torch.allclose(mine, other, rtol=1e-4, atol=1e-5)
    report = moe_fx.last_report()
    assert report.num_fused == 0, [str(site.spec) for site in report.sites]
    return [r for site in report.sites for r in site.rejects]


def test_every_code_is_covered() -> None:
    assert MODELS.keys() | VETOES | ELSEWHERE == CODES.keys()


@pytest.mark.parametrize("code", MODELS)
def test_a_model_gives(code: str) -> None:
    kind, grad = MODELS[code]
    found = reasons(kind(), tokens(7), grad=grad)
    assert code in {r.code for r in found}, [str(r) for r in found]


@pytest.mark.parametrize("code", MODELS)
def test_with_gradients_too(code: str) -> None:
    kind, _ = MODELS[code]
    found = reasons(kind(), tokens(7), grad=True)
    assert code in {r.code for r in found}, [str(r) for r in found]


@pytest.mark.parametrize("code", MODELS)
def test_a_reason_has_a_text_and_a_place(code: str) -> None:
    kind, grad = MODELS[code]
    reasons(kind(), tokens(7), grad=grad)
    sites = moe_fx.last_report().sites
    assert all(site.source for site in sites), [s.note for s in sites]
    assert all("test_reasons.py" in site.source or "helpers.py" in site.source for site in sites)
    assert all(r.text and "\n" not in r.text for site in sites for r in site.rejects)
    assert all("torch.return_types" not in site.note for site in sites)


def test_a_kernel_that_can_do_nothing_gives_every_veto() -> None:
    nothing: frozenset[Any] = frozenset()
    capability = Capability(
        devices=nothing, dtypes=nothing, activations=nothing, forms=nothing, biases=False, norms=nothing,
        weight_on=nothing, act_dtypes=nothing, compute_dtypes=nothing, accumulate=nothing, out_dtypes=nothing,
        backward="", compiled=True, packages=frozenset({"no_such_package"}), gated=nothing, size_multiple=1 << 20,
        schemes=nothing, all2all=nothing, monolithic=True,
    )  # fmt: skip
    fresh()
    with torch.no_grad():
        compiled(Block())(tokens(7))
    (site,) = moe_fx.last_report().sites
    assert site.spec is not None
    spec = replace(site.spec, expert=replace(site.spec.expert, w2_bias=True, norm="rms"))
    from moe_fx.binding import parse_binding
    from moe_fx.hardware import detect

    kernel = Kernel("nothing", TorchExperts, capability, Cost("all", lambda *_: 1), 1)
    request = Request("float32", training=True, kernel="another")
    binding = parse_binding(site.binding)
    case = Case(spec, binding, request, detect(torch.device("cpu")), kernel, "transposed")
    spread = FusedMoEParallelConfig.make(1, 2, use_ep=True, all2all_backend="deepep_low_latency")
    config = FusedMoEConfig.of(
        spec, torch.float32, moe_parallel_config=spread, is_lora_enabled=True, batch_invariant=True
    )
    question = replace(case.question, config=config, batched=True)
    graphs = replace(case, device=replace(case.device, kind="cuda"), request=replace(request, captured=True))
    assert {r.code for r in (*vetoes(case), *vetoes(graphs), *ladder(question))} == VETOES


def test_a_kernel_that_is_less_exact_gives_verify_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fx.lowerings import dispatch

    for name, kernel in list(KERNELS.items()):

        class Coarse(kernel.experts):  # type: ignore[name-defined]
            def compute(self, *args: Any) -> Tensor:
                return super().compute(*args) * 1.001

        monkeypatch.setitem(KERNELS, name, replace(kernel, experts=Coarse))
    dispatch._parsed.cache_clear()
    try:
        found = reasons(Block(), tokens(7))
    finally:
        dispatch._parsed.cache_clear()
    assert found[0].code == "verify.rounding", [str(r) for r in found]


def test_a_planted_fault_gives_internal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(sys.modules["moe_fx.backend"], "propose", fail)
    assert {r.code for r in reasons(Block(), tokens(7))} == {"internal"}


def test_a_loop_that_is_not_its_traceable_form_gives_capture_untrusted(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fx.passes.capture import hugging_face
    from tests.zoo.samples import build, experts_modules

    sample = build("mixtral", "eager", config=dict(num_hidden_layers=1))
    kind = type(next(iter(experts_modules(sample).values())))
    original = kind.forward.__wrapped__
    monkeypatch.setattr(kind.forward, "__wrapped__", lambda *args: original(*args) * 1.01)
    monkeypatch.setattr(hugging_face, "_TRUSTED", {})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(sample.model, fullgraph=False)(**sample.inputs)
    found = [(site.fqn, r) for site in moe_fx.last_report().sites for r in site.rejects]
    named = {(fqn, r) for fqn, r in found if r.code == "capture.untrusted"}.pop()
    assert "float32" in named[1].text
    assert named[0], "which module?"


@pytest.mark.parametrize("stage", ["propose", "verify"])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), "a real one"], ids=str)
def test_a_block_too_large_to_verify_gives_verify_memory(
    monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception | str
) -> None:
    def fail(*_: object) -> None:
        if isinstance(error, str):
            torch.empty(1 << 60)
        raise error  # type: ignore[misc]

    monkeypatch.setattr(sys.modules["moe_fx.backend"], stage, fail)
    (found,) = reasons(Block(), tokens(7))
    assert (found.code, found.where) == ("verify.memory", {"propose": "match"}.get(stage, stage))


def test_a_torch_without_the_hook_gives_capture_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["moe_fx.backend"], "_UNAVAILABLE", "inline_call is gone")
    found = reasons(SoftMixture(), tokens(7))
    assert [r.text for r in found if r.code == "capture.unavailable"] == [
        "no loop could be made traceable: inline_call is gone"
    ]
    fresh()
    with torch.no_grad():
        compiled(Block())(tokens(7))
    assert moe_fx.last_report().num_fused == 1  # what needs no hook is fused without a word


def test_an_unregistered_code_is_an_error() -> None:
    with nullcontext(), pytest.raises(KeyError, match="not registered"):
        Reject("no.such", "text")
