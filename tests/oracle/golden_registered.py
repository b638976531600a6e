"""Golden plans of the kernels that are really registered, for the catalogue's GPUs of data centres and real layers.

device × layer × request × packages → the plan in short form, kept in golden_registered.json and reviewed as diffs: a
kernel, a capability or a cost that changes shows here which plans it moves.  Accept with
``python -m tests.oracle.golden_registered --accept`` or ``pytest tests/oracle --accept-golden``.
Packages are "ours", what our own kernels need, or "libraries", the sets of ``golden_selection``; then packed
copies are allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import moe_fx.kernels.experts  # noqa: F401  registers the built-in kernels
from moe_fx.binding import WeightBinding
from moe_fx.hardware import Device, catalogue
from moe_fx.kernels.registry import KERNELS, Kernel
from moe_fx.oracle import Request, choose
from moe_fx.plan import Plan
from moe_fx.quant import scheme_of
from moe_fx.spec import CombineSpec, MoESpec

from . import golden_selection
from .candidates import MODELS, STACKED, binding, moe
from .golden import Entries, Golden, short

GPUS = frozenset({"cuda", "rocm"})
OURS = frozenset({"triton", "moe_fx.triton", "torch.grouped_mm"})
SCALED = OURS | {"torch.scaled_grouped_mm"}  # an A100 has no products of eight-bit floats
DEVICES = {"h100": SCALED, "h200": SCALED, "b200": SCALED, "a100": OURS, "mi300x": SCALED}
LAYERS: dict[str, tuple[MoESpec, WeightBinding]] = {
    **{
        name: MODELS[name]
        for name in (
            "mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b", "granite-3.0-1b", "gpt-oss-20b", "deepseek-v3",
        )
    },
    # an eighth of the experts of each layer; ids of the others add nothing
    "deepseek-v3-ep8": (moe(32, 8, 7168, 2048, CombineSpec(accumulate="float32")), STACKED),
}  # fmt: skip
REQUESTS = {
    "bf16": Request("bfloat16"),
    "bf16 training": Request("bfloat16", training=True),
    "bf16 captured": Request("bfloat16", captured=True),
}
# name → a scheme, and layers whose checkpoints hold (or whose users make) such codes
CODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp8 block": ("fp8_w8a8_block", ("deepseek-v3-ep8", "qwen3-30b-a3b")),
    "fp8 rows": ("fp8_w8a8", ("mixtral-8x7b", "qwen3-30b-a3b")),
    "int4": ("int4_w4a16", ("mixtral-8x7b", "qwen3-30b-a3b")),
    "mxfp4": ("mxfp4_w4a16", ("gpt-oss-20b",)),
}


@dataclass(frozen=True, slots=True)
class Situation:
    device: str
    layer: str
    request: str
    packages: str = "ours"

    def __str__(self) -> str:
        return " | ".join((self.device, self.layer, self.request, self.packages))

    @property
    def machine(self) -> Device:
        if self.packages == "libraries":
            return golden_selection.DEVICES[self.device]
        return replace(catalogue()[self.device], installed=DEVICES[self.device])

    @property
    def kernels(self) -> dict[str, Kernel]:
        """Registered kernels of GPUs whose packages are there: what cannot be there is no line of a diff."""
        installed = self.machine.installed
        there = {name: kernel for name, kernel in KERNELS.items() if GPUS.intersection(kernel.capability.devices)}
        return {name: kernel for name, kernel in there.items() if kernel.capability.packages <= installed}

    @property
    def plan(self) -> Plan:
        spec, stored = held(self.layer, self.request)
        request = replace(
            REQUESTS.get(self.request, REQUESTS["bf16"]), memory="view" if self.packages == "ours" else "copy"
        )
        return choose(spec, stored, request, self.machine, self.kernels)


def held(layer: str, request: str) -> tuple[MoESpec, WeightBinding]:
    """The layer with its weights as the request says: plain, or codes [out, in] with their scales."""
    spec, stored = LAYERS[layer]
    if request not in CODES:
        return spec, stored
    e = spec.expert
    coded = replace(spec, quant=scheme_of(CODES[request][0], e.hidden, e.intermediate))
    order = stored.operands[0].order
    roles = (*(o.role for o in stored.operands), "w13_scale", "w2_scale")
    return coded, binding(*roles, order=order)


def situations() -> Iterator[Situation]:
    """Every layer and request with our own packages; with libraries what they are installed for, inference."""
    for device in DEVICES:
        plain = [(layer, request) for layer in LAYERS for request in REQUESTS]
        codes = [(layer, request) for request, (_, layers) in CODES.items() for layer in layers]
        yield from (Situation(device, *case) for case in (*plain, *codes))
        yield from (Situation(device, *case, "libraries") for case in (*plain, *codes) if "bf16 " not in case[1])


def produce() -> Entries:
    return {str(situation): short(situation.plan) for situation in situations()}


FILE = Golden("golden_registered.json", produce)

if __name__ == "__main__":
    FILE.main()
