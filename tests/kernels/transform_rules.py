"""The rules of the transforms, element by element: plain Python loops that use nothing of the code under test.

``RULES``: of steps that only move elements, where an element of the result comes from.  ``VALUES``: the bytes that
other steps give.  Sources: the libraries' documents; coordinates are spelt out rather than viewed and permuted.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms import Transform

F8, U8, F32 = torch.float8_e4m3fn, torch.uint8, torch.float32

From = tuple[int, ...] | int  # the place of an element of the input, or the byte of padding
Rule = Callable[[Transform, Tensor, tuple[int, ...]], From]


def _up(size: int, multiple: int) -> int:
    while size % multiple:
        size += 1
    return size


def _swap(_: Transform, t: Tensor, at: tuple[int, ...]) -> From:
    half = len(t) // 2
    return at[0] + half if at[0] < half else at[0] - half, *at[1:]


def _interleave(step: Transform, t: Tensor, at: tuple[int, ...]) -> From:
    turn, within = divmod(at[0], step.group)
    other = turn % 2 == (0 if step.first == "up" else 1)
    return (turn // 2) * step.group + within + (len(t) // 2 if other else 0), *at[1:]


def _deinterleave(step: Transform, t: Tensor, at: tuple[int, ...]) -> From:
    half, row = divmod(at[0], len(t) // 2)
    return (row // step.group * 2 + half) * step.group + row % step.group, *at[1:]


def _shuffle(step: Transform, t: Tensor, at: tuple[int, ...]) -> From:
    block = 32 if step.tile == 128 else 16
    goes = {(m % 4) * 8 + m // 4 if block == 32 else (m % 2) * 8 + m // 2: m for m in range(block)}
    return at[0] // block * block + goes[at[0] % block], *at[1:]


def _swizzle(_: Transform, t: Tensor, at: tuple[int, ...]) -> From:
    tiles = _up(t.shape[1], 4) // 4
    tile, inside = divmod(at[0] * tiles * 4 + at[1], 512)
    row = tile // tiles * 128 + inside % 16 // 4 * 32 + inside // 16
    col = tile % tiles * 4 + inside % 4
    return (row, col) if row < t.shape[0] and col < t.shape[1] else 0


def _pad(step: Transform, t: Tensor, at: tuple[int, ...]) -> From:
    part = len(t) // step.halves
    half, row = divmod(at[0], _up(part, step.small[1] if part <= step.small[0] else step.rows))
    inside = row < part and (len(at) == 1 or at[1] < t.shape[1])
    return (half * part + row, *at[1:]) if inside else step.fill


def _marlin_scales(step: Transform, t: Tensor, at: tuple[int, ...]) -> From:
    single = step.name == "marlin_bias" or t.shape[-1] == 1 or step.activation_bits == 8
    rule = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)] if single else None
    rule = rule or [i + 8 * j for i in range(8) for j in range(8)]
    channel = at[-1] // len(rule) * len(rule) + rule[at[-1] % len(rule)]
    return (channel, at[0]) if len(at) == 2 else (channel,)


def _aiter_tiles(step: Transform, t: Tensor, at: tuple[int, ...]) -> From:
    lanes = step.name == "aiter_lanes"
    run = 16 // t.element_size()
    wide = 64 if lanes else 32
    halves = step.halves if lanes else 1
    flat = at[0] * t.shape[1] + at[1]
    flat, k = divmod(flat, run)
    flat, row = divmod(flat, 16)
    flat, part = divmod(flat, wide // run)
    flat, col = divmod(flat, t.shape[1] // wide)
    block, half = divmod(flat, halves)
    return half * (len(t) // halves) + block * 16 + row, col * wide + part * run + k


def _aiter_scales(step: Transform, t: Tensor, at: tuple[int, ...]) -> From:
    tile, inside = divmod(at[0] * t.shape[1] + at[1], 256)
    row_tile, col_tile = divmod(tile, t.shape[1] // 8)
    c, rest = divmod(inside, 64)
    r, b, a = rest // 4, rest // 2 % 2, rest % 2
    row = a * (len(t) // 2) + row_tile * 16 + r if step.halves == 2 else row_tile * 32 + 16 * a + r
    return row, col_tile * 8 + 4 * b + c


def _vnni(step: Transform, t: Tensor, at: tuple[int, ...]) -> From:
    flat, g = divmod(at[0] * t.shape[1] + at[1], step.group)
    flat, row = divmod(flat, step.rows)
    block, k = divmod(flat, t.shape[1] // step.group)
    return block * step.rows + row, k * step.group + g


RULES: dict[str, Rule] = {
    "swap_halves": _swap,
    "interleave_rows": _interleave,
    "deinterleave_rows": _deinterleave,
    "shuffle_matrix_a": _shuffle,
    "block_major_k": lambda s, t, at: (at[1], at[0] * (s.width // t.element_size()) + at[2]),
    "swizzle_128x4": _swizzle,
    "pad": _pad,
    "column_major": lambda s, t, at: at,
    "transpose": lambda s, t, at: at[::-1],
    "flatten": lambda s, t, at: divmod(at[0], t.shape[1]),
    "marlin_scales": _marlin_scales,
    "marlin_bias": _marlin_scales,
    "marlin_byte_scales": lambda s, t, at: (at[0], at[1] // 4 * 4 + (0, 2, 1, 3)[at[1] % 4]),
    "aiter_shuffle": _aiter_tiles,
    "aiter_lanes": _aiter_tiles,
    "aiter_scales": _aiter_scales,
    "vnni": _vnni,
    "expand_rows": lambda s, t, at: (0 if s.block == -1 else at[0] // s.block, at[1]),
    "whole_blocks": lambda s, t, at: at,
}


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(U8).tolist())


def places(tensor: Tensor) -> Iterator[tuple[int, ...]]:
    return product(*map(range, tensor.shape))


def _words(values: list[int], bits: int) -> bytes:
    """Little end first, ``bits`` a value, in words of 32 bits."""
    each = 32 // bits
    words = [sum(v << bits * i for i, v in enumerate(values[n : n + each])) for n in range(0, len(values), each)]
    return struct.pack(f"<{len(words)}I", *words)


def _marlin_order(bits: int, activation_bits: int) -> list[int]:
    """Where code i of a run of 1024 comes from, from the published rule."""
    order: list[int] = []
    for i in range(32):
        col, one, wide = i // 4, [], activation_bits == 16
        for block in (0, 1):
            if wide:
                rows = [2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1]
            else:
                rows = [4 * (i % 4) + d for d in range(4)] + [4 * (i % 4 + 4) + d for d in range(4)]
            one += [16 * row + col + 8 * block for row in rows]
        for j in range(4 if wide else 2):
            order += [at + (256 if wide else 512) * j for at in one]
    turns = {(4, 16): [0, 2, 4, 6, 1, 3, 5, 7], (8, 16): [0, 2, 1, 3], (4, 8): [0, 4, 1, 5, 2, 6, 3, 7]}
    turn = turns.get((bits, activation_bits), [0])
    return [order[n + t] for n in range(0, 1024, len(turn)) for t in turn]


def _marlin_weights(step: Transform, t: Tensor) -> bytes:
    stored = [list(raw(row)) for row in t]
    if step.bits == 4:
        stored = [[code for byte in row for code in (byte & 15, byte >> 4)] for row in stored]
    high, outs, ins = 16 if step.activation_bits == 16 else 32, len(stored), len(stored[0])
    flat = [
        stored[n0 + n][k0 + k]
        for k0 in range(0, ins, high)
        for n0 in range(0, outs, 16)
        for k in range(high)
        for n in range(16)
    ]
    order = _marlin_order(step.bits, step.activation_bits)
    return _words([flat[run + at] for run in range(0, len(flat), 1024) for at in order], step.bits)


def _e5m3(step: Transform, t: Tensor) -> bytes:
    """float16(scale * factor * 128), its bits 7 … 14; below 2: 0."""
    values = [v * step.factor * 128 for v in t.float().flatten().tolist()]
    return bytes(struct.unpack("<H", struct.pack("<e", v))[0] >> 7 if v >= 2 else 0 for v in values)


def _exponents(step: Transform, t: Tensor) -> bytes:
    rows = [list(raw(row)) for row in t]
    if t.dtype == F32:
        rows = [[0 if v == 0 else math.frexp(v)[1] - 1 + 127 for v in row.tolist()] for row in t]
    return b"".join(bytes(row + [0] * (-len(row) % 4)) for row in rows)


def _vnni_int8(step: Transform, t: Tensor) -> bytes:
    out = b""
    for n in range(0, len(t), 32):
        block = t[n : n + 32].tolist()
        out += struct.pack(
            f"{32 * t.shape[1]}b", *(row[k + d] for k in range(0, t.shape[1], 4) for row in block for d in range(4))
        )
        out += struct.pack("<32i", *(128 * sum(row) for row in block))
    return out


def _vnni_nibbles(step: Transform, t: Tensor) -> bytes:
    codes = [[c for byte in row for c in (byte & 15, byte >> 4)] for row in t.tolist()]
    return bytes(
        codes[n + r][k + d] | codes[n + 16 + r][k + d] << 4
        for n in range(0, len(t), 32)
        for k in range(0, len(codes[0]), 2)
        for r in range(16)
        for d in range(2)
    )


E4M3 = {code: float(torch.tensor([code], dtype=U8).view(F8)) for code in range(127)}


def slow_requantise(codes: Tensor, scale: Tensor, block: int) -> tuple[list[int], list[float]]:
    """Codes and scales from the stated rule; the nearest code by search, the even one of two."""
    new: dict[tuple[int, int], float] = {}
    value = (
        codes.float().double()
        * scale.double().repeat_interleave(block, 0)[: len(codes)].repeat_interleave(block, 1)[:, : codes.shape[1]]
    )
    value = value.float().tolist()  # the product is rounded to float32
    for row, line in enumerate(value):
        for col, v in enumerate(line):
            at = row // block, col // block
            new[at] = max(new.get(at, 1e-4), abs(v))
    new = {at: 2.0 ** math.ceil(math.log2(v / 448)) for at, v in new.items()}
    out = []
    for row, line in enumerate(value):
        for col, v in enumerate(line):
            want = abs(v) / new[row // block, col // block]
            out.append(min(E4M3, key=lambda code: (abs(E4M3[code] - want), code % 2)) | (128 if v < 0 else 0))
    return out, [new[at] for at in sorted(new)]


def e4m3_step(value: float) -> float:
    """Distance of neighbouring codes around a value: three bits of mantissa, exponents from -6."""
    return 2.0 ** (max(math.frexp(value)[1] - 1, -6) - 3)


def _floats(change: Callable[[Transform, float], float]) -> Callable[[Transform, Tensor], bytes]:
    """The bytes of the changed values, in the dtype that packing gives."""

    def values(step: Transform, t: Tensor) -> bytes:
        dtype = getattr(torch, step.dtype) if step.name == "cast" else t.dtype
        return raw(torch.tensor([change(step, v) for v in t.flatten().tolist()], dtype=torch.float64).to(dtype))

    return values


VALUES: dict[str, Callable[[Transform, Tensor], bytes]] = {
    "clamp": _floats(lambda s, v: max(v, s.minimum)),
    "cast": _floats(lambda s, v: v),
    "marlin_exponent": _floats(lambda s, v: v * (2.0**8 if s.dtype == "float16" else 2.0**120)),
    "flip_bits": lambda s, t: bytes(b ^ s.mask for b in raw(t)),
    "marlin_s0e5m3": _e5m3,
    "pack_e8m0": _exponents,
    "pack_nibbles": lambda s, t: _words(t.flatten().tolist(), 4),
    "marlin_weights": _marlin_weights,
    "vnni_int8": _vnni_int8,
    "vnni_nibbles": _vnni_nibbles,
}
