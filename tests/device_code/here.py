"""Where device code runs here: on a GPU, or on the CPU by the interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_device = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED, reason="no GPU: `make interpreted` runs it, in a process of its own"
    ),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in a process of the interpreter")


def on_device(test: Any) -> Any:
    """Of a test in a file whose others compile."""
    for mark in needs_device:
        test = mark(test)
    return test
