"""Every registered layout inverts, keeps its address and stays within its bytes, for every stored form."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from moe_fx.binding import Operand, WeightBinding, bind
from moe_fx.kernels.layouts import LAYOUTS, find_layout, layout

E, OUT, IN = 3, 6, 4
MATRICES = [Operand("w2", form, transposed) for form, transposed in product(["stacked", "list", "flat"], [False, True])]
OPERANDS = [*MATRICES, Operand("w2_bias"), Operand("w2_bias", "list"), Operand("norm")]


def tensors_of(operand: Operand, dtype: torch.dtype) -> list[Tensor]:
    size = [OUT] if operand.role != "w2" else [IN, OUT] if operand.transposed else [OUT, IN]
    if operand.role == "norm":
        return [torch.randn(OUT).to(dtype)]
    if operand.form == "list":
        return [torch.randn(size).to(dtype) for _ in range(E)]
    whole = torch.randn([E, *size]).to(dtype)
    return [whole.flatten(0, 1) if operand.form == "flat" else whole]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("operand", OPERANDS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_unpack_inverts_pack(name: str, operand: Operand, dtype: torch.dtype) -> None:
    chosen, tensors = find_layout(name), tensors_of(operand, dtype)
    if not chosen.copies(operand):
        assert chosen.target(operand) == operand
        assert chosen.bytes(operand, tensors) == 0
        return
    packed = chosen.pack(operand, tensors, E)
    assert packed.is_contiguous()
    assert packed.untyped_storage().nbytes() == chosen.bytes(operand, tensors)
    assert all(packed.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in tensors)
    back = chosen.unpack(operand, packed, E)
    assert len(back) == len(tensors)
    for a, b in zip(back, tensors, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.contiguous().view(torch.uint8), b.view(torch.uint8)), "not bitwise"


@pytest.mark.parametrize("name, operand", [(n, o) for n in LAYOUTS for o in OPERANDS if LAYOUTS[n].copies(o)], ids=str)
def test_refresh_keeps_the_address(name: str, operand: Operand) -> None:
    chosen, tensors = find_layout(name), tensors_of(operand, torch.float32)
    packed = chosen.pack(operand, tensors, E)
    fresh = tensors_of(operand, torch.float32)
    assert chosen.pack(operand, fresh, E, packed) is packed
    assert torch.equal(packed, chosen.pack(operand, fresh, E))


@pytest.mark.parametrize("operand", MATRICES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_read_the_same_matrices(name: str, operand: Operand) -> None:
    """bind(packed) and bind(original) name the same numbers."""
    chosen, tensors = find_layout(name), tensors_of(operand, torch.float32)
    packed = [chosen.pack(operand, tensors, E)] if chosen.copies(operand) else tensors
    first = Operand("w1", "list")
    w1 = [torch.zeros(1, 1)] * E
    before = bind(WeightBinding((first, operand)), [*w1, *tensors], E).down
    after = bind(WeightBinding((first, chosen.target(operand))), [*w1, *packed], E).down
    assert all(torch.equal(before[e], after[e]) for e in range(E))
    assert isinstance(after, Tensor), "a layout ends in one tensor"


def test_transposed_reads_along_rows() -> None:
    packed = find_layout("transposed").pack(Operand("w2", "list"), tensors_of(Operand("w2", "list"), torch.float32), E)
    assert packed.shape == (E, IN, OUT)


def test_mixed_dtypes_are_refused() -> None:
    tensors = [torch.zeros(OUT, IN), torch.zeros(OUT, IN).double(), torch.zeros(OUT, IN)]
    with pytest.raises(ValueError, match="differ in dtype"):
        find_layout("stacked").pack(Operand("w2", "list"), tensors, E)


def test_registry() -> None:
    with pytest.raises(KeyError, match="known: view, stacked, transposed"):
        find_layout("no_such")
    for taken in ("view", "stacked"):
        with pytest.raises(ValueError, match="registered twice"):
            layout(taken)(lambda operand: operand)
