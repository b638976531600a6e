"""A device that is described, not there: kernels are compiled for it, down to machine code, and not launched.

What a launch would be given is specialised and compiled as on the machine itself, so this sees what the interpreter
does not: types, what the compiler refuses, registers and shared memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_fx.kernels.triton import configs

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB of one block, by compute capability: CUDA's own table


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel.  spilled: bytes of registers that each thread keeps in memory."""

    name: str
    registers: int
    spilled: int
    shared: int
    ptx: str


@contextmanager
def described(capability: int) -> Iterator[list[Compiled]]:
    """Every launch inside is compiled for that device and listed; nothing runs, tensors keep what they hold."""
    made: list[Compiled] = []
    seen: set[int] = set()

    class Device:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return capability

        def get_current_stream(self, device: int) -> int:
            return 0

    def launch(kernel: JITFunction[Any], grid: Any) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> None:
            found = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            if id(found) not in seen:
                seen.add(id(found))
                made.append(_compiled(kernel.__name__, found))

        return compiled

    with (
        mock.patch.object(driver, "_active", Device()),
        mock.patch.object(JITFunction, "__getitem__", launch),
        mock.patch.object(configs, "_shared", return_value=SHARED[capability] << 10),
        torch.no_grad(),
    ):
        yield made


def _compiled(name: str, found: Any) -> Compiled:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    return Compiled(name, int(numbers[1]), int(numbers[2]), found.metadata.shared, found.asm["ptx"])
