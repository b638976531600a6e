"""On the way of a call nothing waits for the device: it runs on fake tensors of a GPU, where reading a value raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from .test_workspace import ROOM, Block


def picked(t: Tensor, index: Any) -> Tensor:
    dim = 0
    for one in index if isinstance(index, tuple) else (index,):
        if one is Ellipsis:
            dim = t.dim() - (len(index) - 1)
        elif isinstance(one, int):
            t = t.select(dim, one)
        elif isinstance(one, slice):
            t, dim = torch.ops.aten.slice.Tensor(t, dim, one.start, one.stop, one.step or 1), dim + 1
        else:
            t, dim = torch.ops.aten.index.Tensor(t, [None] * dim + [one]), dim + 1
    return t


UNGUARDED: dict[Any, Any] = {
    Tensor.__invert__: torch.ops.aten.bitwise_not.default,
    Tensor.copy_: torch.ops.aten.copy_.default,
}


class Unguarded(TorchFunctionMode):
    """Some of Python's operators ask for a device guard, which a torch without CUDA does not have: the same by ops."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return picked(*args)
        if func is Tensor.__setitem__:
            t, index, value = args
            if isinstance(index, Tensor):
                return torch.ops.aten.index_put_.default(t, [index], value)
            return torch.ops.aten.copy_.default(picked(t, index), value)
        return UNGUARDED.get(func, func)(*args, **(kwargs or {}))


def fake_run(name: str, tokens: int, room: int = ROOM) -> Tensor:
    """On fake tensors of a GPU: whatever reads a value raises."""
    real = Block(torch.bfloat16, tokens=tokens, hidden=16)
    with FakeTensorMode(), Unguarded():
        real.operands, (real.x, real.ids, real.weights) = (
            [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in some]
            for some in (real.operands, (real.x, real.ids, real.weights))
        )
        return real.run(name, room)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("room", [ROOM, 1])
@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("name", ["torch_grouped", "batched_loop", "gather_bmm"])
def test_nothing_waits_for_the_device(name: str, tokens: int, room: int) -> None:
    y = fake_run(name, tokens, room)
    assert (y.shape, y.device.type) == ((tokens, 16), "cuda")


def test_the_check_for_waiting_can_fail() -> None:
    """sorted_loop waits once, for the counts, as its text says."""
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        fake_run("sorted_loop", 9)
