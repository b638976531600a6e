"""Triton's interpreter, as far as it differs from a device: ``tl.dot`` of bfloat16, and programs one after the other.

The interpreter holds bfloat16 as bit patterns, which numpy's matmul takes for integers (3.6 and 3.9).  Mended, a
product of bfloat16 is that of the same numbers in float32, which is what a device computes.
Programs run in order, so that one which writes what belongs to a later one goes unseen: ``backwards`` lets the last run
first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Once a process, before the first launch."""
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, _wide(a), _wide(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    in_order = interpreter.InterpreterBuilder.set_grid_idx

    def set_grid_idx(self: Any, *place: int) -> None:
        if _BACKWARDS:
            place = tuple(size - 1 - at for size, at in zip(self.grid_dim, place, strict=True))
        in_order(self, *place)

    interpreter.InterpreterBuilder.set_grid_idx = set_grid_idx


_BACKWARDS: list[bool] = []  # not empty: programs run from the last to the first


@contextmanager
def backwards() -> Iterator[None]:
    _BACKWARDS.append(True)
    try:
        yield
    finally:
        _BACKWARDS.pop()


def _wide(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
