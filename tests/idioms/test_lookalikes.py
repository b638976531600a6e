"""Near misses keep the original's results, in inference and in training, and are not fused where that is wrong."""

from __future__ import annotations

import pytest
import torch

import moe_fx

from . import lookalikes_effects, lookalikes_grads, lookalikes_numbers, lookalikes_sums  # noqa: F401  registers
from .harness import compiled, hidden_states, relative, run
from .lookalikes import LOOKALIKES


@pytest.mark.parametrize("name", list(LOOKALIKES))
def test_same_results(name: str) -> None:
    found = LOOKALIKES[name]
    torch.manual_seed(0)
    module = found.make().train(True)
    function = compiled(module, found.dynamic)
    lookalikes_effects.LOG.clear()
    if not found.inputs():
        run(function, module, (hidden_states(12),), backward=False)
    for args in found.inputs():
        state = {n: b.clone() for n, b in module.named_buffers()}
        own = run(module, module, args, found.train)
        for n, b in module.named_buffers():
            b.copy_(state[n])
        fused = run(function, module, args, found.train)
        for i, (mine, theirs) in enumerate(zip(fused.outputs, own.outputs, strict=True)):
            assert relative(mine, theirs) < 1e-5, f"output {i} differs"
        for n, theirs in own.grads.items():
            assert relative(fused.grads[n], theirs) < 1e-4, f"gradient of {n} differs"
    report = moe_fx.last_report()
    assert not (found.never and report.num_fused), str(report)
    assert all(site.fused or site.rejects for site in report.sites)


def test_effects_happen() -> None:
    """What a custom op does in an expert is done as often as in the original."""
    module = LOOKALIKES["CustomOpWithEffect"].make()
    counts = []
    for function in (module, compiled(module)):
        lookalikes_effects.LOG.clear()
        run(function, module, (hidden_states(12),), backward=False)
        counts.append(len(lookalikes_effects.LOG))
    assert counts[0] == counts[1] > 0


def test_there_are_enough() -> None:
    assert len(LOOKALIKES) >= 30
