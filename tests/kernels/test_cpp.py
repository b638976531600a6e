"""Experts in C++: sizes, instructions, threads, sanitizers and the toolchain.  Every capability: test_experts.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moe_fx.kernels.experts  # noqa: F401  registers the kernels
from moe_fx import hardware
from moe_fx.binding import Experts
from moe_fx.kernels.build import run
from moe_fx.kernels.cpp import toolchain
from moe_fx.kernels.experts import cpp_experts
from moe_fx.kernels.registry import kernel
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.reference import ACTIVATIONS, experts_backward, experts_forward
from moe_fx.spec import ExpertSpec, MoESpec

from .cases import PARAMS, Case, assert_as_exact, make

CPU = torch.device("cpu")
HERE = hardware.detect(CPU).arch
# each CPU runs what those before it in its own line run
LINES = (["avx2", "avx512", "avx512_bf16", "amx"], ["neon"])
ARCHS = next((line[: line.index(HERE) + 1] for line in LINES if HERE in line), [])
pytestmark = [
    pytest.mark.skipif(hardware.cxx_compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(not ARCHS, reason=f"no kernels for {HERE}"),
]
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(spec: MoESpec, tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, ids (some of nobody), weights, w13, w2."""
    source = torch.Generator().manual_seed(seed)
    e = spec.expert

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    ids = torch.randint(-1, e.experts + 1, (tokens, spec.top_k), generator=source)
    weights = torch.rand((tokens, spec.top_k), generator=source) + 0.1
    matrices = normal(e.experts, 2 * e.intermediate, e.hidden), normal(e.experts, e.hidden, e.intermediate)
    w13, w2 = ((m * m.shape[-1] ** -0.5).to(dtype) for m in matrices)
    return normal(tokens, e.hidden).to(dtype), ids, weights, w13, w2


def check(
    spec: MoESpec, tokens: int, dtype: torch.dtype, ids: torch.Tensor | None = None, across: bool = False
) -> torch.Tensor:
    """across: matrices are stored as [in, out], gate and up in turn."""
    x, drawn, weights, w13, w2 = draw(spec, tokens, dtype)
    ids, order = drawn if ids is None else ids, "interleaved" if across else "gate_up"
    if across:
        w13, w2 = (m.transpose(1, 2).contiguous().transpose(1, 2) for m in (w13, w2))
    experts = Experts((w13,), w2, (), None, None, order)  # type: ignore[arg-type]
    exact = Experts((w13.double(),), w2.double(), (), None, None, order)  # type: ignore[arg-type]
    found = run(kernel("cpp"), x, ids, weights, experts, spec)
    truth = experts_forward(x.double(), ids, weights.double(), exact, spec)
    assert_as_exact(found, experts_forward(x, ids, weights, experts, spec), truth, torch.finfo(dtype).eps, str(spec))
    return found


def back(spec: MoESpec, tokens: int, dtype: torch.dtype, across: bool = False) -> list[torch.Tensor]:
    """dx, dweights and the gradients of both matrices, compared with the reference; what the forward keeps is used."""
    x, ids, weights, w13, w2 = draw(spec, tokens, dtype)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def experts(up: torch.Tensor, down: torch.Tensor) -> Experts:
        if across:
            up, down = (m.transpose(1, 2).contiguous().transpose(1, 2) for m in (up, down))
        return Experts((up,), down, (), None, None, "gate_up")

    saved: list[torch.Tensor] = []
    ours, usual = (experts(torch.full_like(w13, float("nan")), torch.full_like(w2, float("nan"))) for _ in range(2))
    for member in (usual.up[0], usual.down):
        member.zero_()  # type: ignore[union-attr]
    truth = experts(torch.zeros_like(w13).double(), torch.zeros_like(w2).double())
    run(kernel("cpp"), x, ids, weights, experts(w13, w2), spec, keep=saved)
    given = (dy, x, ids, weights, experts(w13, w2), spec)
    found = cpp_experts.CppExperts.differentiate(*given, ours, saved)
    theirs = experts_backward(*given, usual)
    exact = experts_backward(
        dy.double(), x.double(), ids, weights.double(), experts(w13.double(), w2.double()), spec, truth
    )
    results = [[*first, views.up[0], views.down] for first, views in ((found, ours), (theirs, usual), (exact, truth))]
    for parts in zip(*results, strict=True):
        assert_as_exact(*parts, torch.finfo(dtype).eps, str(spec))
    return results[0]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_every_activation(arch: str, act: tuple[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_experts, "_arch", lambda: arch)
    for number, dtype in enumerate(DTYPES):
        order = ("gate_up", "up_gate", "interleaved")[number]
        case = Case(act, dtype, w13_bias=True, w2_bias=True, order=order, form=("stacked", "list", "flat")[number])
        block, exact = make(case), make(case).exact()
        given = (block.x, block.ids, block.weights, block.experts)
        truth = experts_forward(exact.x, exact.ids, exact.weights, exact.experts, case.exact_spec)
        assert_as_exact(run(kernel("cpp"), *given, case.spec), experts_forward(*given, case.spec), truth, case.eps)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_every_derivative(arch: str, act: tuple[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are exact: gate is the first half of x and up the second, y is hidden.  Bends included."""
    monkeypatch.setattr(cpp_experts, "_arch", lambda: arch)
    found, params = ACTIVATIONS[act], tuple(PARAMS[p] for p in ACTIVATIONS[act].params)
    values = torch.cat(
        [torch.linspace(-9, 9, 57), torch.tensor([0.0, -0.0, 3, -3, 6, 0.5, -0.5, 1e-3, -1e-3, 30, -30])]
    )
    width, eye = 8, torch.eye(8)
    gate, up = torch.cartesian_prod(values, values[::5])[: 112 * width].T.reshape(2, -1, width)
    spec = MoESpec(1, ExpertSpec(1, 2 * width, width, act[0], params, act[1]))
    w13 = torch.cat([eye, torch.zeros_like(eye)], 1)
    if act[1]:
        w13 = torch.cat([w13, torch.cat([torch.zeros_like(eye), eye], 1)])
    w2 = torch.cat([eye, torch.zeros_like(eye)])
    experts = Experts((w13[None],), w2[None], (), None, None, "gate_up")
    x, ids, weights = torch.cat([gate, up], 1), torch.zeros(len(gate), 1, dtype=torch.int64), torch.ones(len(gate), 1)
    d = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0))
    dy = torch.cat([d, torch.zeros_like(d)], 1)
    dx, dweights = cpp_experts.CppExperts.differentiate(dy, x, ids, weights, experts, spec, None, ())
    wide = [t.double() for t in (d, gate, up)]
    dgate, dup = found.backward(wide[0], wide[1], wide[2] if act[1] else None, *params)
    usual = found.backward(d, gate, up if act[1] else None, *params)
    for ours, theirs, truth in zip(dx.split(width, 1), usual, (dgate, dup), strict=True):
        if truth is not None and theirs is not None:
            assert_as_exact(ours.contiguous(), theirs, truth, torch.finfo(torch.float32).eps)
    hidden = found.forward(wide[1], wide[2] if act[1] else None, *params)
    torch.testing.assert_close(dweights.double(), (wide[0] * hidden).sum(1, keepdim=True), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(37, 29), (64, 96), (2080, 70), (33, 2100)], ids=str)
@pytest.mark.parametrize("across", [False, True])
def test_sizes(arch: str, dtype: str, sizes: tuple[int, int], across: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No multiple of anything; rows longer than are multiplied at once; more tiles than are kept at once."""
    monkeypatch.setattr(cpp_experts, "_arch", lambda: arch)
    for tokens in (0, 1, 2, 17, 400):
        check(MoESpec(2, ExpertSpec(3, *sizes)), tokens, getattr(torch, dtype), across=across)
        back(MoESpec(2, ExpertSpec(4, *sizes)), tokens, getattr(torch, dtype), across)


def test_many_tokens_and_one_expert_for_all() -> None:
    spec = MoESpec(2, ExpertSpec(5, 40, 24))
    check(spec, 4096, torch.bfloat16)
    check(spec, 300, torch.bfloat16, torch.full((300, 2), 3))
    check(spec, 9, torch.bfloat16, torch.full((9, 2), 5))


@pytest.mark.parametrize("tokens", [1, 6, 700])
def test_results_do_not_depend_on_threads(tokens: int) -> None:
    spec, before = MoESpec(4, ExpertSpec(16, 96, 160)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([check(spec, tokens, torch.bfloat16), *back(spec, tokens, torch.bfloat16)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_callers_at_the_same_time() -> None:
    spec = MoESpec(2, ExpertSpec(6, 64, 64))
    alone = [check(spec, tokens, torch.float32) for tokens in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda tokens: check(spec, tokens, torch.float32), range(1, 9))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_workspaces_are_written_before_they_are_read() -> None:
    """Also where rows of inputs end in the middle of a vector."""
    spec = MoESpec(2, ExpertSpec(3, 37, 29))
    x, ids, weights, w13, w2 = draw(spec, 11, torch.bfloat16)
    experts = Experts((w13,), w2, (), None, None, "gate_up")
    made = kernel("cpp").experts
    from moe_fx.kernels.build import config_of
    from moe_fx.kernels.experts.torch_experts import Scratch

    results = []
    for fill in (0.0, float("nan")):
        first, second = (torch.full((22, 64), fill, dtype=torch.bfloat16) for _ in range(2))
        y = torch.full_like(x, fill)
        one = made(config_of(spec, x.dtype))  # type: ignore[call-arg, arg-type]
        results.append(one.compute(x, ids, weights, experts, spec, Scratch(first, second, y)))  # type: ignore[attr-defined]
    assert torch.equal(*results)


def test_matrices_that_it_cannot_read_are_refused() -> None:
    spec = MoESpec(2, ExpertSpec(3, 32, 32))
    x, ids, weights, w13, w2 = draw(spec, 4, torch.float32)
    for up, down in ((w13.double(), w2.double()), (w13, w2.bfloat16()), (w13, w2[:, ::2, ::2])):
        with pytest.raises((MoEFxRuntimeError, KeyError)):
            run(kernel("cpp"), x, ids, weights, Experts((up,), down, (), None, None, "gate_up"), spec)


# --- the toolchain


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it."""
    monkeypatch.setenv("MOE_FX_CACHE_DIR", str(tmp_path))
    toolchain.library.cache_clear()
    yield tmp_path
    toolchain.library.cache_clear()


def test_compiled_once_and_found_again(fresh: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toolchain.library(HERE)
    assert "compiling" in capfd.readouterr().err
    (made,) = (fresh / "moe_fx" / "cpp").iterdir()
    toolchain.library.cache_clear()
    toolchain.library(HERE)
    assert not capfd.readouterr().err
    assert list((fresh / "moe_fx" / "cpp").iterdir()) == [made]


def test_without_a_compiler_other_kernels_run(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_FX_CXX", "")
    assert "moe_fx.cpp" not in hardware.detect(CPU).installed
    with pytest.raises(MoEFxRuntimeError, match="MOE_FX_CXX"):
        toolchain.library(HERE)


def test_a_compiler_that_fails_is_shown(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no such instruction >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("MOE_FX_CXX", str(broken))
    with pytest.raises(MoEFxRuntimeError, match="no such instruction"):
        toolchain.library(HERE)
    assert not list((fresh / "moe_fx" / "cpp").glob("*.so"))


SANITISED = """
import sys, torch
from pathlib import Path
from moe_fx.kernels.cpp import toolchain
toolchain.SOURCE = Path(sys.argv[1])
toolchain.FLAGS = (*toolchain.FLAGS, "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
from moe_fx.spec import ExpertSpec, MoESpec
from tests.kernels.test_cpp import DTYPES, back, check
for dtype in DTYPES:
    for sizes in ((37, 29), (64, 32), (2100, 40)):
        for tokens in (1, 17, 400):
            for across in (False, True):
                with torch.no_grad():
                    check(MoESpec(2, ExpertSpec(3, *sizes)), tokens, getattr(torch, dtype), across=across)
                    back(MoESpec(2, ExpertSpec(3, *sizes)), tokens, getattr(torch, dtype), across=across)
print("clean")
"""


def sanitised(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The kernels of ``source`` with sanitizers for addresses and undefined behaviour, in a process of their own."""
    found = hardware.cxx_compiler()
    assert found is not None
    names = ("libasan.so", "libubsan.so")
    libraries = [
        subprocess.run([found, f"-print-file-name={name}"], capture_output=True, text=True, check=False).stdout.strip()
        for name in names
    ]
    if not all(Path(library).is_file() for library in libraries):
        pytest.skip("the compiler has no sanitizers")
    environment = {
        **os.environ,
        "MOE_FX_CACHE_DIR": str(folder),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    command = [sys.executable, "-c", SANITISED, str(source)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Reads and writes outside of what was given, and what C++ leaves undefined."""
    done = sanitised(toolchain.SOURCE, tmp_path)
    assert done.stdout.strip() == "clean", done.stderr[-3000:]


def test_sanitizers_find_a_vector_too_much(tmp_path: Path) -> None:
    done = sanitised(changed(tmp_path / "source", "simd.h", "T all[LANES] = {};", "T all[1] = {};"), tmp_path)
    assert "AddressSanitizer" in done.stderr
    assert "clean" not in done.stdout


def changed(folder: Path, name: str, text: str, instead: str) -> Path:
    """A copy of the sources with a defect."""
    folder.mkdir()
    for path in toolchain.SOURCE.iterdir():
        source = path.read_text()
        assert path.name != name or text in source
        (folder / path.name).write_text(source.replace(text, instead) if path.name == name else source)
    return folder


DEFECTS = {
    "the end of a row": ("products.h", "if (i < k) {", "if (false) {"),
    "the first part of a long row": ("products.h", "more ? to[c] + found[c] : found[c]", "found[c]"),
    "all but some tiles": ("forward.cpp", "t < end; t += BATCH", "t < order.begin[at] + 1; t += BATCH"),
    "the routing weight": ("forward.cpp", "layer.weights ? layer.weights[flat] : 1.0f", "1.0f"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_what_is_forgotten_is_caught(name: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolchain, "SOURCE", changed(tmp_path / "source", *DEFECTS[name]))
    with pytest.raises(AssertionError):
        check(MoESpec(2, ExpertSpec(3, 2080, 70)), 400, torch.float32)


def test_the_instructions_of_the_host_are_not_asked_for() -> None:
    """A cache may be shared by machines."""
    flags = {flag for line in toolchain.INSTRUCTIONS.values() for flag in line}
    assert not {flag for flag in (*flags, *toolchain.FLAGS) if "native" in flag}
    assert replace(kernel("cpp").capability).archs == frozenset(toolchain.INSTRUCTIONS)
