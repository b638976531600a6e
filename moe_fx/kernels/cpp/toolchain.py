"""From the sources to a loaded library: one for each set of instructions, in ``cache`` by the hash of what made it."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from moe_fx import cache
from moe_fx.hardware import cxx_compiler
from moe_fx.reasons import MoEFxRuntimeError

SOURCE = Path(__file__).parent / "source"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# architecture, as ``hardware.Device.arch`` names it → flags; the host's own are not asked for, a cache may be shared
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "amx": (*_AVX512, "-mavx512bf16"),
    "neon": (),
}
# a product and a sum are one instruction; nothing else is allowed to change a result
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno")


@lru_cache(maxsize=8)
def library(arch: str) -> ctypes.CDLL:
    """The functions of the sources for ``arch``, a key of INSTRUCTIONS; the first call in a cache compiles for some
    ten seconds and says so on stderr.  MoEFxRuntimeError where there is no compiler, or it fails, with what it said."""
    found = cxx_compiler()
    if found is None:
        raise MoEFxRuntimeError("no C++ compiler for the CPU kernels: install g++, or name one in MOE_FX_CXX")
    command = [found, *FLAGS, *INSTRUCTIONS[arch]]
    path = cache.folder("cpp") / f"experts-{arch}-{_digest(command)}.so"
    if not path.exists():
        _compile(command, path)
    loaded = ctypes.CDLL(str(path))
    loaded.moe_fx_lanes.restype = ctypes.c_int64
    loaded.moe_fx_lanes.argtypes = (ctypes.c_int64, ctypes.c_int64)
    loaded.moe_fx_forward.restype = None
    return loaded


def _digest(command: list[str]) -> str:
    """Of the sources, the compiler and its flags."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    sources = b"".join(path.read_bytes() for path in sorted(SOURCE.iterdir()))
    return hashlib.sha256(b"\0".join([sources, version, " ".join(command).encode()])).hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    """Writes the library whole or not at all, whatever else writes it at the same time."""
    print("moe_fx: compiling the CPU kernels for this machine, once, some ten seconds …", file=sys.stderr, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        full = [*command, *map(str, sorted(SOURCE.glob("*.cpp"))), "-o", str(made)]
        done = subprocess.run(full, capture_output=True, text=True, check=False)
        if done.returncode:
            text = f"{' '.join(full)}\nfailed:\n{done.stderr[-2000:]}\n"
            hint = "name another compiler in MOE_FX_CXX, or set it to nothing to do without these kernels"
            raise MoEFxRuntimeError(text + hint)
        made.replace(path)
