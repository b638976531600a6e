"""PLAN: a block and the options → the oracle's plan for the device of its weights, measured if asked for.

With ``quantize`` there are two: one for the block as it is, which VERIFY runs, and when that is proved one for the same
mathematics with the weights as codes, of which the requests for a kernel or a measurement speak.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from moe_fx import __version__
from moe_fx.hardware import Device, detect
from moe_fx.kernels.layouts.quantised import QUANTISED
from moe_fx.kernels.registry import KERNELS
from moe_fx.lowerings.measure import Stopwatch, TunedPlans
from moe_fx.options import Options
from moe_fx.oracle import Request, choose, tuned
from moe_fx.passes.dataflow import fake, tensor
from moe_fx.passes.isolation import isolated
from moe_fx.passes.match import Proposal
from moe_fx.passes.products import input_keys
from moe_fx.passes.regions import Region, runnable
from moe_fx.passes.wrapped import is_wrapped
from moe_fx.plan import Plan
from moe_fx.quant import QuantSpec, scheme_of
from moe_fx.reasons import MoEFxUnsupportedError, Reject, out_of_memory
from moe_fx.reference.formats import FLOATS
from moe_fx.spec import MoESpec

_INPUTS: Final[tuple[Literal["a1", "a2"], ...]] = ("a1", "a2")


def plan_for(region: Region, proposal: Proposal, training: bool, options: Options) -> Plan:
    """The oracle's plan for a block as it is, measured where ``options.tune`` says so."""
    if options.quantize is not None:
        options = replace(options, kernel=None, layout=None, tune=False)
    return _plan(region, proposal, training, _before_routers(options))


def quantised_plan(
    region: Region, proposal: Proposal, plan: Plan, training: bool, options: Options
) -> tuple[Proposal, Plan]:
    """A proved block with its weights as ``options.quantize`` says, and the plan for that; without, what was given.

    Raises MoEFxUnsupportedError with every reason where it cannot be had.
    """
    name = options.quantize
    if name is None:
        return proposal, plan
    if training:
        raise MoEFxUnsupportedError(
            f"quantize={name!r} is for inference, and gradients are wanted through a block: call the model under "
            "torch.no_grad(), or drop the option"
        )
    if computed := [n.name for n in region.weight_nodes if not _kept(n)]:
        raise MoEFxUnsupportedError(
            f"quantize={name!r} would quantise in every call what the graph computes: {', '.join(computed[:3])}. Let "
            "the block read plain parameters (merge adapters, load unquantised weights), or drop the option"
        )
    x, w = (n.meta["example_value"].dtype for n in (region.x, region.down.params[0]))
    expert = proposal.spec.expert
    if x != w and not expert.compute_dtype:  # codes have no dtype of their own to compute in
        expert = replace(expert, compute_dtype=_name(w))  # type: ignore[arg-type]
    quant = scheme_of(name, expert.hidden, expert.intermediate)
    proposal = replace(proposal, spec=replace(proposal.spec, expert=expert, quant=quant))
    try:
        return proposal, _plan(region, proposal, training, replace(_before_routers(options), layout=QUANTISED))
    except MoEFxUnsupportedError as error:
        raise MoEFxUnsupportedError(f"quantize={name!r}: {error}") from None


def formed_plan(
    region: Region, forms: Iterable[Proposal | Reject], proved: tuple[Proposal, Plan], options: Options
) -> tuple[Proposal, Plan] | Reject:
    """The first of the forms in which the weights can be read that has a kernel, with its plan; ``proved`` for the form
    that was.  Raises MoEFxUnsupportedError where the kernel that was asked for reads none of them."""
    refused: MoEFxUnsupportedError | None = None
    for form in forms:
        if isinstance(form, Reject):
            if refused is not None:
                raise refused
            return form
        if form.spec == proved[0].spec:
            return form, proved[1]
        if _device(runnable(fake(form.operands[0]).device)).kind == "cpu":
            form = replace(form, spec=replace(form.spec, quant=_exact_inputs(form.spec.quant)))
        try:
            return form, plan_for(region, form, False, options)
        except MoEFxUnsupportedError as error:  # it may read what the graph makes of the codes
            refused = error
    raise AssertionError("the last form is a proved one or a Reject")


def _exact_inputs(quant: QuantSpec) -> QuantSpec:
    """Without the rounding of inputs to small floats, which no CPU multiplies: it would cost time and digits."""
    kept = {name: "" if (key := quant.key(name)) is None or key.dtype in FLOATS else str(key) for name in _INPUTS}
    return replace(quant, **kept)


def unrounded(region: Region, proposal: Proposal) -> str:
    """A note where the graph rounds inputs of products and the plan does not; "" otherwise."""
    keys = input_keys(region) or ("", "")
    quant = proposal.spec.quant
    dropped = [key for key, kept in zip(keys, (quant.a1, quant.a2), strict=True) if key and not kept]
    return f"inputs are not rounded to {dropped[0]}: a CPU does not multiply such numbers" if dropped else ""


def _before_routers(options: Options) -> Options:
    """A kernel that contains the router is asked for when the router is known (``WholePlans``)."""
    chosen = KERNELS.get(options.kernel or "")
    whole = chosen is not None and chosen.capability.monolithic and options.router == "fuse"
    return replace(options, kernel=None) if whole else options


class WholePlans:
    """Called for an experts call whose router goes into it: the plan's text, where ``options.kernel`` is one that
    contains the router; None for the plan that it has.  blocks: of every experts call; made: the plans."""

    def __init__(self, blocks: Mapping[Node, tuple[Region, Proposal]], options: Options):
        self.blocks, self.options = blocks, options
        self.made: dict[Node, Plan] = {}

    def __call__(self, call: Node, spec: MoESpec) -> str | None:
        if call not in self.blocks or _before_routers(self.options) == self.options:
            return None
        region, proposal = self.blocks[call]
        options = self.options if self.options.quantize is None else replace(self.options, layout=QUANTISED)
        self.made[call] = _plan(region, replace(proposal, spec=spec), region.training, options)
        return self.made[call].op_string()

    def kept(self, call: Node, reason: Reject | None) -> None:
        """The router stays: MoEFxUnsupportedError, with every reason, where the kernel asked for contains it."""
        try:
            self(call, self.blocks[call][1].spec)
        except MoEFxUnsupportedError as error:
            raise MoEFxUnsupportedError(f"{error}\n  the router stays: {reason}") from None


def _kept(node: Node) -> bool:
    """A plain parameter, or a view of one: the same memory in every call."""
    found = _storage(node)
    return found is not None and found in {_storage(n) for n in node.graph.find_nodes(op="placeholder")}


def _storage(node: Node) -> int | None:
    """None where there is none: of a number, of a tensor around others."""
    return None if tensor(node) is None or is_wrapped(node) else fake(node).untyped_storage()._cdata


def values_of(nodes: Sequence[Node], gm: GraphModule, inputs: Sequence[object]) -> list[Tensor] | None:
    """The tensors behind parameters and views of them, of ``gm`` or of a body of a higher-order op in it, which has the
    same fakes; None where there are no values: on meta, and where the graph is captured from fakes."""
    owners: dict[int, tuple[Tensor, Tensor]] = {}
    for node, held in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False):
        storage = _storage(node)
        if storage is None or not isinstance(held, Tensor) or isinstance(held, FakeTensor) or held.is_meta:
            continue
        owners[storage] = (fake(node), held)
    found = []
    for node in nodes:
        storage = _storage(node)
        if storage is None or storage not in owners:
            return None
        like, (whole, held) = fake(node), owners[storage]
        offset = held.storage_offset() + int(like.storage_offset()) - int(whole.storage_offset())
        found.append(held.as_strided([int(s) for s in like.shape], [int(s) for s in like.stride()], offset))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plan(region: Region, proposal: Proposal, training: bool, options: Options) -> Plan:
    x, w = (n.meta["example_value"] for n in (region.x, region.down.params[0]))
    request = Request(
        dtype=_name(x.dtype),
        weight_dtype=_name(w.dtype),
        training=training,
        kernel=options.kernel,
        layout=options.layout,
        memory=options.memory,
        policy=options.policy,
        compiled=options.inner_backend == "inductor",
        captured=options.captured,
        workspace_bytes=options.workspace_bytes,
    )
    device = _device(runnable(w.device))
    plan = choose(proposal.spec, proposal.binding, request, device, KERNELS)
    return _tuned(plan, proposal, request, device) if options.tune else plan


def _tuned(plan: Plan, proposal: Proposal, request: Request, device: Device) -> Plan:
    """The plan with kernels that were measured, here or by an earlier process."""
    like = [n.meta["example_value"] for n in proposal.operands]
    if like[0].device.type == "meta":
        return plan
    storage = [(tuple(t.shape), t.stride(), t.dtype) for t in like]
    block = (str(proposal.spec), str(proposal.binding), storage, request, sorted(KERNELS))
    machine = (device, torch.get_num_threads(), str(torch.__version__), __version__)
    plans = TunedPlans()
    known = plans.read(block, machine)
    if known is None:
        try:
            with isolated():
                dtype = getattr(torch, request.dtype)
                known = tuned(plan, Stopwatch(proposal.spec, proposal.binding, like, plan.layout, dtype))
        except Exception as error:
            if not out_of_memory(error):
                raise
            return plan  # no room for a second bank of weights: the price must do
        plans.write(known, block, machine)
    return known


_DEVICES: dict[str, Device] = {}


def _device(device: torch.device) -> Device:
    key = str(device)
    if key not in _DEVICES:
        _DEVICES[key] = detect(device)
    return _DEVICES[key]


def forget() -> None:
    """Drops every device description."""
    _DEVICES.clear()
