"""options={"quantize": …}: what the schemes do to the numbers, in every storage, and what the report says of it.

Results are compared with the dense formula in float64 on matrices rounded by hand (``rounding``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import moe_fx
from moe_fx import MoEFxOptionError, MoEFxUnsupportedError
from moe_fx.kernels.layouts import quantised
from moe_fx.lowerings import quantising
from moe_fx.quant import SCHEMES
from moe_fx.report import Report
from moe_fx.weights import STORE

from .helpers import Block, ListBlock, Stack, all_fused, assert_close, compiled, relative, tokens, twin
from .quantised import BLOCKS
from .rounding import INDEPENDENT, E, Flat, H, I, Interleaved, K, Transposed, block, by_hand, dense, rounded


def sites(fused: int) -> list[Any]:
    return [site.quantised for site in all_fused(fused).sites]


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_the_result_is_that_of_the_rounded_formula(name: str) -> None:
    model = block().double()
    x = tokens(9, hidden=H, dtype=torch.float64)
    x[0] *= 30
    y = compiled(model, quantize=name)(x)
    assert_close(y, dense(model, x, INDEPENDENT[name]), 1e-12, name)
    assert relative(y, dense(model, x, None)) > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("piece", [1, 40_000])
@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_a_matrix_in_pieces_is_the_same(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one group of rows at least, the last piece smaller; w13 has 256 rows of 256, w2 256 of 128."""
    monkeypatch.setattr(quantised, "PIECE", piece)
    model, x = block().double(), tokens(9, hidden=H, dtype=torch.float64)
    assert_close(compiled(model, quantize=name)(x), dense(model, x, INDEPENDENT[name]), 1e-12, name)


class Narrow(ListBlock):
    """Products in bfloat16, the rest in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.linear(x, self.router.weight.float()).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(x)
        for e, down in enumerate(self.down):
            token, slot = torch.where(ids == e)
            h = x[token].to(torch.bfloat16)
            y = down(F.silu(self.gate[e](h)) * self.up[e](h)).float()
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


@torch.no_grad()
def test_products_stay_in_the_dtype_of_the_weights() -> None:
    model, x = Narrow().bfloat16(), tokens(33)
    y = compiled(model, quantize="int8_w8a16")(x)
    (site,) = all_fused(1).sites
    assert "expert.compute_dtype=bfloat16" in str(site.spec)
    usual = rounded(model, INDEPENDENT["int8_w8a16"])(x)
    truth = ListBlock.forward(rounded(twin(model).double(), INDEPENDENT["int8_w8a16"]), x.double())
    assert 1e-4 < relative(y, truth) <= 2 * relative(usual, truth) + 4 * torch.finfo(torch.bfloat16).eps


# weights alone: no rounding of an input can go the other way
@pytest.mark.parametrize("name", [name for name, scheme in INDEPENDENT.items() if scheme.inputs is None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_rounding_of_the_models_dtype_is_within_the_tolerance_rule(name: str, dtype: torch.dtype) -> None:
    model, scheme = block().to(dtype), INDEPENDENT[name]
    x = tokens(33, hidden=H, dtype=dtype)
    y = compiled(model, quantize=name)(x)
    assert y.dtype == dtype
    weights, ids = model.route(x)
    exact, usual = twin(model).double(), rounded(model, scheme)
    exact.route = lambda _: (weights.double(), ids)  # type: ignore[method-assign]
    truth = dense(exact, x.double(), scheme)
    assert relative(y, truth) <= 2 * relative(usual(x), truth) + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_the_reported_error_is_what_rounding_propagates_to(name: str) -> None:
    """To first order, for gate and up of size 1: y² has 2.07 parts of the up product's error and one of the down's.

    silu(g) u: relative variance e² (1 + E[silu'(g)²] / E[silu(g)²]) = e² (1 + 0.380 / 0.356) for normal g and u.
    """
    scheme, model = INDEPENDENT[name], Block(E, H, I, K)
    compiled(model, quantize=name)(tokens(9, hidden=H))
    (found,) = sites(1)
    draw = torch.Generator().manual_seed(5)
    g, u = (torch.randn(64, I, generator=draw, dtype=torch.float64) for _ in range(2))

    def part(m: Tensor, group: tuple[int, int] | None) -> float:
        return 0.0 if group is None else relative(by_hand(m, scheme.element, group, scheme.scale), m) ** 2

    x = torch.randn(4, H, generator=draw, dtype=torch.float64)
    up = part(model.w13[0].double(), scheme.group) + part(x, scheme.inputs)
    down = part(model.w2[0].double(), scheme.group) + part(F.silu(g) * u, scheme.inputs)
    expected = math.sqrt(2.07 * up + down)
    assert expected / 1.25 < found.error < 1.25 * expected, (found.error, expected)


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_the_reported_error_is_that_of_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = quantising.experts_forward
    monkeypatch.setattr(quantising, "experts_forward", lambda *args: seen.append(args[:3]) or original(*args))
    model: Any = block().double()
    compiled(model, quantize=name)(tokens(2, hidden=H, dtype=torch.float64))
    (found,) = sites(1)
    ((x, ids, weights),) = seen
    model.route = lambda _: (weights, ids)
    assert found.error == pytest.approx(relative(dense(model, x, INDEPENDENT[name]), dense(model, x, None)), rel=1e-9)


SMALL = dict(hidden=64, inner=32)
STORAGE: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "stacked": (Block, "w13:stacked:out_in:gate_up w2"),
    "list, gate and up apart": (ListBlock, "w1:list:out_in:gate_up w3:list:out_in:gate_up w2:list"),
    "transposed": (Transposed, "w13:stacked:in_out:gate_up"),
    "interleaved, biased": (Interleaved, "w13:stacked:out_in:interleaved w2:stacked:out_in:gate_up w13_bias"),
    "flat, viewed": (Flat, "w13:stacked:out_in:gate_up"),
}


@pytest.mark.parametrize("name", ["fp8_w8a16", "int4_w4a16", "mxfp4_w4a16", "nf4_w4a16"])
@pytest.mark.parametrize("storage", STORAGE)
@torch.no_grad()
def test_every_storage(storage: str, name: str) -> None:
    make, binding = STORAGE[storage]
    model, x = make(**SMALL).double(), tokens(5, hidden=64, dtype=torch.float64)
    y = compiled(model, quantize=name)(x)
    assert binding in all_fused(1).sites[0].binding
    scheme = INDEPENDENT["int4_w4a16_g32" if name == "int4_w4a16" else name]  # 64 and 32 are no multiples of 128
    assert_close(y, rounded(model, scheme)(x), 1e-12, storage)
    assert relative(y, model(x)) > 1e-2


# --- what it is compiled into ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_recompiles_and_no_token_and_one() -> None:
    model = block().double()
    run = compiled(model, quantize="fp8_w8a8")
    for count in (3, 7, 2, 64, 300, 1, 0):
        x = tokens(count, hidden=H, dtype=torch.float64)
        y = run(x)
        assert y.shape == x.shape
        assert_close(y, dense(model, x, INDEPENDENT["fp8_w8a8"]) if count else x, 1e-12, f"T={count}")
        assert moe_fx.last_report().num_graphs <= 2 + (count < 2) + (count < 1)
        if count:
            all_fused(1)


class Broken(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blocks[0](x)
        torch._dynamo.graph_break()
        return x + self.blocks[1](x)


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for made in self.blocks:
            x = x + checkpoint(made, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("kind", [Broken, Checkpointed])
def test_graph_breaks_and_bodies_of_higher_order_ops(kind: type[Stack]) -> None:
    model = kind(lambda: Block(E, H, I, K), hidden=H).double().requires_grad_(False)  # frozen: grad mode may stay on
    x = tokens(5, hidden=H, dtype=torch.float64)
    y = compiled(model, quantize="int8_w8a16", fullgraph=kind is not Broken)(x)
    first = x + dense(model.blocks[0], x, INDEPENDENT["int8_w8a16"])
    assert_close(y, first + dense(model.blocks[1], first, INDEPENDENT["int8_w8a16"]), 1e-12)
    assert all(q.error is not None and 0 < q.error < 0.1 for q in sites(2))


@pytest.mark.parametrize(
    "options",
    [
        {"router": "fuse"},
        {"inner_backend": "aot_eager"},
        {"policy": "priority"},
        {"memory": "copy"},
        {"layout": "quantised"},
        {"kernel": "reference"},
        {"verify": "off"},
        {"inner_backend": "inductor"},
    ],
    ids=str,
)
@torch.no_grad()
def test_with_other_options(options: dict[str, Any]) -> None:
    model, x = block().double(), tokens(5, hidden=H, dtype=torch.float64)
    y = compiled(model, quantize="fp8_w8a8", **options)(x)
    assert_close(y, dense(model, x, INDEPENDENT["fp8_w8a8"]), 1e-12)
    assert {site.plan.layout for site in all_fused(1).sites if site.plan} == {"quantised"}


@torch.no_grad()
def test_tuned(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_FX_CACHE_DIR", str(tmp_path))
    model, x = Block(), tokens(5)
    compiled(model, quantize="int8_w8a16", tune=True, memory="copy")(x)
    (plan,) = [site.plan for site in all_fused(1).sites]
    assert plan.layout == "quantised"


# --- report ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_report_says_it() -> None:
    report = moe_fx.explain(Stack(), tokens(5), options={"quantize": "int8_w8a16"})
    (found, _) = [site.quantised for site in report.sites]
    assert f"quantize int8_w8a16: 13.5 KiB of weights → 4.31 KiB beside them; relative RMS error {found.error:.1e}" in (
        " ".join(str(report).split())
    )
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    plain = moe_fx.explain(Stack(), tokens(5))
    assert [site.quantised for site in plain.sites] == [None, None]
    assert "quantize" not in str(plain)


@torch.no_grad()
def test_blocks_that_differ_in_their_error_are_one_row() -> None:
    seeds = iter((1, 2))
    report = moe_fx.explain(Stack(lambda: Block(seed=next(seeds))), tokens(5), options={"quantize": "nvfp4"})
    low, high = sorted(site.quantised.error for site in report.sites)
    assert f"{low:.1e} to {high:.1e} on random inputs" in " ".join(str(report).split())


@torch.no_grad()
def test_on_meta_nothing_is_measured() -> None:
    with torch.device("meta"):
        model = Stack()
    report = moe_fx.explain(model, torch.empty(5, 16, device="meta"), options={"quantize": "int8_w8a16"})
    assert [(q.before, q.after, q.error) for q in sites(2)] == [(13824, 4416, None)] * 2
    assert "error not measured" in str(report)
    assert STORE.bytes() == 0


@torch.no_grad()
def test_weights_that_are_not_finite_have_no_error_to_report() -> None:
    model = Block()
    model.w2[2, 3, 4] = torch.nan
    compiled(model, quantize="int8_w8a16")(tokens(5))
    assert [q.error for q in sites(1)] == [None]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_options_that_contradict_each_other() -> None:
    for options, text in (
        ({"quantize": "fp8_w8a9"}, "did you mean 'fp8_w8a8'.*allowed: 'fp8_w8a8', .*'nvfp4'"),
        ({"quantize": 8}, "'quantize' must be str or None"),
        ({"quantize": "mxfp4", "layout": "view"}, "drop layout='view' or quantize"),
        ({"quantize": "mxfp4", "layout": "stacked", "memory": "copy"}, "drop layout='stacked' or quantize"),
        ({"layout": "quantised"}, "give quantize= instead"),
    ):
        with pytest.raises(MoEFxOptionError, match=text):
            moe_fx.compile(Block(), **options)


def refused(model: nn.Module, *args: Tensor, **options: Any) -> str:
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(model, **options)(*args)
    assert isinstance(caught.value.inner_exception, MoEFxUnsupportedError)
    return str(caught.value.inner_exception)


def test_training_is_refused_by_name() -> None:
    frozen = Stack().requires_grad_(False)
    for model, x in ((Stack(), tokens(5)), (frozen, tokens(5).requires_grad_())):
        text = refused(model, x, quantize="int8_w8a8")
        assert "quantize='int8_w8a8' is for inference" in text
        assert "torch.no_grad()" in text
    with torch.no_grad():
        compiled(Stack(), quantize="int8_w8a8")(tokens(5))


@torch.no_grad()
def test_a_kernel_that_cannot_gives_all_reasons() -> None:
    text = refused(Block(), tokens(5), quantize="fp8_w8a8", kernel="torch_grouped")
    for part in ("quantize='fp8_w8a8'", "kernel='torch_grouped'", "torch_grouped/quantised: veto.scheme", "veto.dtype"):
        assert part in text, text
    text = refused(Block(), tokens(5), quantize="fp8_w8a8_tensor", kernel="sorted_loop")
    assert "sorted_loop/quantised: veto.scheme" in text


@torch.no_grad()
def test_codes_that_fill_no_whole_bytes() -> None:
    assert "veto.shape: I=13" in refused(Block(inner=13), tokens(5), quantize="int4_w4a16")


@pytest.mark.parametrize("name", ["fp8, a scale a channel", "int4, groups, whole bank"])
@torch.no_grad()
def test_weights_that_the_graph_computes_are_not_quantised_in_every_call(name: str) -> None:
    """As those of a model that is quantised already."""
    assert "load unquantised weights" in refused(BLOCKS[name](), tokens(5, hidden=64), quantize="int8_w8a16")


class Capped(Block):
    """Looks like a block with SiLU on all but large values."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        flat = ids.reshape(-1)
        chosen = x.repeat_interleave(self.top_k, 0).unsqueeze(-1)
        gate, up = torch.bmm(self.w13[flat], chosen).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.w2[flat], (F.silu(gate.clamp(max=50.0)) * up).unsqueeze(-1)).squeeze(-1)
        return (out.view(-1, self.top_k, self.hidden) * weights.unsqueeze(-1)).sum(1)


@torch.no_grad()
def test_a_look_alike_stays_what_it_is() -> None:
    model, x = Capped(), tokens(5) * 100
    with pytest.warns(moe_fx.MoEFxWarning, match="no mixture-of-experts block was fused"):
        assert torch.equal(compiled(model, quantize="mxfp4")(x), model(x))
    (site,) = moe_fx.last_report().sites
    assert not site.fused
    assert site.quantised is None
    assert STORE.bytes() == 0
