"""Workspaces: memory that every call on one (device, stream, thread) uses anew.

Layers run one after the other on a stream, so they share it; another stream or thread (autograd's, say) has its own.
It grows in steps of a quarter of an octave, so that a range of token counts is served without a new allocation.  Memory
that is not plain is never shared: inside a CUDA graph a call gets memory of the graph's pool, and a tensor without
storage of its own (a compiler's fake one) gets another such.  What is held stays within a bound; more than that is
memory of one call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, of every buffer


class _Buffers(threading.local):
    """by_place: (device, stream) → bytes.  Belongs to one thread and dies with it."""

    def __init__(self) -> None:
        self.by_place: dict[tuple[torch.device, int], Tensor] = {}


_BUFFERS = _Buffers()


def size_of(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of tensors of these shapes, each on its own alignment."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape in shapes)


def workspaces(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, like: Tensor, most: int) -> list[Tensor]:
    """Tensors of these shapes with undefined values, valid until the next call here of the same place.

    like: a tensor of the device and kind.  most: bytes that may be held for later calls.
    """
    total = size_of(shapes, dtype)
    whole = _bytes(total, like, most)
    views, start = [], 0
    for shape in shapes:
        size = math.prod(shape) * dtype.itemsize
        views.append(whole[start : start + size].view(dtype).view(shape))
        start += _aligned(size)
    return views


def held_bytes() -> int:
    """Of all workspaces of this thread."""
    return sum(buffer.numel() for buffer in _BUFFERS.by_place.values())


def release() -> None:
    """Frees the workspaces of this thread; the next call allocates anew."""
    _BUFFERS.by_place.clear()


def _bytes(size: int, like: Tensor, most: int) -> Tensor:
    device = like.device
    captured = type(like) is Tensor and device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if type(like) is not Tensor or captured or size > most:
        return like.new_empty(size, dtype=torch.uint8)
    place = _place(device)
    held = _BUFFERS.by_place.get(place)
    if held is None or held.numel() < size:
        _BUFFERS.by_place.pop(place, None)  # before the new one is there, so that both never are
        del held
        held = torch.empty(max(size, min(_rounded(size), most)), dtype=torch.uint8, device=device)
        _BUFFERS.by_place[place] = held
    return held


def _place(device: torch.device) -> tuple[torch.device, int]:
    """(device, stream) of the call."""
    return device, torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _rounded(size: int) -> int:
    """Up to a quarter of an octave."""
    step = max(ALIGNMENT, (1 << max(size - 1, 1).bit_length()) // 8)
    return -(-size // step) * step
