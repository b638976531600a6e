"""zentorch's fused experts for AMD's CPUs: bfloat16 and int8 weights.

The library keeps packed weights of its own, by the ADDRESS of the tensor that it was given, for as long as the process
runs.  Left alone that is wrong in three ways: values that change are not seen, an address that is used again finds the
weights of another layer, and by default it packs in place, which destroys the weights that it was given.  Here

- it gets copies that the weight store owns (layout "zentorch"), never the model's own tensors;
- it packs out of place (ZENDNNL_MATMUL_WEIGHT_CACHE=1, read at the first call of the process; whether that is in force
  is tried out once, on tensors of ours);
- what it keeps is cleared before a call whose tensors were written since (the store writes a copy when the model's
  weights change) and when a copy dies.  Out of place that is safe at any time: other layers are packed anew.

The price is memory: beside the model's weights the copy, and two to three times their size inside the library.
"""

from __future__ import annotations

import os
import threading
import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.hardware import library_file
from moe_fx.kernels.libraries.adapter import RoutedExperts, Routing, adapter, biases_of, tensors_of
from moe_fx.reasons import MoEFxUnsupportedError
from moe_fx.spec import MoESpec

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "swiglu_oai": "swigluoai"}
OAI_PARAMS = (1.702, 7.0)  # built in
VARIABLE, OUT_OF_PLACE = "ZENDNNL_MATMUL_WEIGHT_CACHE", "1"


class Kept:
    """What the library has packed: the addresses that it knows, with the version of the tensor then.

    watched: addresses whose storage tells when it dies.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # around every call: some of its kernels may not run twice at once
        self.versions: dict[int, int] = {}
        self.watched: set[int] = set()

    def check(self, tensors: tuple[Tensor, ...]) -> None:
        """Call with the lock held, before the library sees ``tensors``."""
        if any(self.versions.get(t.data_ptr(), t._version) != t._version for t in tensors):
            self.clear()
        for tensor in tensors:
            address = tensor.data_ptr()
            self.versions[address] = tensor._version
            if address not in self.watched:
                self.watched.add(address)
                weakref.finalize(tensor.untyped_storage(), self.died, address).atexit = False

    def clear(self) -> None:
        """Call with the lock held."""
        torch.ops.zentorch.zentorch_clear_weight_cache()
        self.versions.clear()

    def died(self, address: int) -> None:
        """Runs wherever the storage is freed: it waits for no lock, and if a call is under way the next one clears."""
        self.watched.discard(address)
        if address not in self.versions:
            return
        self.versions[address] = -1  # equal to no tensor's version
        if self.lock.acquire(blocking=False):
            try:
                self.clear()
            finally:
                self.lock.release()


KEPT = Kept()
_HELD: list[tuple[Tensor, ...]] = []


@lru_cache(maxsize=1)
def ops() -> Any:
    """The library's ops, loaded if they are not.  MoEFxUnsupportedError where they cannot be used."""
    if not hasattr(torch.ops.zentorch, "zentorch_fused_moe"):
        path = library_file("zentorch")
        if path is None:
            raise MoEFxUnsupportedError("zentorch is not installed: pip install zentorch for this release of torch")
        torch.ops.load_library(str(path))
    set_here = VARIABLE not in os.environ
    os.environ.setdefault(VARIABLE, OUT_OF_PLACE)
    try:
        with KEPT.lock:
            if _packs_in_place():
                raise MoEFxUnsupportedError(
                    f"zentorch packs weights in place in this process, which destroys them: set {VARIABLE}="
                    f"{OUT_OF_PLACE} before its first call, or choose another kernel"
                )
    finally:
        if set_here:
            del os.environ[VARIABLE]
    return torch.ops.zentorch


def _packs_in_place() -> bool:
    """Tried out: the library does not tell.  Sizes at which it packs."""
    draw = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(8, n, 256, generator=draw).to(torch.bfloat16) for n in (512, 256))
    before, x = w13.clone(), torch.ones(40, 256, dtype=torch.bfloat16)
    ids = torch.arange(80, dtype=torch.int32).remainder(8).view(40, 2)
    arguments = (torch.empty_like(x), x, w13, w2, None, None, torch.ones(40, 2), ids, False, "silu")
    torch.ops.zentorch.zentorch_fused_moe(*arguments)
    if not torch.equal(before, w13):
        _HELD.append((w13, w2))  # clearing would destroy what others hold, and their address must not come back
        return True
    KEPT.clear()
    return False


@adapter("zentorch", rank=4, archs=frozenset({"avx512_bf16"}))  # where it was tried
class ZentorchExperts(RoutedExperts):
    """bfloat16 weights, or int8 ones with int8 inputs that are made inside."""

    hoards = 3.0

    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return "zentorch.interleaved" if spec.expert.act == "swiglu_oai" else "zentorch"

    @classmethod
    def refuses(cls, spec: MoESpec) -> tuple[str, str] | None:
        e = spec.expert
        if e.act == "swiglu_oai" and e.act_params != OAI_PARAMS:
            return "veto.activation", f"swiglu_oai with {e.act_params}; it has {OAI_PARAMS} built in"
        return super().refuses(spec)

    def call(self, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> Tensor:
        library, out = ops(), torch.empty_like(x)
        arguments = fused_moe_arguments(out, x, routed, experts, spec)
        with KEPT.lock:
            KEPT.check(arguments[2:4])
            library.zentorch_fused_moe(*arguments)
        return out


def fused_moe_arguments(out: Tensor, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> tuple[Any, ...]:
    """Of ``zentorch::zentorch_fused_moe``."""
    e, (up,) = spec.expert, experts.up
    E, H, I = e.experts, e.hidden, e.intermediate  # noqa: E741
    w13, s13 = tensors_of(up, (E, 2 * I, H))
    w2, s2 = tensors_of(experts.down, (E, H, I))
    biases = biases_of(experts, ((E, 2 * I), (E, H)), x.dtype)
    scales = () if s13 is None or s2 is None else (s13.squeeze(-1), s2.squeeze(-1))
    return (out, x, w13, w2, *biases, routed.weights, routed.ids, False, ACTIVATIONS[e.act], *scales)
