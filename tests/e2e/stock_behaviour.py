"""What Dynamo does for other backends, as JSON: run alone in a fresh process, without moe_fx or after it did something.

    python -m tests.e2e.stock_behaviour nothing | before | after | used | thread | uninstalled

Imports nothing of ours unless asked to; test_isolation.py compares the outputs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import threading
from typing import Any


def main(what: str) -> None:
    if what == "before":
        importlib.import_module("moe_fx.backend")
    import torch

    from tests.zoo.samples import build

    if what == "after":
        importlib.import_module("moe_fx.backend")
    if what in ("used", "uninstalled"):
        use()
    if what == "thread":
        other = threading.Thread(target=use)
        other.start()
        other.join()
    if what == "uninstalled":
        from moe_fx.passes.capture import hooks

        hooks.uninstall()

    assert ("moe_fx" in sys.modules) == (what != "nothing")
    torch.set_grad_enabled(False)
    one = dict(num_hidden_layers=1)
    found = {
        f"mixtral-{implementation}": observe(build("mixtral", implementation, config=one))
        for implementation in ("eager", None)
    }
    found["export"] = export(build("mixtral", config=one))
    found["training"] = train(build("mixtral", "eager", config=one))
    print(json.dumps(found))


def use() -> None:
    """Compiles the same classes with moe_fx."""
    import torch

    import moe_fx
    from moe_fx.backend import moe_fx as backend
    from tests.zoo.samples import build

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            sample = build("mixtral", "eager", config=dict(num_hidden_layers=1))
            torch.compile(sample.model, backend=backend, options={"inner_backend": "eager"})(**sample.inputs)
            assert moe_fx.last_report().num_fused == 1
    torch._dynamo.reset()


def observe(sample: Any) -> dict[str, Any]:
    """Graphs with their ops, breaks, guards, recompiles and results over several lengths."""
    import torch
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []

    def counting(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(len(gm.graph.nodes))
        return gm.forward

    model = torch.compile(sample.model, backend=counting)
    results = []
    for length in (11, 13, 17):
        results.append(digest(sample.output(model(**sample.inputs_of(2, length)))[0]))
    entries = _debug_get_cache_entry_list(type(sample.model).forward)
    return {
        "graphs": graphs,
        "breaks": {str(k).splitlines()[0]: v for k, v in counters["graph_break"].items()},
        "stats": dict(counters["stats"]),
        "frames": dict(counters["frames"]),
        "guards": [len(str(entry.guard_manager).splitlines()) for entry in entries],
        "results": results,
    }


def export(sample: Any) -> dict[str, Any]:
    import torch

    torch._dynamo.reset()
    program = torch.export.export(sample.model, (), dict(sample.inputs))
    ops = [str(n.target) for n in program.graph.nodes]
    return {
        "ops": [len(ops), hashlib.sha256("\n".join(ops).encode()).hexdigest()],
        "result": digest(sample.output(program.module()(**sample.inputs))[0]),
    }


def train(sample: Any) -> dict[str, str]:
    import torch

    torch._dynamo.reset()
    with torch.enable_grad():
        model = torch.compile(sample.model, backend="eager")
        sample.output(model(**sample.inputs))[0].square().mean().backward()
    return {name: digest(p.grad) for name, p in sample.model.named_parameters() if p.grad is not None}


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    main(sys.argv[1])
