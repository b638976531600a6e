"""From a spec and views of the weights to the launches of a forward: up, down, reduction, with a sort before them where
there are rows to sort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fx.binding import Experts, Matrices, Order, Quantised, split_gate_up
from moe_fx.kernels.triton import operands
from moe_fx.kernels.triton.configs import Config, choose
from moe_fx.kernels.triton.operands import Routed
from moe_fx.kernels.triton.products import down_kernel, up_kernel
from moe_fx.kernels.triton.reduction import reduce_kernel
from moe_fx.kernels.triton.tiles import Layer, measured
from moe_fx.spec import MoESpec

FEW = 64  # routed rows up to which nothing is sorted, where experts are not fewer
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
WIDE = 1024  # columns of one program of a reduction without a norm
Held = Tensor | list[Tensor]  # matrices or biases of E experts


@dataclass(frozen=True, slots=True)
class Job:
    """What all launches of a call share.  dtype: of the products.  routed: the rows, ``how`` they come, in ``tiles``
    tiles at most; up, down: tile sizes, of as many rows both."""

    spec: MoESpec
    dtype: torch.dtype
    routed: Routed
    how: str
    tiles: int
    up: Config
    down: Config

    @property
    def params(self) -> tuple[float, ...]:
        """p0 and p1 of the activation."""
        return (*self.spec.expert.act_params, 0.0, 0.0)[:2]

    def start(self, kernel: Any, config: Config, columns: int, inner: int, *args: object, **constants: object) -> None:
        """Launches a kernel of ``products``."""
        kernel[(self.tiles * triton.cdiv(columns, config.columns),)](
            *args,
            *(self.routed, self.tiles, columns, inner),
            **constants,
            HOW=self.how,
            DTYPE=DTYPES[self.dtype],
            PRECISION=precision(self.dtype),
            BM=config.rows,
            BN=config.columns,
            BK=config.inner,
            EVEN=inner % config.inner == 0,
            GROUP=config.group,
            num_warps=config.warps,
            num_stages=config.stages,
        )


def precision(dtype: torch.dtype) -> str:
    """Of ``tl.dot``: products of float32 are exact unless torch may round their inputs too.  ``allow_tf32`` says the
    same, but raises where somebody has set the newer name."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def listed(
    ids: Tensor, spec: MoESpec, dtype: torch.dtype, sort: bool, tiles_of: tuple[Config, Config] | None = None
) -> Job:
    """The job of a list of tokens: ids [T, k], not empty.  sort: also a handful of rows.  tiles_of: of the up and the
    down product, of as many rows both; None: what was measured, else what is usual."""
    e, size = spec.expert, ids.numel()
    up, down = tiles_of or _tiles(spec, dtype, size, ids.device)
    if not sort and size <= min(FEW, e.experts):
        return Job(spec, dtype, operands.apart(ids, e.experts), "apart", size, up, down)
    routed, tiles = operands.by_expert(ids, e.experts, up.rows)
    return Job(spec, dtype, routed, "sorted", tiles, up, down)


def _tiles(spec: MoESpec, dtype: torch.dtype, size: int, device: torch.device) -> tuple[Config, Config]:
    e, layer = spec.expert, Layer.of(spec, dtype)
    sizes = (size, e.experts, device, dtype.itemsize)
    known = None if spec.quant else measured(layer, size, device)  # products with codes take other tiles
    return known or (
        choose(*sizes, 1 + e.gated, e.intermediate),
        choose(*sizes, 1, e.hidden),
    )


def batched(counts: Tensor, most: int, spec: MoESpec, dtype: torch.dtype, rows: int) -> Job:
    """The job of one batch an expert, of ``most`` rows at most and ``rows`` in all; counts int32 [E]."""
    up, down = _tiles(spec, dtype, rows, counts.device)
    routed, tiles = operands.batches(counts, most, up.rows)
    return Job(spec, dtype, routed, "batched", tiles, up, down)


def up_products(
    job: Job, x: Tensor, weights: Tensor | None, experts: Experts, hidden: Tensor, kept: Sequence[Tensor] = ()
) -> None:
    """hidden [rows, I], in order of rows.  weights [T, k]: of the routing, where they are on the input.  kept: room for
    the products, [rows, out] for each member of ``experts.up``."""
    e = job.spec.expert
    gate, second, gate_bias, second_bias = _apart(experts, e.gated)
    places = None
    if kept:
        places = tuple(map(operands.rows, gate_and_up(kept, experts, e.gated)))
    job.start(
        up_kernel,
        job.up,
        e.intermediate,
        e.hidden,
        operands.rows(x),
        None if weights is None else operands.rows(weights),
        operands.rows(hidden),
        places,
        operands.matrices(gate),
        None if second is None else operands.matrices(second),
        None if gate_bias is None else operands.vectors(gate_bias),
        None if second_bias is None else operands.vectors(second_bias),
        *job.params,
        ACT=e.act,
        GATED=e.gated,
        PAIRED=e.gated and second is None,
    )


def gate_and_up(held: Sequence[Tensor], experts: Experts, gated: bool) -> tuple[Tensor, Tensor]:
    """Of up products as ``experts.up`` has members, views; of an ungated expert the one twice."""
    if len(held) == 2:
        return held[0], held[1]
    return split_gate_up(held[0], experts.order) if gated else (held[0], held[0])


def down_products(job: Job, hidden: Tensor, experts: Experts, out: Tensor) -> None:
    """out [rows, H] by flat position (of batches: in order of rows)."""
    e, bias = job.spec.expert, experts.down_bias
    job.start(
        down_kernel,
        job.down,
        e.hidden,
        e.intermediate,
        operands.rows(hidden),
        operands.rows(out),
        operands.matrices(experts.down),
        None if bias is None else operands.vectors(bias),
        ADD=False,
    )


def reduce(out: Tensor, weights: Tensor | None, ids: Tensor, spec: MoESpec, norm: Tensor | None, y: Tensor) -> None:
    """y [T, H] = the sums of out [T * k, H] over the slots, each after the norm and times its weight."""
    tokens, hidden = y.shape
    wide = triton.next_power_of_2(hidden) if spec.expert.norm else min(WIDE, triton.next_power_of_2(hidden))
    reduce_kernel[(tokens, triton.cdiv(hidden, wide))](
        operands.rows(out),
        None if weights is None else operands.rows(weights),
        operands.rows(ids),
        norm if spec.expert.norm else None,
        operands.rows(y),
        *(ids.shape[1], spec.expert.experts, hidden, spec.expert.norm_eps),
        NORM=spec.expert.norm,
        DTYPE=DTYPES[out.dtype],
        WIDE=wide,
    )


def _apart(experts: Experts, gated: bool) -> tuple[Held, Held | None, Held | None, Held | None]:
    """(gate, up, bias of gate, bias of up): views of the tensors that hold them; None where there is none.  Gate and up
    rows in turn stay together, as gate: apart they could not be read in one piece."""
    members = [_plain(matrices) for matrices in experts.up]
    biases = experts.up_bias or (None,) * len(members)
    if not gated or (len(members) == 1 and experts.order == "interleaved"):
        return members[0], None, biases[0], None
    if len(members) == 2:
        return members[0], members[1], biases[0], biases[1]
    halves = _halves(members[0], experts.order, -2)
    bias_halves = (None, None) if biases[0] is None else _halves(biases[0], experts.order, -1)
    return *halves, *bias_halves


def _plain(matrices: Matrices) -> Held:
    assert not isinstance(matrices, Quantised)  # its capability lists no codes
    return matrices


def _halves(held: Held, order: Order, dim: int) -> tuple[Held, Held]:
    """(gate, up) of rows that lie together along ``dim``."""
    if isinstance(held, list):
        pairs = [_halves(one, order, dim) for one in held]
        return [gate for gate, _ in pairs], [up for _, up in pairs]  # type: ignore[misc]
    gate, up = split_gate_up(held.transpose(dim, -1), order)
    return gate.transpose(dim, -1), up.transpose(dim, -1)
