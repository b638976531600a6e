"""The rooms of the house (docs: CONTRIBUTING.md): imports point one way, files stay short, importing stays light.

Imports are read with ast, everywhere in a file: one inside a function counts, one under ``if TYPE_CHECKING`` does not
(annotations need no import at run time).  NEVER holds transitively: no chain of imports leads where a room may not go.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_fx"

# room → rooms it may import directly; a room is a module or a package below moe_fx
ALLOWED: dict[str, set[str]] = {
    "reasons": set(),
    "hints": set(),
    "quant": set(),
    "spec": {"quant"},
    "binding": {"quant"},
    "hardware": set(),
    "cache": set(),
    "plan": {"reasons"},
    "reference": {"quant", "spec", "binding"},
    "report": {"hints", "plan", "reasons", "spec"},
    "recorder": {"reasons", "report"},
    "options": {"quant", "reasons"},
    "ops": {"binding", "reasons", "reference", "spec", "plan"},
    "ops_moe": {"ops", "binding", "reasons", "reference", "spec"},
    "ops_library": {"binding", "quant", "reasons", "reference"},
    "kernels": {"quant", "spec", "binding", "reference", "reasons", "hardware", "plan", "cache"},
    "weights": {"kernels.layouts", "binding", "quant", "reasons"},
    "oracle": {"kernels", "quant", "spec", "binding", "plan", "reasons", "hardware", "reference"},
    "passes": {"quant", "spec", "binding", "reference", "reasons", "ops", "ops_library"},
    "lowerings": {
        "kernels",
        "ops",
        "ops_moe",
        "plan",
        "weights",
        "quant",
        "spec",
        "binding",
        "reasons",
        "reference",
        "options",
        "cache",
    },
}
WIRES = {"__init__", "__main__", "backend", "planning", "api", "dump"}  # these know every room

# room → what may not be reached from it, over any number of imports
NEVER: dict[str, set[str]] = {
    "oracle": {"passes", "lowerings", "ops", "torch.fx", "backend", "api"},
    "passes": {"oracle", "kernels", "lowerings", "weights", "backend", "api"},
    "kernels": {"oracle", "passes", "lowerings", "ops", "torch.fx", "backend", "api"},
    "reference": {"kernels", "torch.fx", "ops"},
    "lowerings": {"passes", "oracle", "backend", "api"},
    "ops": {"kernels", "lowerings", "oracle", "passes", "torch.fx"},
    "ops_moe": {"kernels", "lowerings", "oracle", "passes", "torch.fx"},
    "ops_library": {"kernels", "lowerings", "oracle", "passes", "torch.fx"},
    "weights": {"lowerings", "passes", "oracle", "ops"},
    "report": {"ops", "kernels", "oracle", "passes", "lowerings", "torch"},
    "recorder": {"ops", "kernels", "oracle", "passes", "lowerings", "torch"},
}

LONG = {"kernels", "passes/idioms", "oracle/calibration"}  # one kernel or one catalogue: 700 lines
LIMITS = (400, 700)


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _module(path: Path) -> str:
    """moe_fx/passes/match.py → "passes.match"; moe_fx/passes/__init__.py → "passes"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def _modules() -> dict[str, Path]:
    return {_module(path): path for path in _files()}


def _under_type_checking(tree: ast.Module) -> set[ast.AST]:
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


@cache
def _imports(module: str) -> frozenset[str]:
    """What a module imports: ours without the "moe_fx." in front, others as they are named."""
    path = _modules()[module]
    tree = ast.parse(path.read_text(), str(path))
    skipped, found = _under_type_checking(tree), set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            found |= {_deepest(base, alias.name) for alias in node.names}
    return frozenset(_ours(name) for name in found) - {module}


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = ["moe_fx", *path.relative_to(PACKAGE).parts[:-1]]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _deepest(base: str, name: str) -> str:
    """``from a import b`` imports a.b where that is a module, else a."""
    inner = f"{base}.{name}"
    return inner if inner.removeprefix("moe_fx.") in _modules() or inner == "torch.fx" else base


def _ours(name: str) -> str:
    return "__init__" if name == "moe_fx" else name.removeprefix("moe_fx.")


def _is_ours(name: str) -> bool:
    return name in _modules()


def _reached(module: str) -> dict[str, tuple[str, ...]]:
    """Everything that importing ``module`` leads to → the way there.  Importing a.b imports a too."""
    ways: dict[str, tuple[str, ...]] = {}
    todo = [(module, (module,))]
    while todo:
        current, way = todo.pop()
        names = set(_imports(current))
        names |= {".".join(n.split(".")[:i]) for n in names if _is_ours(n) for i in range(1, n.count(".") + 1)}
        for name in names - ways.keys() - {module}:
            ways[name] = (*way, name)
            if _is_ours(name):
                todo.append((name, ways[name]))
    return ways


def _within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


@pytest.mark.parametrize("module", sorted(_modules()))
def test_imports_only_the_rooms_it_may(module: str) -> None:
    room = module.split(".")[0]
    if room in WIRES:
        return
    assert room in ALLOWED, f"moe_fx/{room} is a new room: say in ALLOWED what it may import"
    for name in _imports(module):
        if _is_ours(name) and not _within(name, room):
            assert any(_within(name, r) for r in ALLOWED[room]), f"moe_fx.{module} may not import moe_fx.{name}"


@pytest.mark.parametrize("module", sorted(_modules()))
def test_leads_nowhere_it_may_not(module: str) -> None:
    forbidden = NEVER.get(module.split(".")[0], set())
    for name, way in _reached(module).items():
        hit = [room for room in forbidden if _within(name, room)]
        assert not hit, f"moe_fx.{module} reaches {hit[0]}: {' → '.join(way)}"


@pytest.mark.parametrize("path", _files(), ids=_module)
def test_files_stay_short(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    limit = LIMITS[any(place.startswith(prefix) for prefix in LONG)]
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"moe_fx/{place} has {lines} lines; the limit is {limit}"


@pytest.mark.parametrize("module", ["moe_fx", "moe_fx.backend"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    """Nothing that torch's own compiler does not load, and no device code of ours."""
    heavy = ("transformers", "triton", "torch_tensorrt", "rich", "moe_fx.kernels.triton")
    code = f"import sys, torch._dynamo; there = set(sys.modules); import {module}"
    code += f"; print([m for m in {heavy!r} if m in sys.modules and m not in there])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, moe_fx; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_reader_of_imports_sees_them() -> None:
    """The rules above are only as good as the reader."""
    assert "spec" in _imports("plan") | _imports("report")
    assert "reasons" in _imports("plan")
    assert {"spec", "binding"} <= set(_reached("reference"))
    assert "torch" not in _reached("plan")
