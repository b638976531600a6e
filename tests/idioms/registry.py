"""Where programs are registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Program:
    """blocks: how many are fused.  batched: takes [B, S, H].  autocast: runs under bfloat16 autocast.
    missing: why it is not fused yet.  trains: fused where gradients are taken, too."""

    make: Callable[[], nn.Module]
    blocks: int = 1
    batched: bool = False
    autocast: bool = False
    missing: str = ""
    trains: bool = True


PROGRAMS: dict[str, Program] = {}


def program(
    *,
    name: str = "",
    blocks: int = 1,
    batched: bool = False,
    autocast: bool = False,
    missing: str = "",
    trains: bool = True,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        key = name or make.__name__  # type: ignore[attr-defined]
        assert key not in PROGRAMS, key
        PROGRAMS[key] = Program(make, blocks, batched, autocast, missing, trains)
        return make

    return register
