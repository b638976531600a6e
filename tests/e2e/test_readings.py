"""Products over codes read as products with matrices: what is believed, what is put back, and libraries' forms."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx
from moe_fx.passes import products, readings
from moe_fx.passes.capture.quantised_libraries import FORMS
from moe_fx.passes.readings import READERS, Builder, Meaning, read_products, restore

from .test_scaled_products import Block, ByRow, H, compiled


def captured(model: nn.Module, x: Tensor, dynamic: bool = False) -> torch.fx.GraphModule:
    """The one graph that Dynamo makes."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(x)
    return graphs[0]


def text(graph: torch.fx.Graph) -> str:
    """What the results are made of; a node that is put back may stand elsewhere, by another name."""
    spelt: dict[torch.fx.Node, str] = {}
    for n in graph.nodes:
        args = torch.fx.node.map_arg((n.args, n.kwargs), lambda m: spelt[m])  # type: ignore[arg-type,return-value]
        spelt[n] = str(n.target) if n.op == "placeholder" else f"{n.target}{args}"
    return f"{len(graph.nodes)} nodes: {spelt[next(n for n in graph.nodes if n.op == 'output')]}"


class Dense(nn.Module):
    """Two products with rounded inputs, of which the second reads the first, and their inputs once more."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = ByRow(H, 64), ByRow(64, H)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.up(x))
        return self.down(hidden) + x + hidden.sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_read_is_put_back(dynamic: bool) -> None:
    gm = captured(Dense(), torch.randn(40, H, dtype=torch.bfloat16), dynamic=dynamic)
    before, found = text(gm.graph), list[readings.Reading]()
    read_products(gm.graph, found)
    assert len(found) == 2
    assert [n for n in gm.graph.nodes if n.target is readings.held]
    gm.graph.lint()
    restore(gm.graph, found)
    gm.graph.lint()
    assert text(gm.graph) == before


def test_a_reading_follows_what_takes_the_place_of_its_input() -> None:
    gm = captured(Dense(), torch.randn(40, H, dtype=torch.bfloat16))
    found: list[readings.Reading] = []
    read_products(gm.graph, found)
    silu = next(n for n in gm.graph.nodes if n.target is F.silu)
    with gm.graph.inserting_after(silu):
        other = gm.graph.call_function(torch.relu, (silu.args[0],))
    silu.replace_all_uses_with(other)
    gm.graph.erase_node(silu)
    restore(gm.graph, found)
    gm.graph.lint()
    assert [c for c in other.users if c.target not in (readings.held, readings.rounded)]
    assert not [n for n in gm.graph.nodes if n.target in (readings.held, readings.rounded)]


@pytest.mark.parametrize(
    "change",
    [
        {"key": "float8_e4m3fn:-1x-1:float32"},
        {"key": "float8_e4m3fn:1x32:float32"},
        {"inputs": ""},
    ],
)
def test_a_reader_that_is_wrong_is_not_believed(change: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix, of its groups, of the rounding of its inputs."""

    def lies(builder: Builder, node: torch.fx.Node) -> Meaning | None:
        meaning = products._scaled(builder, node)
        return None if meaning is None else replace(meaning, **change)  # type: ignore[arg-type]

    monkeypatch.setitem(READERS, "aten::_scaled_mm_v2", lies)
    readings._AGREED.clear()
    gm = captured(Dense(), torch.randn(40, H, dtype=torch.bfloat16))
    before, found = text(gm.graph), list[readings.Reading]()
    read_products(gm.graph, found)
    readings._AGREED.clear()
    assert not found
    assert text(gm.graph) == before


class Beside(nn.Module):
    """A dense layer over codes before and after a block over codes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = ByRow(H, H), Block(ByRow), ByRow(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_products_beside_a_block_stay_what_they_are(inner: str) -> None:
    torch.manual_seed(0)
    model = Beside()
    torch._dynamo.reset()
    moe_fx.reset()
    run = torch.compile(model.eval(), backend="moe_fx", options={"inner_backend": inner})
    with torch.no_grad():
        for tokens in (40, 50):
            x = torch.randn(tokens, H, dtype=torch.bfloat16)
            assert (run(x).double() - (usual := model(x).double())).norm() <= 0.1 * usual.norm()
    assert moe_fx.last_report().sites[0].fused


def test_without_a_block_nothing_changes() -> None:
    torch.manual_seed(0)
    model, x = Dense(), torch.randn(40, H, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))


@pytest.mark.parametrize(("module", "path"), FORMS)
def test_forms_take_what_the_library_s_functions_take(module: str, path: str) -> None:
    pytest.importorskip(module.partition(".")[0], reason=f"{module} is not installed: `make peers` runs this")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert list(inspect.signature(FORMS[module, path]).parameters) == list(inspect.signature(found).parameters)
