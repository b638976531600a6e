"""Options: what is wrong with one is said early and by name; the environment; dumps; requests that cannot be met."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import moe_fx
from moe_fx import MoEFxOptionError, MoEFxUnsupportedError, MoEFxWarning
from moe_fx.options import Options, names, resolve
from moe_fx.report import Report
from tests.e2e.helpers import BACKEND, Block, Stack, all_fused, assert_close, compiled, fresh, tokens


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOE_FX_OPTIONS", "MOE_FX_DUMP", "MOE_FX_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    fresh()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "name-typo": ({"kernal": "reference"}, "unknown option 'kernal'; did you mean 'kernel'"),
    "name-strange": ({"zzz": 1}, "unknown option 'zzz'; known: kernel, layout"),
    "inner-typo": ({"inner_backend": "inducter"}, "'inner_backend' is 'inducter'; did you mean 'inductor'"),
    "inner-strange": ({"inner_backend": "xla_of_mine"}, "allowed: 'inductor', 'eager'"),
    "verify": ({"verify": "onec"}, "did you mean 'once'"),
    "verify-bool": ({"verify": True}, "'verify' is True"),
    "memory": ({"memory": "copies"}, "did you mean 'copy'"),
    "policy": ({"policy": "prize"}, "did you mean 'price'"),
    "mode": ({"mode": "max_autotune"}, "did you mean 'max-autotune'"),
    "strict-int": ({"strict": 1}, "'strict' must be bool, got 1"),
    "tune-text": ({"tune": "yes"}, "'tune' must be bool"),
    "kernel-int": ({"kernel": 3}, "'kernel' must be str or None"),
    "kernel-bool": ({"kernel": True}, "'kernel' must be str or None"),
    "inductor-list": ({"inductor": []}, "'inductor' must be dict"),
    "inductor-none": ({"inductor": None}, "'inductor' must be dict"),
    "dump-path": ({"dump_dir": 3}, "'dump_dir' must be str or None"),
    "quantize": ({"quantize": "fp8_w8a6"}, "'quantize' is 'fp8_w8a6'; did you mean 'fp8_w8a.*allowed: 'fp8_w8a8', "),
    "parallel": ({"parallel": {"ep": 2}}, "'parallel' is not available in this version"),
    "name-not-text": ({3: 1}, "unknown option 3"),
    "unhashable": ({"inner_backend": ["eager"]}, "inner_backend"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(MoEFxOptionError, match=message):
        resolve(options)


@pytest.mark.parametrize("name", ["name-typo", "memory", "strict-int", "quantize"])
def test_torch_compile_passes_the_error_on(name: str) -> None:
    options, message = WRONG[name]
    model = compiled(Block(), **options)
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        model(tokens(4))
    assert isinstance(caught.value.inner_exception, MoEFxOptionError)


def test_our_compile_checks_at_once() -> None:
    with pytest.raises(MoEFxOptionError, match="did you mean 'kernel'"):
        moe_fx.compile(Block(), kernal="reference")
    with pytest.raises(MoEFxOptionError, match="did you mean 'memory'"):
        moe_fx.explain(Block(), tokens(4), options={"memry": "view"})


def test_explain_leaves_the_last_report_alone_when_options_are_wrong() -> None:
    compiled(Block())(tokens(4))
    before = moe_fx.last_report()
    with pytest.raises((MoEFxOptionError, BackendCompilerFailed)):
        moe_fx.explain(Block(), tokens(4), options={"memry": "view"})
    assert moe_fx.last_report() == before


@pytest.mark.parametrize(
    ("kernel", "layout", "reasons"),
    [
        ("torch_grouped", None, ["veto.dtype", "'float32'", "veto.shape", "intermediate=12", "veto.storage"]),
        (None, "transposed", ["veto.storage", "memory='view'"]),
        ("gather_bmm", "stacked", ["veto.storage"]),
    ],
)
def test_a_request_that_is_vetoed_raises_with_all_reasons(
    kernel: str | None, layout: str | None, reasons: list[str]
) -> None:
    model = compiled(Block(), kernel=kernel, layout=layout)
    with pytest.raises(BackendCompilerFailed) as caught, torch.no_grad():
        model(tokens(4))
    inner = caught.value.inner_exception
    assert isinstance(inner, MoEFxUnsupportedError)
    for part in (*reasons, repr(kernel or layout)):
        assert part in str(inner), str(inner)


@pytest.mark.parametrize(("name", "value"), [("kernel", "sorted_lop"), ("layout", "stakced")])
def test_a_request_that_does_not_exist_raises(name: str, value: str) -> None:
    model = compiled(Block(), **{name: value})
    with pytest.raises(BackendCompilerFailed, match=value) as caught:
        model(tokens(4))
    assert isinstance(caught.value.inner_exception, MoEFxOptionError)


@pytest.mark.parametrize("kernel", ["reference", "sorted_loop", "gather_bmm"])
def test_a_request_that_can_be_met_is(kernel: str) -> None:
    model, x = Stack(), tokens(3, 7)
    with torch.no_grad():
        assert_close(compiled(model, kernel=kernel)(x), model(x))
    plans = [site.plan for site in all_fused(2).sites]
    assert all(p is not None and {r.kernel for r in p.ranges} == {kernel} for p in plans)


def test_verify_off_and_always() -> None:
    x = tokens(3, 7)
    for verify, note in (("off", "unverified"), ("always", ""), ("once", "")):
        fresh()
        model = Stack()
        with torch.no_grad():
            assert_close(compiled(model, verify=verify)(x), model(x))
        assert [site.note for site in all_fused(2).sites] == [note] * 2


def test_policy_priority_takes_the_lowest_rank() -> None:
    with torch.no_grad():
        compiled(Block(), policy="priority")(tokens(4))
    plan = all_fused(1).sites[0].plan
    assert plan is not None
    assert len(plan.ranges) == 1


# --- environment -----------------------------------------------------------------------------------------------------


def test_options_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_FX_OPTIONS", '{"inner_backend": "aot_eager", "kernel": "reference"}')
    assert resolve(None) == Options(inner_backend="aot_eager", kernel="reference")
    assert resolve({"kernel": "sorted_loop"}) == Options(inner_backend="aot_eager", kernel="sorted_loop")
    with torch.no_grad():
        torch.compile(Block(), backend=BACKEND)(tokens(4))
    plan = all_fused(1).sites[0].plan
    assert plan is not None
    assert plan.kernel_for(4) == "reference"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "MOE_FX_OPTIONS is not a JSON object"),
        ("[1]", "must be a JSON object"),
        ('{"kernal": 1}', "did you mean 'kernel'"),
        ('{"verify": "of"}', "did you mean 'off'"),
    ],
)
def test_wrong_options_of_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv("MOE_FX_OPTIONS", text)
    with pytest.raises(MoEFxOptionError, match=message):
        resolve({})


def test_the_off_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_FX_DISABLE", "1")
    model, x = Stack(), tokens(3, 7)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))
    assert moe_fx.last_report() == Report()
    fresh()
    monkeypatch.setenv("MOE_FX_DISABLE", "0")
    with torch.no_grad():
        compiled(model)(x)
    all_fused(2)


def test_the_off_switch_still_checks_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_FX_DISABLE", "1")
    with pytest.raises(BackendCompilerFailed, match="did you mean 'kernel'"):
        compiled(Block(), kernal=None)(tokens(4))


# --- mode and inner backends -----------------------------------------------------------------------------------------


def test_mode_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile(mode=...) reaches us as an argument; torch refuses mode= together with options=."""
    monkeypatch.setenv("MOE_FX_OPTIONS", '{"inner_backend": "eager"}')
    model, x = Block(), tokens(4)
    with torch.no_grad():
        assert_close(torch.compile(model, backend=BACKEND, mode="reduce-overhead")(x), model(x))
    all_fused(1)
    with pytest.raises(RuntimeError, match="mode"):
        torch.compile(model, backend=BACKEND, mode="default", options={"strict": True})


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", [None, "default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"])
def test_every_mode(mode: str | None, inner: str) -> None:
    model, x = Block(), tokens(4)
    with torch.no_grad():
        assert_close(compiled(model, mode=mode, inner_backend=inner)(x), model(x))
    all_fused(1)


def test_an_inner_backend_that_is_not_installed() -> None:
    with pytest.raises(BackendCompilerFailed, match="tensorrt") as caught:
        compiled(Block(), inner_backend="tensorrt")(tokens(4))
    assert isinstance(caught.value.inner_exception, MoEFxOptionError)


@pytest.mark.slow
def test_inductor_takes_its_own_options() -> None:
    model, x = Block(), tokens(4)
    with torch.no_grad():
        model_ = compiled(model, inner_backend="inductor", inductor={"fx_graph_cache": False}, mode="default")
        assert_close(model_(x), model(x))
    all_fused(1)


def test_an_unknown_setting_of_inductor_is_named() -> None:
    with pytest.raises(Exception, match="no_such_setting"):
        compiled(Block(), inner_backend="inductor", inductor={"no_such_setting": 1})(tokens(4))


# --- dumps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["option", "environment"])
def test_dumps_are_numbered_and_readable(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    if how == "environment":
        monkeypatch.setenv("MOE_FX_DUMP", str(folder))
    with torch.no_grad():
        compiled(Stack(), **({"dump_dir": str(folder)} if how == "option" else {}))(tokens(3, 7))
    report = all_fused(2)
    found = sorted(p.name for p in folder.iterdir())
    assert [re.sub("block-.*[.]py", "block.py", n) for n in found] == [
        "000-captured.py", "001-block.py", "002-rewritten.py", "report.json", "report.txt",
    ]  # fmt: skip
    texts = {n: (folder / n).read_text() for n in found}
    assert "torch.bmm(" in texts["000-captured.py"]
    assert "moe_fx.experts" not in texts["000-captured.py"]
    assert texts["002-rewritten.py"].count("torch.ops.moe_fx.experts.default(") == 2
    assert "torch.bmm(" not in texts["002-rewritten.py"]
    block = texts[found[1]]
    assert "# spec    moe/1 top_k=2" in block
    assert "# binding bind/1 w13:stacked" in block
    assert "# plan    plan/1 layout=view" in block
    assert Report.from_json(json.loads(texts["report.json"])) == report
    assert texts["report.txt"].strip() == str(report).strip()
    for name in found[:3]:
        compile(texts[name], name, "exec")


def test_dumps_of_a_recompile_follow(tmp_path: Path) -> None:
    model = compiled(Block(), dump_dir=str(tmp_path))
    with torch.no_grad():
        model(tokens(4))
        model(tokens(5))
    names_found = sorted(p.name.split("-")[0] for p in tmp_path.glob("[0-9]*"))
    assert names_found == [f"{i:03d}" for i in range(len(names_found))]
    assert len(list(tmp_path.glob("*captured.py"))) == 2
    assert json.loads((tmp_path / "report.json").read_text())["num_graphs"] == 2


# --- nothing matched -------------------------------------------------------------------------------------------------


class Leaky(Block):
    """A value from inside the block leaves."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weights, ids = self.route(x)
        flat = ids.reshape(-1)
        chosen = x.repeat_interleave(self.top_k, 0).unsqueeze(-1)
        gate, up = torch.bmm(self.w13[flat], chosen).squeeze(-1).chunk(2, -1)
        inner = nn.functional.silu(gate) * up
        out = torch.bmm(self.w2[flat], inner.unsqueeze(-1)).view(-1, self.top_k, self.hidden) * weights.unsqueeze(-1)
        return out.sum(1), inner


def our_warnings(model: Any, *args: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(*args)
    return [str(w.message) for w in caught if issubclass(w.category, MoEFxWarning)]


def test_nothing_matched_is_a_warning_with_the_nearest_miss() -> None:
    (message,) = our_warnings(compiled(Leaky()), tokens(4))
    assert "find.escape" in message
    assert "test_options.py" in message, "no source line"
    assert moe_fx.last_report().warnings == (message,)


def test_a_graph_without_anything_like_experts_is_silent() -> None:
    """It may be the part of a model before a graph break: the report says "0 of 0"."""
    assert our_warnings(compiled(nn.Sequential(nn.Linear(16, 16), nn.ReLU())), tokens(4)) == []
    assert "0 of 0 mixture-of-experts blocks" in str(moe_fx.last_report())


def test_one_warning_for_all_graphs_and_recompiles() -> None:
    model = compiled(Leaky())
    assert len(our_warnings(model, tokens(4))) == 1
    assert our_warnings(model, tokens(5)) == []


def test_no_warning_where_a_block_is_fused() -> None:
    assert our_warnings(compiled(Stack()), tokens(4)) == []


def test_a_graph_before_the_block_is_no_reason_to_warn() -> None:
    """A graph break before the first block: silence until the last graph is not possible, so only graphs that hold
    something like experts count."""

    class Broken(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return x + self.blocks[0](x)

    assert our_warnings(compiled(Broken(), fullgraph=False), tokens(4)) == []


def test_all_names_are_fields() -> None:
    assert names() == list(Options.__dataclass_fields__)


def test_tune_measures_once_and_keeps_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fx.lowerings import measure

    monkeypatch.setenv("MOE_FX_CACHE_DIR", str(tmp_path))
    calls: list[str] = []
    original = measure.Stopwatch.__call__
    monkeypatch.setattr(measure.Stopwatch, "__call__", lambda self, *a: calls.append(a[0]) or original(self, *a))
    for expected in (True, False):
        fresh()
        model, x = Stack(), tokens(3, 7)
        with torch.no_grad():
            assert_close(compiled(model, tune=True)(x), model(x), 1e-6)
        (plan,) = {site.plan for site in all_fused(2).sites}
        assert plan is not None
        assert plan.measured_at
        assert "measured time of one forward" in str(moe_fx.last_report())
        assert bool(calls) == expected
        calls.clear()


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_max_autotune_means_tune(mode: str) -> None:
    assert resolve({}, mode).tune
    assert resolve({"mode": mode}).tune
    assert not resolve({"mode": mode, "tune": False}).tune
    assert not resolve({}, "reduce-overhead").tune
