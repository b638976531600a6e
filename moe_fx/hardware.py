"""A device as the oracle sees it: described, so that choices can be made and tested for machines that are not here."""

from __future__ import annotations

from dataclasses import dataclass


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
