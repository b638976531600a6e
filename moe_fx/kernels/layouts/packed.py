"""Packed layouts: what every library's kernel wants of each weight, as a table of chains of transforms.

A row is a backend and a scheme (how the weights are held): role → the steps from a canonical tensor of one expert to
the packed one.  Canonical are: w13 [2I, H] rows gate then up, w2 [H, I]; codes of 4 bits two a byte, the first lowest,
int4 unsigned with zero 8; scales [rows / group rows, cols / group cols], biases [out].  An empty chain reads the
model's tensor as it is; a role that a row does not list is one that its kernel does not take.
Where H is padded too, the caller pads what goes in and cuts what comes out.
Facts: the libraries' documents and sources, compared with their own functions where these run without a GPU.
Left out, as their only rule is a function on the GPU: FlashInfer's Hopper kernel for mxfp4 x bfloat16, W4A8 of CUTLASS,
the swizzled values of triton_kernels.  Left out besides: zero points, ungated experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms import (
    AiterLanes,
    AiterScales,
    AiterShuffle,
    BlockMajorK,
    Cast,
    Clamp,
    ColumnMajor,
    ExpandRows,
    Flatten,
    FlipBits,
    InterleaveRows,
    MarlinBias,
    MarlinByteScales,
    MarlinExponent,
    MarlinS0E5M3,
    MarlinScales,
    MarlinWeights,
    PackE8M0,
    Pad,
    RequantiseCodes,
    RequantiseScales,
    ShuffleMatrixA,
    SwapHalves,
    Swizzle128x4,
    Transform,
    Transpose,
    Vnni,
    VnniInt8,
    VnniNibbles,
    WholeBlocks,
    span,
)

Chain = tuple[Transform, ...]
Tensors = Tensor | list[Tensor]  # stacked [E, ...], or one tensor an expert


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """One row of the table.  Of a role, all experts have one shape, dtype and device; ValueError otherwise.

    ``partner``: for chains with paired steps, the other tensors of the same matrix (codes: the scales; scales: the
    codes), as the model holds them.
    """

    backend: str
    scheme: str
    chains: Mapping[str, Chain]

    def chain(self, role: str) -> Chain:
        """The steps of that role; KeyError lists the roles that the kernel takes."""
        if role not in self.chains:
            raise KeyError(f"{self.backend} takes no {role} of {self.scheme}; it takes: {', '.join(self.chains)}")
        return self.chains[role]

    def copies(self, role: str) -> bool:
        """A copy is needed; otherwise the kernel reads what the model holds."""
        return bool(self.chain(role))

    def loss(self, role: str) -> str:
        """What ``unpack`` cannot bring back, in words; "" if it brings back every bit."""
        return "; ".join(step.loss for step in self.chain(role) if step.loss)

    def packed(self, role: str, like: Tensor, experts: int, partner: Tensor | None = None) -> Tensor:
        """The packed tensor of all experts on the meta device.  like, partner: one expert's; meta tensors will do."""
        return _stack(_likes(self.chain(role), like, partner)[-1], experts, torch.device("meta"))

    def bytes(self, role: str, like: Tensor, experts: int, partner: Tensor | None = None) -> int:
        """Of the packed tensor of all experts, padding included."""
        whole = self.packed(role, like, experts, partner)
        return span(whole) * whole.element_size()

    def fitted(self, role: str, tensors: Tensors) -> PackedLayout:
        """The layout whose steps for that role know what they need of all experts (``Transform.fit``)."""
        chain = tuple(step.fit(iter(tensors)) for step in self.chain(role))
        return replace(self, chains={**self.chains, role: chain})

    def pack(self, role: str, tensors: Tensors, partner: Tensors | None = None, out: Tensor | None = None) -> Tensor:
        """The tensors of all experts → [E, *packed shape], expert by expert into ``out`` (None: a new buffer).

        Memory beside the result: what the steps of one expert need.
        """
        if len({(t.shape, t.dtype, t.device) for t in tensors}) != 1:
            raise ValueError(f"the {len(tensors)} tensors of {role} differ in shape, dtype or device")
        chain, partners = self.chain(role), [None] * len(tensors) if partner is None else partner
        if len(partners) != len(tensors):
            raise ValueError(f"{len(partners)} partners for {len(tensors)} tensors of {role}")
        want = self.packed(role, tensors[0], len(tensors), partners[0])
        if out is None:
            out = _stack(want[0], len(tensors), tensors[0].device)
        elif (out.shape, out.stride(), out.dtype) != (want.shape, want.stride(), want.dtype):
            raise ValueError(
                f"out is {_describe(out)}; {role} of {self.backend} for {self.scheme} is {_describe(want)}"
            )
        with torch.no_grad():
            for e in range(len(tensors)):
                out[e].copy_(_apply(chain, tensors[e], partners[e]))
        return out

    def unpack(self, role: str, packed: Tensor, like: Tensor, partner: Tensor | None = None) -> Tensor:
        """Inverse of ``pack``: [E, *like.shape].  like, partner: one expert's canonical ones; meta tensors will do."""
        likes = _likes(self.chain(role), like, partner)
        out = torch.empty(len(packed), *like.shape, dtype=like.dtype, device=packed.device)
        for e in range(len(packed)):
            tensor = packed[e]
            for step, before in zip(reversed(self.chain(role)), reversed(likes[:-1]), strict=True):
                tensor = step.unpack(tensor, before)
            out[e].copy_(tensor)
        return out


def _apply(chain: Chain, tensor: Tensor, partner: Tensor | None) -> Tensor:
    for step in chain:
        tensor = step.pack(tensor, partner if step.paired else None)
    return tensor


def _likes(chain: Chain, like: Tensor, partner: Tensor | None) -> list[Tensor]:
    """Meta tensors before every step of the chain, and after the last."""
    likes = [torch.empty(like.shape, dtype=like.dtype, device="meta")]
    other = None if partner is None else torch.empty(partner.shape, dtype=partner.dtype, device="meta")
    for step in chain:
        likes.append(step.pack(likes[-1], other if step.paired else None))
    return likes


def _stack(like: Tensor, experts: int, device: torch.device) -> Tensor:
    """A new [experts, *like.shape] with the strides of ``like`` an expert; holes are zero, the rest is unwritten."""
    size = span(like)
    make = torch.zeros if size > like.numel() else torch.empty
    flat = make(experts * size, dtype=like.dtype, device=device)
    return flat.as_strided((experts, *like.shape), (size, *like.stride()))


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"


NONE: Chain = ()
ONE_E8M0 = 127  # the byte of 1.0
INT4_ZEROS = 0x88  # two int4 codes that mean 0
SWAP, SWIZZLE, CLAMP, FLOATS, BLOCKS = SwapHalves(), Swizzle128x4(), Clamp(1e-10), Cast("float32"), WholeBlocks()
UP_FIRST, UP_FIRST_64 = InterleaveRows(first="up"), InterleaveRows(64, first="up")  # swap_halves is in it
SHUFFLE, SHUFFLE_64, K_BLOCKS = ShuffleMatrixA(128), ShuffleMatrixA(64), BlockMajorK(128)
MARLIN_4, MARLIN_8, SCALES, BYTE_SCALES = MarlinWeights(4), MarlinWeights(8), MarlinScales(), MarlinByteScales()


def _halves(rows: int, cols: int = 1, fill: int = 0) -> Pad:
    """Of w13 and what goes with it: gate and up each by itself."""
    return Pad(rows=rows, cols=cols, halves=2, fill=fill)


def _weights(w13: Chain, w2: Chain) -> dict[str, Chain]:
    return {"w13": w13, "w2": w2}


def _scales(w13: Chain, w2: Chain) -> dict[str, Chain]:
    return {"w13_scale": w13, "w2_scale": w2}


def _biases(w13: Chain, w2: Chain) -> dict[str, Chain]:
    return {"w13_bias": w13, "w2_bias": w2}


SUFFIX: tuple[tuple[Literal["bfloat16", "float16"], str], ...] = (("bfloat16", ""), ("float16", "_fp16"))
Row = tuple[str, dict[str, Chain]]
AS_IS = _weights(NONE, NONE) | _scales(NONE, NONE)


def _triton() -> Iterator[Row]:
    for scheme in ("bf16", "fp8_tensor", "fp8_channel", "fp8_block", "int8_tensor", "int8_channel"):
        yield scheme, AS_IS | _biases(NONE, NONE)


def _vllm_cutlass() -> Iterator[Row]:
    for scheme in ("fp8_tensor", "fp8_channel"):
        yield scheme, AS_IS
    for scheme in ("nvfp4", "mxfp4"):
        yield scheme, _weights(NONE, NONE) | _scales((SWIZZLE,), (SWIZZLE,))


def _torch_grouped() -> Iterator[Row]:
    """The kernel views what it is given with the last two sizes transposed."""
    yield "bf16", _weights(NONE, NONE)


def _torch_scaled_grouped() -> Iterator[Row]:
    second, blocked = (Transpose(), ColumnMajor()), (SWIZZLE, Flatten())
    yield "fp8_channel", _weights(second, second) | _scales((Flatten(),), (Flatten(),))
    yield "mxfp8", _weights(second, second) | _scales(blocked, blocked)


def _flashinfer_cutlass() -> Iterator[Row]:
    yield "bf16", _weights((SWAP,), NONE)
    yield "fp8_tensor", _weights((_halves(16), SWAP), (Pad(cols=16),)) | _scales(NONE, NONE)
    yield "fp8_block", _weights((SWAP,), NONE) | _scales((BLOCKS, SWAP, CLAMP), (CLAMP,))
    nv = _scales((_halves(64), SWAP, SWIZZLE), (Pad(cols=4), SWIZZLE))  # 64: 2I rows are whole tiles of scales
    yield "nvfp4", _weights((_halves(64), SWAP), (Pad(cols=32),)) | nv
    mx = _scales((_halves(128, 4, ONE_E8M0), SWAP, SWIZZLE), (Pad(128, 4, fill=ONE_E8M0), SWIZZLE))
    biases = _biases((_halves(128), SWAP), (Pad(128),))
    yield "mxfp4_mxfp8", _weights((_halves(128, 64), SWAP), (Pad(128, 64),)) | mx | biases


def _flashinfer_trtllm() -> Iterator[Row]:
    def scaled(up_to: int, codes: int, group: int, fill: int) -> dict[str, Chain]:
        """I up to ``up_to`` and H up to 256, ``codes`` in a stored element, ``group`` inputs a scale."""
        w13 = (UP_FIRST, SHUFFLE)
        return _weights((_halves(up_to, 256 // codes), *w13), (Pad(256, up_to // codes), SHUFFLE)) | _scales(
            (_halves(up_to, 256 // group, fill), *w13, SWIZZLE),
            (Pad(256, up_to // group, fill=fill), SHUFFLE, SWIZZLE),
        )

    yield "bf16", _weights((_halves(128), UP_FIRST, SHUFFLE, K_BLOCKS), (Pad(cols=128), SHUFFLE, K_BLOCKS))
    block = _scales((BLOCKS, SWAP, CLAMP), (CLAMP,))
    yield "fp8_block", _weights((SWAP, SHUFFLE_64, K_BLOCKS), (SHUFFLE_64, K_BLOCKS)) | block
    tensor = _weights((_halves(16), UP_FIRST, SHUFFLE), (Pad(cols=16), SHUFFLE))
    yield "fp8_tensor", tensor | _scales(NONE, NONE)
    yield "mxfp8", scaled(128, 1, 32, ONE_E8M0)
    yield "nvfp4", scaled(64, 2, 16, 0)
    biases = _biases((FLOATS, _halves(128), UP_FIRST, SHUFFLE), (FLOATS, Pad(256), SHUFFLE))
    yield "mxfp4", scaled(128, 2, 32, ONE_E8M0) | biases


def _flashinfer_cutedsl() -> Iterator[Row]:
    scales = _scales((_halves(64, 16), UP_FIRST_64, SWIZZLE), (Pad(256, 4), SWIZZLE))
    yield "nvfp4", _weights((_halves(64, 128), UP_FIRST_64), (Pad(256, 32),)) | scales


def _batched_deepgemm() -> Iterator[Row]:
    """Hopper reads fp8_block or fp8_block_ue8m0, Blackwell fp8_block_ue8m0_packed."""
    codes, scales = RequantiseCodes(), RequantiseScales()
    requantised, packed = _weights((codes,), (codes,)), (scales, ExpandRows(), PackE8M0(), ColumnMajor(16))
    yield "fp8_block", AS_IS
    yield "fp8_block_ue8m0", requantised | _scales((scales,), (scales,))
    yield "fp8_block_ue8m0_packed", requantised | _scales(packed, packed)


def _deepgemm() -> Iterator[Row]:
    """Blackwell only: codes as they are, their scales packed."""
    yield from _batched_deepgemm()
    aligned = (PackE8M0(), ColumnMajor(16))
    for scheme in ("mxfp8", "mxfp4"):
        yield scheme, _weights(NONE, NONE) | _scales(aligned, aligned)


def _marlin() -> Iterator[Row]:
    """fp8 for bfloat16 activations and, named _fp16, for float16; the scales of int codes have their dtype already."""
    biases, biases_128 = (_biases((_halves(rows), MarlinBias()), (MarlinBias(),)) for rows in (64, 128))
    fp8, fp8_128 = (_weights((_halves(i), MARLIN_8), (Pad(cols=i), MARLIN_8)) for i in (64, 128))
    fp4 = _weights((_halves(64), MARLIN_4), (Pad(cols=32), MARLIN_4))
    for dtype, suffix in SUFFIX:
        first, last = Cast(dtype), (SCALES, MarlinExponent(dtype))
        block, tensor = (ExpandRows(), first), (ExpandRows(-1), first)
        yield f"fp8_tensor{suffix}", fp8 | biases | _scales((*tensor, _halves(64), *last), (*tensor, *last))
        yield f"fp8_channel{suffix}", fp8 | biases | _scales((first, _halves(64), *last), (first, *last))
        yield f"fp8_block{suffix}", fp8_128 | biases_128 | _scales((*block, _halves(128), *last), (*block, *last))
    mx = (SCALES, BYTE_SCALES)
    mx_scales = _scales((_halves(64, fill=ONE_E8M0), *mx), (Pad(cols=2, fill=ONE_E8M0), *mx))
    yield "mxfp8", fp8 | biases | mx_scales
    yield "mxfp4", fp4 | biases | mx_scales
    nv = (*mx, MarlinS0E5M3())  # fitted to the scales: divide the global scale by its factor
    yield "nvfp4", fp4 | biases | _scales((_halves(64), *nv), (Pad(cols=4), *nv))
    for group, wide in ((0, 64), (32, 64), (64, 64), (128, 128)):  # 0: one scale a channel
        rest = _scales((_halves(wide), SCALES), (Pad(cols=wide // group if group else 1), SCALES))
        rest |= biases if wide == 64 else biases_128
        int4 = (_halves(wide, fill=INT4_ZEROS), MARLIN_4), (Pad(cols=wide // 2, fill=INT4_ZEROS), MARLIN_4)
        int8 = (_halves(wide), FlipBits(0x80), MARLIN_8), (Pad(cols=wide), FlipBits(0x80), MARLIN_8)
        yield f"int4_{group or 'channel'}", _weights(*int4) | rest
        yield f"int8_{group or 'channel'}", _weights(*int8) | rest


def _aiter() -> Iterator[Row]:
    small = (192, 64)  # up to 192 intermediate channels go up to 64, more of them to 128
    rows, shuffle = Pad(128, halves=2, small=small), AiterShuffle()
    padded = _weights((rows, shuffle), (Pad(cols=128, small=small), shuffle))
    yield "bf16", padded
    yield "fp8_tensor", padded | _scales(NONE, NONE)
    yield "fp8_channel", padded | _scales((rows,), NONE)
    yield "fp8_block", _weights((shuffle,), (shuffle,)) | _scales(NONE, NONE)
    lanes = _weights((AiterLanes(2),), (AiterLanes(),)) | _scales((AiterScales(2),), (AiterScales(),))
    yield "mxfp8", lanes
    biases = _biases((FLOATS,), (FLOATS,))
    yield "mxfp4_bf16", lanes | biases
    yield "mxfp4", _weights((shuffle,), (shuffle,)) | _scales((AiterScales(),), (AiterScales(),)) | biases


def _xpu() -> Iterator[Row]:
    for scheme in ("bf16", "mxfp4"):
        yield scheme, AS_IS | _biases(NONE, NONE)
    turned = _weights((Transpose(),), (Transpose(),))
    yield "fp8_tensor", turned | _scales(NONE, NONE)
    yield "fp8_block", turned | _scales((Transpose(),), (Transpose(),))


def _cpu() -> Iterator[Row]:
    """bf16 for plain vectors; the others for AMX."""
    for scheme, step in (("bf16", Vnni(1, 16)), ("bf16_amx", Vnni(2, 16))):
        yield scheme, _weights((_halves(32), step), (Pad(cols=32), step)) | _biases((_halves(32),), NONE)
    yield "fp8_block", _weights((Vnni(2, 32),), (Vnni(2, 32),)) | _scales(NONE, NONE)
    int8 = _weights((_halves(32), VnniInt8()), (Pad(cols=32), VnniInt8()))
    yield "int8_channel", int8 | _scales((_halves(32),), NONE)
    mx = _scales((Vnni(1, 32),), (Vnni(1, 32),))
    yield "mxfp4", _weights((VnniNibbles(),), (VnniNibbles(),)) | mx


TABLE: dict[str, Callable[[], Iterator[Row]]] = {
    "triton": _triton,
    "batched_triton": _triton,
    "vllm_cutlass": _vllm_cutlass,
    "torch_grouped": _torch_grouped,
    "torch_scaled_grouped": _torch_scaled_grouped,
    "flashinfer_cutlass": _flashinfer_cutlass,
    "flashinfer_trtllm": _flashinfer_trtllm,
    "flashinfer_cutedsl": _flashinfer_cutedsl,
    "deepgemm": _deepgemm,
    "batched_deepgemm": _batched_deepgemm,
    "marlin": _marlin,
    "batched_marlin": _marlin,
    "aiter": _aiter,
    "xpu": _xpu,
    "cpu": _cpu,
}
PACKED = {
    (backend, scheme): PackedLayout(backend, scheme, chains)
    for backend, rows in TABLE.items()
    for scheme, chains in rows()
}


def find_packed(backend: str, scheme: str) -> PackedLayout:
    """The row of that backend and scheme; KeyError lists the known ones."""
    if (backend, scheme) not in PACKED:
        schemes = [s for b, s in PACKED if b == backend]
        known = f"schemes of {backend}: {', '.join(schemes)}" if schemes else f"backends: {', '.join(TABLE)}"
        raise KeyError(f"no packed layout of {backend!r} for {scheme!r}; known {known}")
    return PACKED[backend, scheme]
