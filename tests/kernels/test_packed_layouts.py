"""Every row of the table of packed layouts: it inverts, keeps its address, has the bytes it says and streams.

Sizes and padding are compared with the libraries' own words (packed_cases.py), whole chains with their index rules over
lists of row numbers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_fx.kernels.layouts.packed import PACKED, find_packed
from moe_fx.kernels.layouts.transforms import span

from .packed_cases import BF16, E8, F8, F32, SIZES, U8, E, H, held, make, partners, size_of
from .transform_rules import raw

WHOLE, ODD = 256, 96  # intermediate sizes: one that nothing pads, one that nearly everything pads
REFUSED_ODD = {  # sizes that are not padded, as scales of blocks or tiles would straddle them
    ("flashinfer_cutlass", "fp8_block"): {"w13_scale"},
    ("flashinfer_trtllm", "fp8_block"): {"w13_scale", "w2"},
    **{("aiter", scheme): {"w2", "w2_scale"} for scheme in ("mxfp8", "mxfp4", "mxfp4_bf16")},
}
ROLES = [(*key, r) for key, layout in PACKED.items() for r in layout.chains if not key[0].startswith("batched")]
every_role = pytest.mark.parametrize("backend, scheme, role", ROLES)


@pytest.mark.parametrize("inner", [WHOLE, ODD])
@every_role
def test_it_inverts_and_says_its_bytes(backend: str, scheme: str, role: str, inner: int) -> None:
    torch.manual_seed(0)
    layout, tensors = find_packed(backend, scheme), make(scheme, role, inner)
    pairs = partners(scheme, role, inner)
    pair = None if pairs is None else pairs[0]
    if inner == ODD and role in REFUSED_ODD.get((backend, scheme), ()):
        with pytest.raises(ValueError, match=r"in multiples of|share a block"):
            layout.pack(role, tensors, pairs)
        return
    packed = layout.pack(role, tensors, pairs)
    assert packed.untyped_storage().nbytes() == layout.bytes(role, tensors[0], E, pair)
    want = layout.packed(role, tensors[0], E, pair)
    assert (packed.shape, packed.stride(), packed.dtype) == (want.shape, want.stride(), want.dtype)
    assert all(packed.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in tensors)
    back = layout.unpack(role, packed, tensors[0].to("meta"), None if pair is None else pair.to("meta"))
    same = all(raw(a) == raw(b) for a, b in zip(back, tensors, strict=True))
    assert same or layout.loss(role), "not bitwise, and no loss is stated"
    assert layout.copies(role) == (layout.chain(role) != ())


def test_batched_kernels_read_the_same() -> None:
    batched = [layout for key, layout in PACKED.items() if key[0].startswith("batched")]
    assert {layout.backend for layout in batched} == {"batched_triton", "batched_deepgemm", "batched_marlin"}
    for layout in batched:
        assert layout.chains == find_packed(layout.backend.removeprefix("batched_"), layout.scheme).chains


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def test_the_table_has_the_libraries_rows() -> None:
    assert {(b, s) for b, schemes in SIZES.items() for s in schemes} == {(b, s) for b, s, _ in ROLES}


MEASURED = [
    (backend, scheme, role, inner, hidden)
    for backend, scheme, role in ROLES
    for inner, hidden, taken in (
        (WHOLE, H, True),
        (ODD, H, role not in REFUSED_ODD.get((backend, scheme), ())),
        (160, 320, SIZES[backend][scheme].h > 1),
        (32, H, backend == "aiter" and SIZES[backend][scheme].i == 64),
        (576, 320, backend == "aiter" and SIZES[backend][scheme].i == 64),
    )
    if taken
]


@pytest.mark.parametrize("backend, scheme, role, inner, hidden", MEASURED)
def test_it_has_the_size_that_the_library_says(backend: str, scheme: str, role: str, inner: int, hidden: int) -> None:
    size, (codes, packing, _, group) = SIZES[backend][scheme], held(scheme)
    like, pairs = make(scheme, role, inner, 1, hidden)[0], partners(scheme, role, inner, 1, hidden)
    wide = 128 if backend == "aiter" and size.i == 64 and inner > 192 else size.i
    rows, cols = size_of(role, up(inner, wide), up(hidden, size.h))
    lines, columns = -(-rows // (group[0] or rows)), -(-cols // (group[1] or cols))
    if role.endswith("_bias"):
        want = rows * (4 if size.wide else 2)
    elif not role.endswith("_scale"):
        want = rows * cols * codes.itemsize // packing + (4 * rows if size.sums else 0)
    elif size.scales == "as is":
        want = lines * columns * like.element_size()
    elif size.scales == "rows":
        want = rows * columns * 2
    else:
        lines = lines if group[0] == 1 else rows
        want = up(lines, 128 if size.scales == "tiles" else 4) * up(columns, 4)
    assert find_packed(backend, scheme).bytes(role, like, E, None if pairs is None else pairs[0]) == E * want


def numbers(tensor: Tensor, like: torch.dtype, nibbles: bool) -> Counter[float]:
    """What a tensor of numbers of that dtype holds, in any order."""
    if like in (F32, BF16):
        return Counter(tensor.float().flatten().tolist())
    return Counter(n for byte in raw(tensor) for n in ((byte & 15, byte >> 4) if nibbles else (byte,)))


KEPT = [
    (backend, scheme, role)
    for backend, scheme, role in ROLES
    if not find_packed(backend, scheme).loss(role)
    and role not in REFUSED_ODD.get((backend, scheme), ())
    and not (SIZES[backend][scheme].sums and role in ("w13", "w2"))
]


@pytest.mark.parametrize("backend, scheme, role", KEPT)
def test_nothing_is_added_but_zeros(backend: str, scheme: str, role: str) -> None:
    """The packed numbers are the model's; padded codes mean 0, padded scales are 0, or 1 in e8m0."""
    (tensor,), form = make(scheme, role, ODD, 1), held(scheme)
    packed = find_packed(backend, scheme).pack(role, [tensor], partners(scheme, role, ODD, 1))
    is_codes = role in ("w13", "w2")
    nibbles, zero = is_codes and form.packing == 2, 8 if scheme.startswith("int4") and is_codes else 0
    if backend == "marlin" and scheme.startswith("int8") and is_codes:
        packed = packed.view(U8) ^ 0x80  # its codes are 128 more
    before, after = (numbers(t, tensor.dtype, nibbles) for t in (tensor, packed))
    ones = tensor.dtype == E8 and SIZES[backend][scheme].i > 1
    assert not before - after, "numbers are missing"
    assert set(after - before) <= {zero, *([127] if ones else [])}
    assert not ones or (after - before)[127] > 0


def test_rows_and_columns_of_cpu_blocks() -> None:
    (w,), (mx,) = make("bf16", "w13", WHOLE, 1), make("mxfp4", "w13", WHOLE, 1)
    plain, pairs = (find_packed("cpu", s).pack("w13", [w]).flatten() for s in ("bf16", "bf16_amx"))
    assert torch.equal(plain[:16], w[:16, 0]) and torch.equal(plain[16:32], w[:16, 1])
    assert torch.equal(pairs[:32], w[:16, :2].flatten()) and torch.equal(pairs[32:34], w[0, 2:4])
    bytes_of = find_packed("cpu", "mxfp4").pack("w13", [mx]).flatten()
    assert bytes_of[0] == (mx[0, 0] & 15 | mx[16, 0] << 4) and bytes_of[1] == (mx[0, 0] >> 4 | mx[16, 0] & 0xF0)


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4_bf16"])
def test_aiter_puts_rows_of_gate_before_those_of_up(scheme: str) -> None:
    (w13,), layout = make(scheme, "w13", WHOLE, 1), find_packed("aiter", scheme)
    flat, strip = raw(layout.pack("w13", [w13])), 16 * w13.shape[1]  # bytes of 16 rows
    for n, row in enumerate((0, WHOLE, 16, WHOLE + 16)):
        assert flat[n * strip :][:16] == raw(w13[row, :16])
        assert flat[n * strip + 16 :][:16] == raw(w13[row + 1, :16])
    (scales,) = make(scheme, "w13_scale", WHOLE, 1)
    assert raw(layout.pack("w13_scale", [scales]))[:2] == raw(scales[[0, WHOLE], 0])
    (scales,) = make(scheme, "w2_scale", WHOLE, 1)
    assert raw(layout.pack("w2_scale", [scales]))[:2] == raw(scales[[0, 16], 0])


def test_what_is_lossy() -> None:
    """The whole list: nobody else loses a bit."""
    lossy = {(b, s, r) for b, s, r in ROLES if find_packed(b, s).loss(r)}
    scales, weights = {"w13_scale", "w2_scale"}, {"w13", "w2"}
    clamped = {(b, "fp8_block", r) for b in ("flashinfer_cutlass", "flashinfer_trtllm") for r in scales}
    ue8m0 = {(b, f"fp8_block_ue8m0{p}", r) for b in ("deepgemm",) for p in ("", "_packed") for r in scales | weights}
    marlin = {
        (b, s, r)
        for b in ("marlin",)
        for s in ("nvfp4", *(f"fp8_{g}{d}" for g in ("tensor", "channel", "block") for d in ("", "_fp16")))
        for r in scales
    }
    assert lossy == clamped | ue8m0 | marlin


@every_role
def test_refresh_keeps_the_address(backend: str, scheme: str, role: str) -> None:
    layout, tensors, pairs = find_packed(backend, scheme), make(scheme, role, WHOLE), partners(scheme, role, WHOLE)
    packed = layout.pack(role, tensors, pairs)
    fresh = make(scheme, role, WHOLE)
    assert layout.pack(role, fresh, pairs, packed) is packed
    assert raw(packed) == raw(layout.pack(role, fresh, pairs))
    stacked = torch.stack(fresh)
    assert raw(packed) == raw(layout.pack(role, stacked, None if pairs is None else torch.stack(pairs)))


class Live(TorchDispatchMode):
    """Bytes of the storages that ops made and that are still alive, and the most of them at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in old and storage not in self.known:
                    self.known.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


Packer = Callable[..., Tensor]


LARGEST_TEMPORARY = 11  # bytes a byte of the input or result: scales of one byte become float32, twice, and float16


def peak_beside_result(pack: Packer, scheme: str, role: str, experts: int) -> int:
    tensors, pairs = make(scheme, role, WHOLE, experts), partners(scheme, role, WHOLE, experts)
    with Live() as live:
        packed = pack(role, tensors, pairs)
    result = packed.untyped_storage().nbytes()
    assert live.now == result, "something but the result is still alive"
    return live.peak - result


@every_role
def test_packing_streams(backend: str, scheme: str, role: str) -> None:
    """The memory beside the result does not grow with the number of experts, and is a few times an expert's."""
    layout = find_packed(backend, scheme)
    few, many = (peak_beside_result(layout.pack, scheme, role, experts) for experts in (2, 9))
    assert few == many
    own, pairs = make(scheme, role, WHOLE, 1)[0], partners(scheme, role, WHOLE, 1)
    pair = None if pairs is None else pairs[0]
    read = [own] if pair is None or "ue8m0" not in scheme else [own, pair]
    bytes_of_one = max(layout.bytes(role, own, 1, pair), *(t.numel() * t.element_size() for t in read), 0)
    assert many <= bytes_of_one * LARGEST_TEMPORARY


def test_packing_that_does_not_stream_is_seen() -> None:
    """The meter of the test above: a packer that keeps every expert's result until the end."""

    def keeps(role: str, tensors: list[Tensor], pairs: list[Tensor] | None) -> Tensor:
        return torch.stack([find_packed("marlin", "int4_32").pack(role, [t])[0] for t in tensors])

    few, many = (peak_beside_result(keeps, "int4_32", "w13", experts) for experts in (2, 9))
    assert many > few > 0


def test_gate_and_up_are_padded_apart() -> None:
    gate, up = torch.full((24, H), 1.0).to(F8), torch.full((24, H), 2.0).to(F8)
    packed = find_packed("flashinfer_cutlass", "fp8_tensor").pack("w13", [torch.cat([gate, up])])
    assert packed[0, :, 0].float().tolist() == [2.0] * 24 + [0.0] * 8 + [1.0] * 24 + [0.0] * 8
    packed = find_packed("cpu", "bf16").pack("w13_bias", [torch.tensor([1.0, 2.0])])
    assert packed[0].tolist() == [1.0] + [0.0] * 31 + [2.0] + [0.0] * 31


def shuffled(rows: int, block: int) -> list[int]:
    """Row numbers of the source, from: row m of a block goes to (m % (block / 8)) * 8 + m // (block / 8)."""
    out = [0] * rows
    for m in range(rows):
        out[m // block * block + (m % block) % (block // 8) * 8 + (m % block) // (block // 8)] = m
    return out


def in_turn(rows: int) -> list[int]:
    return [half * rows // 2 + row for row in range(rows // 2) for half in (0, 1)]


@pytest.mark.parametrize("inner", [WHOLE, ODD])
def test_trtllm_bf16_is_the_rotated_index(inner: int) -> None:
    """Library: index = (in_turn[shuffled] + rows / 2) mod rows of the padded rows, then blocks of 64 columns."""
    (w13,), wide = make("bf16", "w13", inner, 1), -(-inner // 128) * 128
    padded = torch.zeros(2 * wide, H, dtype=BF16)
    padded[:inner], padded[wide : wide + inner] = w13[:inner], w13[inner:]
    rows = [(in_turn(2 * wide)[at] + wide) % (2 * wide) for at in shuffled(2 * wide, 32)]
    want = torch.stack([padded[rows, k : k + 64] for k in range(0, H, 64)])
    assert raw(find_packed("flashinfer_trtllm", "bf16").pack("w13", [w13])) == raw(want)


def swizzled(scales: Tensor) -> bytes:
    """By coordinates: tile, row in 32, row / 32 in 4, column in 4."""
    out = bytearray(scales.numel())
    for r, row in enumerate(scales.view(U8).tolist()):
        for c, value in enumerate(row):
            tile = r // 128 * (scales.shape[1] // 4) + c // 4
            out[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = value
    return bytes(out)


def test_trtllm_scales_go_with_their_rows() -> None:
    """nvfp4: halves change places, rows in turn, mixed by 32, then tiles of 128 x 4; codes the same rows."""
    layout, scheme = find_packed("flashinfer_trtllm", "nvfp4"), "nvfp4"
    (codes,), (scales,) = make(scheme, "w13", WHOLE, 1), make(scheme, "w13_scale", WHOLE, 1)
    rows = [(in_turn(2 * WHOLE)[at] + WHOLE) % (2 * WHOLE) for at in shuffled(2 * WHOLE, 32)]
    assert raw(layout.pack("w13", [codes])) == raw(codes[rows])
    assert raw(layout.pack("w13_scale", [scales])) == swizzled(scales[rows])
    (scales,) = make(scheme, "w2_scale", WHOLE, 1)
    assert raw(layout.pack("w2_scale", [scales])) == swizzled(scales[shuffled(H, 32)])


def test_trtllm_fp8_block_swaps_before_it_shuffles() -> None:
    layout = find_packed("flashinfer_trtllm", "fp8_block")
    (codes,), (scales,) = make("fp8_block", "w13", WHOLE, 1), make("fp8_block", "w13_scale", WHOLE, 1)
    rows = [(at + WHOLE) % (2 * WHOLE) for at in shuffled(2 * WHOLE, 16)]
    want = torch.stack([codes[rows, k : k + 128] for k in range(0, H, 128)])
    assert raw(layout.pack("w13", [codes], [scales])) == raw(want)
    assert raw(layout.pack("w13_scale", [scales], [codes])) == raw(scales[[2, 3, 0, 1]])


def test_cutedsl_rows_go_by_64_up_first() -> None:
    (codes,) = make("nvfp4", "w13", WHOLE, 1)
    rows = [half * WHOLE + row + d for row in range(0, WHOLE, 64) for half in (1, 0) for d in range(64)]
    assert raw(find_packed("flashinfer_cutedsl", "nvfp4").pack("w13", [codes])) == raw(codes[rows])


def test_deepgemm_scales_are_read_back_by_the_kernels_formula() -> None:
    """A row's scale of inputs 128 j …: byte j % 4 of word j // 4, an exponent; rows 16-byte aligned, row-fastest."""
    inner, layout = 640, find_packed("deepgemm", "fp8_block_ue8m0_packed")
    codes, scales = make("fp8_block", "w2", inner, 1), make("fp8_block", "w2_scale", inner, 1)
    packed = layout.pack("w2_scale", scales, codes)
    plain = find_packed("deepgemm", "fp8_block_ue8m0").pack("w2_scale", scales, codes)[0]
    assert packed.shape == (1, H, 2) and packed.stride() == (2 * H, 1, H)
    for row in (0, 127, 128, H - 1):
        for j in range(5):
            exponent = int(packed[0, row, j // 4]) >> 8 * (j % 4) & 0xFF
            assert 2.0 ** (exponent - 127) == plain[row // 128, j].item()


def test_torch_reads_columns() -> None:
    (codes,) = make("fp8_channel", "w2", WHOLE, 1)
    packed = find_packed("torch_scaled_grouped", "fp8_channel").pack("w2", [codes])
    assert packed.shape == (1, WHOLE, H) and packed.stride() == (WHOLE * H, 1, WHOLE)
    assert raw(packed[0]) == raw(codes.t())


def test_marlin_fp8_scales_carry_the_exponent() -> None:
    """One scale a tensor becomes one a channel; times 2^120 in bfloat16; padded channels scale to 0."""
    layout = find_packed("marlin", "fp8_tensor")
    codes, scales = make("fp8_tensor", "w13", ODD, 1), [torch.tensor([[0.5]])]
    packed = layout.pack("w13_scale", scales, codes)
    assert packed.shape == (1, 1, 256) and packed.dtype == BF16
    assert sorted(packed.flatten().tolist()) == [0.0] * 64 + [2.0**119] * 192


def test_marlin_nvfp4_is_fitted_to_all_experts() -> None:
    scales = [torch.full((2 * WHOLE, H // 16), v).to(F8) for v in (48.0, 2.0**-9)]
    plain = find_packed("marlin", "nvfp4")
    fitted = plain.fitted("w13_scale", scales)
    assert fitted.chain("w13_scale")[-1].factor == 8.0 and plain.chain("w13_scale")[-1].factor == 1.0
    assert fitted.chain("w2_scale") == plain.chain("w2_scale")
    like = scales[0].to("meta")
    back = fitted.unpack("w13_scale", fitted.pack("w13_scale", scales), like)
    assert raw(back) == raw(torch.stack(scales))
    assert raw(plain.unpack("w13_scale", plain.pack("w13_scale", scales), like)[1]) == bytes(scales[1].numel())


def test_paired_steps_read_what_the_model_holds() -> None:
    """So they stand before all others."""
    for layout in PACKED.values():
        for chain in layout.chains.values():
            order = [step.paired for step in chain]
            assert order == sorted(order, reverse=True), layout


def test_parameters_pack_without_a_graph() -> None:
    packed = find_packed("flashinfer_cutlass", "bf16").pack("w13", [torch.nn.Parameter(torch.randn(4, 2))])
    assert not packed.requires_grad


def test_holes_are_zero() -> None:
    """And a single column keeps the stride that the kernel checks."""
    packed = find_packed("deepgemm", "mxfp8").pack("w13_scale", [torch.full((6, 4), 2.0).to(E8)] * 2)
    assert packed.shape == (2, 6, 1) and packed.stride() == (8, 1, 8) and span(packed) == 16
    assert packed.as_strided((2, 8), (8, 1)).tolist() == [[-0x7F7F7F80] * 6 + [0, 0]] * 2


def test_refusals() -> None:
    layout, good = find_packed("flashinfer_cutlass", "bf16"), torch.randn(4, 2)
    with pytest.raises(KeyError, match="no packed layout of 'marlin' for 'bf16'; known schemes of marlin: fp8_tensor"):
        find_packed("marlin", "bf16")
    with pytest.raises(KeyError, match="known backends: triton"):
        find_packed("no_such", "bf16")
    with pytest.raises(KeyError, match="takes no w13_bias of bf16; it takes: w13, w2"):
        layout.pack("w13_bias", [good])
    with pytest.raises(ValueError, match="differ in shape, dtype or device"):
        layout.pack("w13", [good, good.double()])
    with pytest.raises(ValueError, match=r"out is \[1, 4, 3\].*is \[1, 4, 2\]"):
        layout.pack("w13", [good], out=torch.empty(1, 4, 3))
    with pytest.raises(ValueError, match="1 partners for 2 tensors"):
        layout.pack("w13", [good, good], [good])
