"""Storage: which tensors of the model hold the expert weights, and how.

A ``WeightBinding`` names, in order, the roles of the op's ``operands``.  It says nothing about values; ``bind`` turns
operands into ``Experts``: one uniform view, without a copy, from which the reference and the kernels read.
It prints to one line and parses back, like the spec.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_fx.quant import UNQUANTISED, QuantKey, QuantSpec, parse_key

Role = Literal[
    "w13", "w1", "w3", "w2", "w13_bias", "w1_bias", "w3_bias", "w2_bias", "norm", "router_bias", "expert_scale",
    "w13_scale", "w1_scale", "w3_scale", "w2_scale", "w13_zero", "w1_zero", "w3_zero", "w2_zero",
    "w13_gscale", "w1_gscale", "w3_gscale", "w2_gscale", "a1_scale", "a2_scale", "a1_gscale", "a2_gscale",
]  # fmt: skip
MATRICES: tuple[Role, ...] = ("w13", "w1", "w3", "w2")  # the other roles of the experts go with one of these
ACTIVATION_ROLES: tuple[Role, ...] = ("a1_scale", "a2_scale", "a1_gscale", "a2_gscale")  # one tensor each
ROUTER_ROLES: tuple[Role, ...] = ("router_bias", "expert_scale")  # one tensor [E] each, after all roles of the experts
Form = Literal["stacked", "list", "flat"]  # of a model's tensors
Packed = Literal["packed"]  # of a copy in the order of one library
Order = Literal["gate_up", "up_gate", "interleaved"]
GRAMMAR = "bind/1"


@dataclass(frozen=True, slots=True)
class Operand:
    """One role.

    form: "stacked" one tensor [E, out, in]; "list" E tensors [out, in]; "flat" one tensor [E*out, in]; "packed" one
    tensor [E, ...] that only the kernel reads whose layout it is.
    transposed: the last two sizes are [in, out].
    order: of the 2I rows of w13 and w13_bias: gate then up, up then gate, or gate and up in turn.
    Biases are [E, out] ("stacked") or E tensors [out] ("list"); norm is one tensor [H]; those of the router are [E];
    scales, zero points and global scales are as in ``Quantised``, and those of activations one tensor each.
    """

    role: Role
    form: Form | Packed = "stacked"
    transposed: bool = False
    order: Order = "gate_up"

    def count(self, experts: int) -> int:
        """How many tensors hold the role."""
        return experts if self.form == "list" and not self.shared else 1

    @property
    def shared(self) -> bool:
        """One tensor, not one an expert."""
        return self.role == "norm" or self.role in ACTIVATION_ROLES

    def __str__(self) -> str:
        return f"{self.role}:{self.form}:{'in_out' if self.transposed else 'out_in'}:{self.order}"


@dataclass(frozen=True, slots=True)
class WeightBinding:
    operands: tuple[Operand, ...]

    def __str__(self) -> str:
        return " ".join([GRAMMAR, *map(str, self.operands)])

    def role(self, role: Role) -> Operand | None:
        return next((o for o in self.operands if o.role == role), None)


@lru_cache(maxsize=4096)
def parse_binding(text: str) -> WeightBinding:
    """The binding that prints as ``text``; ValueError names the part that is wrong."""
    head, *parts = text.split()
    if head != GRAMMAR:
        raise ValueError(f"a binding of grammar {head!r} cannot be read; this version reads {GRAMMAR!r}")
    operands = []
    for part in parts:
        try:
            role, form, orientation, order = part.split(":")
        except ValueError:
            raise ValueError(f"{part!r} is not role:form:orientation:order") from None
        for value, allowed in ((role, Role), (form, Form), (order, Order)):
            if value not in get_args(allowed):
                raise ValueError(f"{value!r} in {part!r} is not one of {', '.join(get_args(allowed))}")
        operands.append(Operand(role, form, orientation == "in_out", order))  # type: ignore[arg-type]
    return WeightBinding(tuple(operands))


def split_router(binding: WeightBinding) -> tuple[WeightBinding, tuple[Role, ...]]:
    """(the binding of the experts alone, the router's roles: their tensors are the last operands).  ValueError where a
    router's role stands before one of the experts."""
    roles = tuple(o.role for o in binding.operands if o.role in ROUTER_ROLES)
    experts = binding.operands[: len(binding.operands) - len(roles)]
    if any(o.role in ROUTER_ROLES for o in experts):
        raise ValueError(f"the router's operands must come last: {binding}")
    return WeightBinding(experts), roles


@dataclass(frozen=True, slots=True)
class Quantised:
    """Matrices held as codes: those of all experts, or after ``[e]`` of one.

    codes: [E, out, in] of the key's dtype; of fewer than eight bits packed along ``in`` into uint8, lowest bits first
    (of nf4 and fp4_bnb the highest)
    (two codes a byte, or four in three bytes).  int4 is unsigned, 0 … 15.
    scale, zero: [E, *key.group.scales(out, in)]; zero uint8 or int8.  global_scale: float32 [E].
    """

    key: QuantKey
    codes: Tensor | list[Tensor]
    scale: Tensor | list[Tensor]
    zero: Tensor | list[Tensor] | None = None
    global_scale: Tensor | list[Tensor] | None = None

    def __getitem__(self, e: int) -> Quantised:
        zero = None if self.zero is None else self.zero[e]
        whole = None if self.global_scale is None else self.global_scale[e]
        return Quantised(self.key, self.codes[e], self.scale[e], zero, whole)

    @property
    def shape(self) -> torch.Size:
        """[(E,) out, in] of the matrices, as if they were not packed."""
        assert isinstance(self.codes, Tensor)
        packed = self.codes.shape
        bits = 8 if self.codes.dtype != torch.uint8 else self.key.bits
        return torch.Size([*packed[:-1], packed[-1] * 8 // bits])


Vectors = Tensor | list[Tensor]  # biases: [E, out], or E vectors [out]
Matrices = Tensor | list[Tensor] | Quantised  # [E, out, in], or E matrices [out, in]


@dataclass(frozen=True, slots=True)
class InputScales:
    """Given scales of the inputs of the two products, float32: one number, or [E] with one for each expert.

    a1, a2: of static keys.  a1_global, a2_global: of keys with a global scale; without one it comes from the values.
    """

    a1: Tensor | None = None
    a2: Tensor | None = None
    a1_global: Tensor | None = None
    a2_global: Tensor | None = None


@dataclass(slots=True)
class Experts:
    """Uniform view of the operands: matrices as [out, in], never copied.

    up: one member (w13, or w1 of an ungated expert) or two (gate, up).  bias: as many members, or none.
    order: of the rows of a single gated member.  scales: given ones of the activations.
    """

    up: tuple[Matrices, ...]
    down: Matrices
    up_bias: tuple[Vectors, ...]
    down_bias: Vectors | None
    norm: Tensor | None
    order: Order
    scales: InputScales = field(default_factory=InputScales)


def bind(binding: WeightBinding, operands: list[Tensor], experts: int, quant: QuantSpec = UNQUANTISED) -> Experts:
    """operands, in the order of ``binding`` (a "list" role takes E of them) → Experts."""
    found: dict[str, Vectors] = {}
    position = 0
    for operand in binding.operands:
        count = operand.count(experts)
        tensors = operands[position : position + count]
        position += count
        found[operand.role] = uniform(operand, tensors, experts)
    if position != len(operands):
        raise ValueError(f"{len(operands)} operands for a binding of {position}: {binding}")
    up_roles = ("w13",) if "w13" in found else ("w1", "w3") if "w3" in found else ("w1",)
    norm = found.get("norm")
    assert norm is None or isinstance(norm, Tensor)
    first = binding.role(up_roles[0])  # type: ignore[arg-type]
    return Experts(
        up=tuple(_matrices(found, role, quant.w13) for role in up_roles),
        down=_matrices(found, "w2", quant.w2),
        up_bias=tuple(found[f"{r}_bias"] for r in up_roles if f"{r}_bias" in found),
        down_bias=found.get("w2_bias"),
        norm=norm,
        order=first.order if first else "gate_up",
        scales=InputScales(*(t for role in ACTIVATION_ROLES if isinstance(t := found.get(role), Tensor | None))),
    )


def _matrices(found: dict[str, Vectors], role: str, key: str) -> Matrices:
    """The matrices of that role, with the scales that belong to their codes."""
    if not key:
        return found[role]
    zero, whole = found.get(f"{role}_zero"), found.get(f"{role}_gscale")
    return Quantised(parse_key(key), found[role], found[f"{role}_scale"], zero, whole)


def uniform(operand: Operand, tensors: list[Tensor], experts: int) -> Vectors:
    """The tensors of one role as ``Experts`` holds them: views, matrices as [out, in]."""
    if operand.shared or operand.role in ROUTER_ROLES:
        return tensors[0]
    if operand.role.endswith("_bias"):
        return list(tensors) if operand.form == "list" else tensors[0].view(experts, -1)
    if operand.role.endswith("_gscale"):
        return list(tensors) if operand.form == "list" else tensors[0]
    if operand.form == "list":
        return [t.t() for t in tensors] if operand.transposed else list(tensors)
    whole = tensors[0]
    if operand.form == "flat":
        whole = whole.view(experts, whole.shape[0] // experts, whole.shape[1])
    return whole.transpose(-2, -1) if operand.transposed else whole


def split_gate_up(rows: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """[..., 2I] → (gate [..., I], up [..., I]), views."""
    if order == "interleaved":
        return rows[..., 0::2], rows[..., 1::2]
    half = rows.shape[-1] // 2
    first, second = rows[..., :half], rows[..., half:]
    return (second, first) if order == "up_gate" else (first, second)


def join_gate_up(gate: Tensor, up: Tensor, order: Order) -> Tensor:
    """Inverse of ``split_gate_up``: a new tensor [..., 2I]."""
    if order == "interleaved":
        return torch.stack([gate, up], dim=-1).flatten(-2)
    return torch.cat([up, gate] if order == "up_gate" else [gate, up], dim=-1)
