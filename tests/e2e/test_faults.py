"""Exceptions planted in every stage: the result stays right, a warning and a report entry name the stage, and
``strict=True`` raises.  At run time a failure is an error, never another kernel."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

import moe_fx
from moe_fx import MoEFxInternalError, MoEFxRuntimeError, MoEFxUnsupportedError, MoEFxWarning, ops, planning
from moe_fx.kernels.registry import KERNELS
from moe_fx.passes import rewrite as rewriting
from moe_fx.reasons import Reject

from .helpers import Block, Stack, all_fused, assert_close, compiled, relative, tokens, twin

backend = sys.modules["moe_fx.backend"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A function of ours that raises.  stage: what the report must name.  nth: which call raises (0: every one)."""

    stage: str
    owner: Any
    name: str
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.stage}-{self.name}" + (f"-{self.nth}" if self.nth else "")


STAGES = [
    Fault("capture", backend.hooks, "drain"),
    Fault("find", backend, "graph_parts"),
    Fault("find", backend, "find_regions"),
    Fault("match", backend, "id_range"),
    Fault("match", backend, "fingerprint"),
    Fault("match", backend, "Sampler"),
    Fault("match", backend, "propose"),
    Fault("match", backend, "forms"),
    Fault("plan", planning, "_device"),
    Fault("plan", planning, "choose"),
    Fault("verify", backend, "verify"),
    Fault("rewrite", backend, "rewrite"),
    *(Fault("rewrite", rewriting, "insert_call", nth) for nth in (1, 2, 3)),
]
DUMPS = [Fault("dump", backend.Dump, name) for name in ("graph", "region", "report")]
DATA_DEPENDENT = [
    DataDependentOutputException(torch.ops.aten._local_scalar_dense.default),
    DynamicOutputShapeException(torch.ops.aten.nonzero.default),
    UnsupportedOperatorException(torch.ops.aten.nonzero.default),
]


@contextmanager
def planted(fault: Fault, error: Exception) -> Iterator[None]:
    original = fault.owner.__dict__[fault.name]
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if fault.nth in (0, calls):
            raise error
        return original(*args, **kwargs)

    setattr(fault.owner, fault.name, fail)
    try:
        yield
    finally:
        setattr(fault.owner, fault.name, original)
    assert calls >= max(fault.nth, 1), "the planted function was never called"


def run(model: Callable[..., Any], x: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """The result, and the messages of our warnings."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        y = model(x)
    return y, [str(w.message) for w in caught if issubclass(w.category, MoEFxWarning)]


def internal(stage: str) -> list[Reject]:
    rejects = [r for site in moe_fx.last_report().sites if not site.fused for r in site.rejects]
    return [r for r in rejects if r.code == "internal" and stage in (r.where, r.text.partition(":")[0])]


def check_survives(fault: Fault, error: Exception, **options: Any) -> None:
    """Right result in one graph without a break; a warning and a report entry that name the stage."""
    model, x = Stack(), tokens(3, 7)
    with planted(fault, error):
        y, messages = run(compiled(model, **options), x)
    assert_close(y, model(x), 1e-6)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert any(f"stage {fault.stage}" in m for m in messages), messages
    assert internal(fault.stage), f"no entry 'internal' of stage {fault.stage}:\n{moe_fx.last_report()}"


@pytest.mark.parametrize("fault", STAGES, ids=str)
def test_a_failing_stage_leaves_the_block(fault: Fault) -> None:
    check_survives(fault, ZeroDivisionError("planted"))


@pytest.mark.parametrize("error", DATA_DEPENDENT, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("fault", STAGES, ids=str)
def test_an_exception_of_fake_tensors_is_no_graph_break(fault: Fault, error: Exception) -> None:
    check_survives(fault, error)


@pytest.mark.parametrize("fault", STAGES, ids=str)
def test_an_error_of_ours_that_no_user_asked_for_leaves_the_block(fault: Fault) -> None:
    """A kernel that fails while VERIFY tries it raises MoEFxRuntimeError: still an internal failure."""
    check_survives(fault, MoEFxRuntimeError("planted"))


@pytest.mark.parametrize("fault", STAGES, ids=str)
def test_strict_raises(fault: Fault) -> None:
    with planted(fault, ZeroDivisionError("planted")), pytest.raises(BackendCompilerFailed) as caught:
        run(compiled(Stack(), strict=True), tokens(3, 7))
    inner = caught.value.inner_exception
    assert isinstance(inner, MoEFxInternalError)
    assert fault.stage in str(inner)
    assert "planted" in str(inner)
    assert isinstance(inner.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("error", [OSError("disk full"), DATA_DEPENDENT[0]], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("fault", DUMPS, ids=str)
def test_a_failing_dump_costs_the_dump_only(fault: Fault, error: Exception, tmp_path: Path) -> None:
    model, x = Stack(), tokens(3, 7)
    with planted(fault, error):
        y, messages = run(compiled(model, dump_dir=str(tmp_path)), x)
    assert_close(y, model(x), 1e-6)
    assert messages, "no warning"
    all_fused(2)


def test_a_dump_directory_that_cannot_be_made_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, x = Stack(), tokens(3, 7)
    y, messages = run(compiled(model, dump_dir=str(tmp_path / "file")), x)
    assert_close(y, model(x), 1e-6)
    assert messages
    all_fused(2)


def test_lint_failure_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the rewrite: whatever was done to the graph, the result is right and the report does not claim success."""
    original = torch.fx.Graph.lint

    def lint(graph: torch.fx.Graph) -> None:
        if Path(sys._getframe(1).f_code.co_filename).name == "backend.py":
            raise ZeroDivisionError("planted")
        original(graph)

    monkeypatch.setattr(torch.fx.Graph, "lint", lint)
    model, x = Stack(), tokens(3, 7)
    y, messages = run(compiled(model), x)
    assert_close(y, model(x), 1e-6)
    assert any("stage rewrite" in m for m in messages), messages
    assert internal("rewrite"), str(moe_fx.last_report())


def test_only_the_failing_block_is_left() -> None:
    model, x = Stack(), tokens(3, 7)
    with planted(Fault("rewrite", backend, "rewrite", 1), ZeroDivisionError("planted")):
        y, _ = run(compiled(model), x)
    assert_close(y, model(x), 1e-6)
    report = moe_fx.last_report()
    assert (report.num_fused, report.num_blocks) == (1, 2), str(report)
    left = next(site for site in report.sites if not site.fused)
    assert left.fqn == "blocks.1", "the last block is rewritten first"


def test_the_verdict_of_a_failure_is_not_remembered() -> None:
    model, x = Stack(), tokens(3, 7)
    with planted(Fault("verify", backend, "verify"), ZeroDivisionError("planted")):
        run(compiled(model), x)
    torch._dynamo.reset()
    y, messages = run(compiled(model), x)
    assert_close(y, model(x), 1e-6)
    assert not messages
    all_fused(2)


def test_one_failure_is_one_warning_a_block() -> None:
    with planted(Fault("verify", backend, "verify"), ZeroDivisionError("planted")):
        _, messages = run(compiled(Block()), tokens(3, 7))
    assert len([m for m in messages if "stage verify" in m]) == 1, messages


# --- RUN -------------------------------------------------------------------------------------------------------------


def break_kernels(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from moe_fx.lowerings import dispatch

    for name, kernel in list(KERNELS.items()):

        class Broken(kernel.experts):  # type: ignore[name-defined]
            def compute(self, *_: object) -> torch.Tensor:
                raise error

        monkeypatch.setitem(KERNELS, name, replace(kernel, experts=Broken))
    dispatch._parsed.cache_clear()


@pytest.fixture
def _clean_dispatch() -> Iterator[None]:
    from moe_fx.lowerings import dispatch

    yield
    dispatch._parsed.cache_clear()


@pytest.mark.usefixtures("_clean_dispatch")
@pytest.mark.parametrize("error", [ZeroDivisionError("planted"), *DATA_DEPENDENT], ids=lambda e: type(e).__name__)
def test_a_kernel_that_fails_at_run_is_an_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    model, x = Stack(), tokens(3, 7)
    model = compiled(model)
    run(model, x)
    all_fused(2)
    break_kernels(monkeypatch, error)
    with pytest.raises(MoEFxRuntimeError, match="failed on 21 tokens") as caught:
        run(model, x)
    assert caught.value.__cause__ is error
    assert "moe/1 top_k=2" in str(caught.value)


@pytest.mark.usefixtures("_clean_dispatch")
def test_a_kernel_that_fails_while_compiling_leaves_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernels(monkeypatch, ZeroDivisionError("planted"))
    model, x = Stack(), tokens(3, 7)
    y, messages = run(compiled(model), x)
    assert relative(y, model(x)) == 0
    assert messages
    assert internal("verify"), str(moe_fx.last_report())


def test_a_backward_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Stack(), tokens(3, 7)
    y = compiled(model)(x)
    all_fused(2)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    for name in ("cpp", "sorted_loop", "torch_grouped"):
        monkeypatch.setattr(KERNELS[name].experts, "differentiate", staticmethod(fail))
    with pytest.raises(MoEFxRuntimeError, match=r"backward failed on 21 tokens of moe/1"):
        y.sum().backward()


def test_an_implementation_that_fails_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(ops.ReferenceImplementation):
        def forward(self, *_: Any) -> torch.Tensor:
            raise MoEFxRuntimeError("planted")

    x = tokens(3, 7)
    model = compiled(twin(Stack()))
    run(model, x)
    all_fused(2)
    monkeypatch.setattr(ops, "_implementation", Failing())
    with pytest.raises(MoEFxRuntimeError, match="planted"):
        run(model, x)


def test_a_fault_of_the_inner_backend_is_its_own() -> None:
    """The inner backend's errors reach the user as they are: they are not ours to hide."""
    fault = Fault("inner", backend, "compile_inner")
    with planted(fault, ZeroDivisionError("planted")), pytest.raises(BackendCompilerFailed) as caught:
        run(compiled(Stack()), tokens(3, 7))
    assert isinstance(caught.value.inner_exception, ZeroDivisionError)


def test_an_explicit_request_is_never_dropped_by_a_stage() -> None:
    """What must raise still raises through the net that catches failures."""
    with pytest.raises(BackendCompilerFailed) as caught:
        run(compiled(Stack(), kernel="torch_grouped"), tokens(3, 7))
    assert isinstance(caught.value.inner_exception, MoEFxUnsupportedError)


def test_a_substitute_that_fails_leaves_the_loop_to_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault while Dynamo traces: the result is eager's, and the next graph tells of it."""
    from moe_fx.passes.capture import hugging_face
    from tests.zoo.samples import build

    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(hugging_face, "_compare", fail)
    monkeypatch.setattr(hugging_face, "_TRUSTED", {})
    sample = build("mixtral", "eager")
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = sample.output(compiled(sample.model, fullgraph=False)(**sample.inputs))[0]
        assert_close(y, sample.output(sample.model(**sample.inputs))[0], 1e-5)
    assert any("stage capture: ZeroDivisionError: planted" in str(w.message) for w in caught)
    assert internal("capture"), str(moe_fx.last_report())
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="capture: ZeroDivisionError"):
        compiled(sample.model, fullgraph=False, strict=True)(**sample.inputs)


def test_a_failure_of_lowering_leaves_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(backend, "inline", fail)
    model, x = Stack(), tokens(1, 1)
    y, messages = run(compiled(model, inner_backend="inductor"), x)
    assert_close(y, model(x), 1e-5)
    assert any("stage lower" in m for m in messages), messages
    assert internal("lower"), str(moe_fx.last_report())
