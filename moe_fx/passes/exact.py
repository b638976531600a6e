"""Run a region in float64 whatever dtypes it names, and watch the products with expert weights go by.

In float64 with every cast neutralised, a region is its mathematics: a specification that agrees to 1e-9 is the same
formula, whatever the spelling.  The watch gives MATCH the values it needs: what enters and leaves each projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from moe_fx.passes.coverage import Coverage
from moe_fx.passes.dataflow import target_name, target_name_of
from moe_fx.passes.regions import runnable

aten = torch.ops.aten
_EXACT = torch.float64

Tag = frozenset[str]


@dataclass(slots=True)
class Product:
    """One product with expert weights: data rows [n, in] → rows [n, out] (bias added, where one is)."""

    tag: Tag
    rows: Tensor
    out: Tensor
    bias: Tag = frozenset()


@dataclass
class Watch:
    """tags: storage address → the parameters that its values come from alone.  products: in order of execution.
    values: node name → its tensor when it was computed, unless parameters alone made it."""

    tags: dict[int, Tag] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    keep: list[Tensor] = field(default_factory=list)  # addresses stay unique while their tensors live
    _results: dict[int, Product] = field(default_factory=dict)

    def tag(self, t: Tensor, name: str) -> None:
        self.tags[_address(t)] = frozenset((name,))
        self.keep.append(t)

    def tag_of(self, t: object) -> Tag:
        return self.tags.get(_address(t), frozenset()) if isinstance(t, Tensor) else frozenset()

    def see(self, func: Any, args: tuple[Any, ...], out: object) -> None:
        """Called after every op."""
        if not isinstance(out, Tensor):
            outs = [o for o in out if isinstance(o, Tensor)] if isinstance(out, (tuple, list)) else []
            for o in outs:
                self._propagate(args, o)
            return
        if (shape := _PRODUCTS.get(func)) is not None:
            left, right, bias = shape
            self.product(args[left], args[right], None if bias is None else args[bias], out)
        elif func in (aten.add.Tensor, aten.add_.Tensor):
            self._bias(args, out)
        self._propagate(args, out)

    def product(self, left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``out = left @ right (+ bias)``: kept when one of the two is an expert weight."""
        if tag := self.tag_of(right):
            rows, result = left, out
        elif tag := self.tag_of(left):
            rows, result = right.transpose(-2, -1), out.transpose(-2, -1)
        else:
            return
        if self.tag_of(left) and self.tag_of(right):
            return
        product = Product(tag, _rows(rows), _rows(result), self.tag_of(bias))
        self.products.append(product)
        self._results[_address(out)] = product
        self.keep.append(out)

    def _bias(self, args: tuple[Any, ...], out: Tensor) -> None:
        for one, other in (args[:2], args[1::-1]):
            product = self._results.get(_address(one)) if isinstance(one, Tensor) else None
            if product is not None and self.tag_of(other) and out.numel() == product.out.numel():
                product.out, product.bias = out.detach().clone().reshape(product.out.shape), self.tag_of(other)
                self._results[_address(out)] = product
                self.keep.append(out)
                return

    def _propagate(self, args: tuple[Any, ...], out: Tensor) -> None:
        if not out.is_floating_point() or _address(out) in self.tags:
            return
        read: list[Tensor] = []
        for arg in args:
            read += [a for a in (arg if isinstance(arg, (tuple, list)) else (arg,)) if isinstance(a, Tensor)]
        floats = [a for a in read if a.is_floating_point()]
        found = [self.tag_of(a) for a in floats]
        if found and all(found):
            self.tags[_address(out)] = frozenset().union(*found)
            self.keep.append(out)


# product ops: positions of (left, right, bias)
_PRODUCTS: dict[Any, tuple[int, int, int | None]] = {
    aten.mm.default: (0, 1, None),
    aten.bmm.default: (0, 1, None),
    aten.mv.default: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
    aten.baddbmm.default: (1, 2, 0),
}


class Exact(TorchDispatchMode):
    """Everything floating is float64.  ``watch`` and ``coverage``, when given, see every op."""

    def __init__(self, watch: Watch | None = None, coverage: Coverage | None = None):
        super().__init__()
        self.watch, self.coverage = watch, coverage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{func} draws random numbers")
        args, kwargs = (tree_map_only((torch.dtype, torch.device), _real, tree) for tree in (args, kwargs))
        if func in (aten._softmax.default, aten._log_softmax.default):
            args = (*args[:2], False)
        if self.coverage is not None:
            self.coverage.before(func, args, kwargs)
        if func is aten.histc.default and not args[0].is_floating_point() and args[0].device.type == "cpu":
            out = func(args[0].to(_EXACT), *args[1:], **kwargs).to(args[0].dtype)  # a block that was captured for a GPU
        else:
            out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.is_floating_point() and out.dtype != _EXACT:
            out = out.to(_EXACT)
        if self.coverage is not None:
            self.coverage.after(func, args, kwargs, out)
        if self.watch is not None:
            self.watch.see(func, args, out)
        return out


def _real(wanted: torch.dtype | torch.device) -> torch.dtype | torch.device:
    """float64 for a floating dtype, and a device that holds values."""
    if isinstance(wanted, torch.device):
        return runnable(wanted)
    return _EXACT if wanted.is_floating_point else wanted


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _rows(t: Tensor) -> Tensor:
    return t.detach().reshape(-1, t.shape[-1]).clone()


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, **_: object) -> Tensor:
    """a [S, K], b [E, K, N], offs [E] inclusive ends → [S, N], as products that autograd knows in every dtype."""
    if offs is None:
        return a @ b
    if a.ndim != 2 or b.ndim != 3:
        raise NotImplementedError("grouped_mm other than [S, K] x [E, K, N]")
    ends = offs.tolist()
    parts = [a[start:end] @ b[e] for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat([*parts, a.new_zeros(a.shape[0] - ends[-1], b.shape[-1])])


_REPLACED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}


class _Runner(Interpreter):
    """Runs torch IR; grouped products, which know few dtypes, as plain ones (one product for the watch)."""

    def __init__(self, module: GraphModule, mode: Exact):
        super().__init__(module)
        self.mode = mode

    def run_node(self, n: Node) -> Any:
        if self.mode.coverage is not None:
            self.mode.coverage.node = n.name
        out = super().run_node(n)
        if self.mode.coverage is not None and target_name(n) in ("getitem", "__getitem__"):
            self.mode.coverage.cut(n, self.env.get(n.args[0]), out)  # type: ignore[arg-type]
        watch = self.mode.watch
        if watch is not None and isinstance(out, Tensor) and n.op.startswith("call") and not watch.tag_of(out):
            with _disable_current_modes():
                watch.values[n.name] = out.detach().clone()
        return out

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target_name_of(target) not in _REPLACED:
            return super().call_function(target, args, kwargs)
        watch, self.mode.watch = self.mode.watch, None
        try:
            out = grouped_mm(*args, **kwargs)
        finally:
            self.mode.watch = watch
        if watch is not None:
            watch.product(args[0], args[1], None, out)
        return out


def run_exact(
    module: GraphModule, inputs: list[Any], watch: Watch | None = None, coverage: Coverage | None = None
) -> tuple[Tensor, ...]:
    """The region's results on ``inputs`` (floating tensors in float64)."""
    with Exact(watch, coverage) as mode:
        return _Runner(module, mode).run(*inputs)
