"""Triton's interpreter, as far as it differs from a device: ``tl.dot`` of bfloat16.

The interpreter holds bfloat16 as bit patterns, which numpy's matmul takes for integers (3.6 and 3.9).  Mended, a
product of bfloat16 is that of the same numbers in float32, which is what a device computes.
"""

from __future__ import annotations

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


def _wide(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
