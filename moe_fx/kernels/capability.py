"""What a kernel can do, as data: a value that is not listed is refused (closed world)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moe_fx.quant import QuantKey

Scheme = tuple[QuantKey | None, QuantKey | None]  # of weights and of activations
PLAIN: Scheme = (None, None)
NO_ALL2ALL = "none"  # tokens stay on their rank


class Open(frozenset[Any]):
    """A set that lists the values known today and contains any other too: for the reference, which is always legal."""

    def __contains__(self, value: object) -> bool:
        return True


class RowSchemes(frozenset[Any]):
    """Every scheme whose activations are rounded row by row, or with given scales: none that takes a scale from all
    tokens at once."""

    def __contains__(self, value: object) -> bool:
        key = value[1] if isinstance(value, tuple) and len(value) == 2 else None
        return not isinstance(key, QuantKey) or key.static or (key.group.row == 1 and not key.global_scale)


@dataclass(frozen=True, slots=True)
class Capability:
    """Everything a kernel takes; what is not listed is refused.

    devices, archs: kinds and architectures of ``hardware.Device``; archs None: any of those kinds.
    dtypes: of the weights as stored, or that codes stand for; x and the routing weights may have any floating dtype.
    forms: storage forms it reads as they are ("stacked", "list", "flat"; a flat tensor binds as a stacked view).
    orders: of gate and up rows in one w13 that it reads.
    transposed: whether it reads matrices stored as [out, in] (False), [in, out] (True) or either.
    backward: the shared backward of ``kernels/experts/backward.py`` serves it, from up products that the kernel keeps
    ("save") or from new ones ("recompute"); or it is forward only ("").
    packages: names that must be in ``Device.installed``.
    gated: which of gated and ungated experts it takes.
    size_multiple: H and I are multiples of it.  most: largest size, by name of a field of ExpertSpec.
    compiled: it is written for a compiler, and goes into the graph in the place of the op (``Plan.inline``).
    schemes: pairs of weight key and activation key.
    all2all: backends it works behind; "none" where tokens stay.  expert_parallel: it takes ids of other ranks.
    monolithic: it contains the router, one of ``routing`` on logits of ``logits``.
    batched: it takes one batch an expert instead of a list of tokens.
    captures: architectures on which a call waits for nothing, so that a CUDA graph can hold it.
    batch_invariant: a token's result does not depend on the others.  lora: it takes adapters on experts.
    """

    devices: frozenset[str]
    dtypes: frozenset[str]
    activations: frozenset[str]
    forms: frozenset[str]
    biases: bool
    norms: frozenset[str]
    weight_on: frozenset[str]
    act_dtypes: frozenset[str]
    compute_dtypes: frozenset[str]
    accumulate: frozenset[str]
    out_dtypes: frozenset[str]
    transposed: frozenset[bool] = frozenset({False, True})
    orders: frozenset[str] = frozenset({"gate_up", "up_gate", "interleaved"})
    backward: Literal["save", "recompute", ""] = ""
    packages: frozenset[str] = frozenset()
    gated: frozenset[bool] = frozenset({True, False})
    size_multiple: int = 1
    most: tuple[tuple[str, int], ...] = ()
    compiled: bool = False
    archs: frozenset[str] | None = None
    schemes: frozenset[Scheme] = frozenset({PLAIN})
    all2all: frozenset[str] = frozenset({NO_ALL2ALL})
    expert_parallel: bool = True
    monolithic: bool = False
    routing: frozenset[str] = frozenset()
    logits: frozenset[str] = frozenset()
    batched: bool = False
    captures: frozenset[str] = frozenset()
    batch_invariant: bool = False
    lora: bool = False
