"""The weight store: packed copies of expert weights, and whether they still are what the model holds.

In: a layout's name, a binding and the model's own tensors.  Out: ``Experts`` to run on.  "view" is the default, copies
nothing and is always right.  What ``quantize`` makes of the weights is a copy like any other: layout "quantised", whose
codes, scales and so on are several buffers an operand.  A copy is valid while, for every tensor,

- address, dtype, device, stride and shape are the same: they are the copy's key;
- the storage is alive: a finalizer on each storage drops the copy, so an address that is used again finds nothing, and
  a model that dies takes its copies with it;
- its version is the same and no optimizer has stepped since (``fused=True`` changes values, not versions); else the
  copy is refreshed in place and keeps its address.

Nothing shows ``p.data.mul_(…)``, writes through a numpy view, or writes that keep the version on purpose (FSDP2): after
such a write call ``invalidate``.  A replayed CUDA graph runs no check at all: ``invalidate`` and call once without it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from moe_fx.binding import Experts, Operand, WeightBinding, bind
from moe_fx.kernels.layouts import Packing, find_layout
from moe_fx.quant import UNQUANTISED, QuantSpec
from moe_fx.reasons import MoEFxOptionError, MoEFxRuntimeError

Key = tuple[Any, ...]
STALE: tuple[int, ...] = (-1,)  # equal to the versions of no list of tensors


@dataclass(slots=True)
class _Copy:
    """buffers: those of each operand, none where the model's tensors are read in place.  storages: addresses of the
    sources'.

    versions, epoch: of the sources when the buffers were last written.
    """

    binding: WeightBinding
    buffers: list[list[Tensor]]
    storages: frozenset[int]
    versions: tuple[int, ...]
    epoch: int
    finalizers: list[weakref.finalize] = field(default_factory=list)


class WeightStore:
    """Packed copies by layout and source.  Safe to call from several threads; see the module's text for what holds."""

    def __init__(self) -> None:
        self._copies: dict[Key, _Copy] = {}
        self._lock = threading.RLock()  # a finalizer may run inside of our own locked code
        self._epoch = 0
        self._hook: RemovableHandle | None = None

    def get(
        self,
        layout: str,
        binding: WeightBinding,
        operands: list[Tensor],
        experts: int,
        quant: QuantSpec = UNQUANTISED,
    ) -> Experts:
        """operands, in the order of ``binding`` → Experts in that layout, packed or refreshed if need be.

        quant: how the matrices of the result are held: codes that ``operands`` hold, or that layout "quantised" makes.
        Raises MoEFxOptionError for an unknown layout, and MoEFxRuntimeError where a copy may not be made: of a weight
        that requires grad while grad mode is on, of an inference tensor (it has no version), during CUDA graph capture.
        """
        if layout == "view":
            return bind(binding, operands, experts, quant)
        try:
            chosen = find_layout(layout, quant)
        except KeyError as error:
            raise MoEFxOptionError(error.args[0]) from None
        if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
            raise MoEFxRuntimeError(
                f"layout {layout!r} is a copy, and these weights require grad: train with layout='view' (and without "
                "quantize), or call the model under torch.no_grad()"
            )
        groups = by_operand(binding, operands, experts)
        with self._lock:
            copy = self._valid(chosen, binding, groups, experts)
        packed = [
            tensor
            for buffers, (_, tensors) in zip(copy.buffers, groups, strict=True)
            for tensor in (buffers or tensors)
        ]
        return bind(copy.binding, packed, experts, quant)

    def invalidate(self, module: nn.Module | None = None) -> int:
        """Copies of the module's parameters and buffers (None: all copies) are refreshed, in place, before their next
        use.  Returns how many."""
        owned = None if module is None else {_storage(t) for t in (*module.parameters(), *module.buffers())}
        with self._lock:
            hit = [c for c in self._copies.values() if owned is None or not owned.isdisjoint(c.storages)]
            for copy in hit:
                copy.versions = STALE
        return len(hit)

    def clear(self) -> None:
        """Frees every copy; the next call packs anew, at another address."""
        with self._lock:
            for key in list(self._copies):
                self._drop(key)

    def bytes(self) -> int:
        """Size of all copies."""
        with self._lock:
            buffers = [b for c in self._copies.values() for held in c.buffers for b in held]
        return sum(b.numel() * b.element_size() for b in buffers)

    def _valid(self, layout: Packing, binding: WeightBinding, groups: list[_Group], experts: int) -> _Copy:
        copied = [t for operand, tensors in groups if layout.copies(operand) for t in tensors]
        key = (layout, binding, experts, *((t.data_ptr(), t.dtype, t.device, t.stride(), t.shape) for t in copied))
        versions, epoch = _versions(copied), self._epoch  # before packing: a write meanwhile is seen by the next call
        copy = self._copies.get(key)
        if copy is None:
            buffers = _pack(layout, groups, experts, [[] for _ in groups])
            storages = {_storage(t): t.untyped_storage() for t in copied}
            copy = _Copy(layout.binding(binding), buffers, frozenset(storages), versions, epoch)
            if copied:
                copy.finalizers = [self._finalizer(s, key) for s in storages.values()]
                self._copies[key] = copy
                self._watch()
        elif copy.versions != versions or copy.epoch != epoch:
            _pack(layout, groups, experts, copy.buffers)
            copy.versions, copy.epoch = versions, epoch
        return copy

    def _finalizer(self, storage: torch.UntypedStorage, key: Key) -> weakref.finalize:
        finalizer = weakref.finalize(storage, _drop_from, weakref.ref(self), key)
        finalizer.atexit = False
        return finalizer

    def _drop(self, key: Key) -> None:
        with self._lock:
            copy = self._copies.pop(key, None)
            for finalizer in copy.finalizers if copy else ():
                finalizer.detach()
            self._watch()

    def _watch(self) -> None:
        """The optimizer hook exists exactly while there is a copy."""
        if self._copies and self._hook is None:
            self._hook = register_optimizer_step_post_hook(_step_hook(weakref.ref(self)))
        elif not self._copies and self._hook is not None:
            self._hook.remove()
            self._hook = None


_Group = tuple[Operand, list[Tensor]]


def _step_hook(store: weakref.ref[WeightStore]) -> Callable[..., None]:
    def stepped(*_: object) -> None:
        if (alive := store()) is not None:
            alive._epoch += 1

    return stepped


def _drop_from(store: weakref.ref[WeightStore], key: Key) -> None:
    if (alive := store()) is not None:
        alive._drop(key)


def by_operand(binding: WeightBinding, operands: list[Tensor], experts: int) -> list[_Group]:
    """Each operand of ``binding`` with its tensors; ValueError where their number is another."""
    groups, position = [], 0
    for operand in binding.operands:
        count = operand.count(experts)
        groups.append((operand, operands[position : position + count]))
        position += count
    if position != len(operands):
        raise ValueError(f"{len(operands)} operands for a binding of {position}: {binding}")
    return groups


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _versions(tensors: list[Tensor]) -> tuple[int, ...]:
    if any(t.is_inference() for t in tensors):
        raise MoEFxRuntimeError(
            "weights made under torch.inference_mode() have no version, so a packed copy of them could go stale "
            "unseen: build the model outside of inference mode, or use layout='view'"
        )
    return tuple(t._version for t in tensors)


def _pack(layout: Packing, groups: list[_Group], experts: int, buffers: list[list[Tensor]]) -> list[list[Tensor]]:
    """Writes the copies into ``buffers`` (empty: new ones) and returns them; none for operands that stay in place."""
    on_gpu = any(tensors[0].is_cuda for _, tensors in groups)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise MoEFxRuntimeError("weights would be packed during CUDA graph capture: call the model once before capture")
    if on_gpu:  # readers and writers of a copy may be on any stream, and packing is rare
        torch.cuda.synchronize()
    with torch.inference_mode(False), torch.no_grad():
        written = layout.write_all(groups, experts, buffers)
    if on_gpu:
        torch.cuda.synchronize()
    return written


STORE = WeightStore()
