"""What is asked of the oracle besides the mathematics: dtypes, training, and what the user insists on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from moe_fx.kernels.layouts import LAYOUTS as PACKED
from moe_fx.kernels.layouts.quantised import QUANTISED
from moe_fx.kernels.layouts.registry import LIBRARY_LAYOUTS
from moe_fx.plan import WORKSPACE_BYTES
from moe_fx.reasons import MoEFxOptionError

Memory = Literal["view", "copy", "replace"]
Policy = Literal["price", "priority"]

VIEW = "view"


def layouts() -> tuple[str, ...]:
    """Every layout of floats, in the order that decides between equal prices: no copy without a gain."""
    return (VIEW, *PACKED)


@dataclass(frozen=True, slots=True)
class Request:
    """dtype, weight_dtype: names of torch dtypes, of x and of the expert matrices ("" that of x).

    training: gradients of the weights are wanted.  kernel, layout: what the user insists on, None for no wish.
    memory: "view" reads the model's own storage; "copy" and "replace" allow a packed one.
    compiled: Inductor compiles the graph, so that a kernel may be written into it.
    captured: CUDA graphs will hold the calls, so that none may wait for the device.
    workspace_bytes: most that the workspaces of a call may take.
    policy: "price" sorts survivors by predicted time, "priority" by declared rank.
    Raises MoEFxOptionError for a value that is none of these.
    """

    dtype: str
    weight_dtype: str = ""
    training: bool = False
    kernel: str | None = None
    layout: str | None = None
    memory: Memory = "view"
    policy: Policy = "price"
    compiled: bool = False
    captured: bool = False
    workspace_bytes: int = WORKSPACE_BYTES

    def __post_init__(self) -> None:
        known = (
            ("memory", get_args(Memory)),
            ("policy", get_args(Policy)),
            ("layout", (None, *layouts(), QUANTISED, *LIBRARY_LAYOUTS)),
        )
        for name, allowed in known:
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise MoEFxOptionError(f"{name}={getattr(self, name)!r} is not one of {choices}")
        for name in (self.dtype, self.weight_dtype or self.dtype):
            if not isinstance(getattr(torch, name, None), torch.dtype):
                raise MoEFxOptionError(f"{name!r} is not the name of a torch dtype")
        if not getattr(torch, self.dtype).is_floating_point:
            raise MoEFxOptionError(f"dtype={self.dtype!r} of the hidden states is not a floating dtype")

    @property
    def weights(self) -> str:
        """dtype of the expert matrices."""
        return self.weight_dtype or self.dtype


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return int(getattr(torch, dtype).itemsize)
