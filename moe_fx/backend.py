"""The pipeline: CAPTURE → FIND → MATCH → PLAN → VERIFY → REWRITE → the inner backend.

``moe_fx`` is the entry point of ``torch.compile(model, backend="moe_fx")``.  A stage that fails on a block leaves that
block as it was, with a warning and a report entry; ``strict=True`` raises instead.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from moe_fx import ops, ops_moe, planning  # noqa: F401  ops_moe registers the op of a whole block
from moe_fx.dump import Dump
from moe_fx.kernels import experts as _built_in  # noqa: F401  registers the kernels
from moe_fx.kernels import libraries as _libraries  # noqa: F401  and the adapters
from moe_fx.lowerings.dispatch import Dispatch
from moe_fx.lowerings.inline import inline, run_inline
from moe_fx.lowerings.inner import compile_inner
from moe_fx.lowerings.quantising import output_error, sizes
from moe_fx.options import Options, disabled, resolve
from moe_fx.passes.capture import data_sizes, hooks, hugging_face, quantised_libraries  # noqa: F401  registers
from moe_fx.passes.computed import sweep
from moe_fx.passes.dataflow import fake
from moe_fx.passes.finder import Found, find_regions
from moe_fx.passes.fingerprint import fingerprint
from moe_fx.passes.id_range import IdRange, id_range
from moe_fx.passes.isolation import isolated
from moe_fx.passes.match import Proposal, propose
from moe_fx.passes.origin import fqn_of, source_of
from moe_fx.passes.readings import Reading, read_products, restore, settle
from moe_fx.passes.recipes import forms
from moe_fx.passes.regions import Region, describe, graph_parts
from moe_fx.passes.rewrite import rewrite
from moe_fx.passes.routers import forget, fuse_routers
from moe_fx.passes.sampling import Sampler
from moe_fx.passes.shrink import Twin, shrink
from moe_fx.passes.verify import verify
from moe_fx.plan import Plan
from moe_fx.planning import WholePlans, plan_for, quantised_plan, values_of
from moe_fx.reasons import (
    MoEFxInternalError,
    MoEFxOptionError,
    MoEFxUnsupportedError,
    MoEFxWarning,
    Reject,
    out_of_memory,
)
from moe_fx.recorder import RECORDER
from moe_fx.report import Quantisation, Site

ops.install(Dispatch())


def moe_fx(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    explain: bool = False,
) -> Callable[..., Any]:
    """A Dynamo backend.  Raises MoEFxOptionError (inside BackendCompilerFailed) for bad options.

    explain: everything is planned as for the inner backend of ``options``, and the graph then runs eagerly.
    """
    settings = resolve(options, mode)
    inner = replace(settings, inner_backend="eager", inductor={}) if explain else settings
    if disabled():
        return compile_inner(gm, example_inputs, inner)
    started = time.perf_counter()
    RECORDER.begin(_wrapper())
    graph = _Graph(gm, example_inputs, settings)
    graph.write(lambda dump: dump.graph("captured", gm))
    sites = graph.fuse()
    if inner.inner_backend == "inductor":
        sites += graph.lower()
    graph.write(lambda dump: dump.graph("rewritten", gm))
    for site in sites:
        RECORDER.add(site)
    RECORDER.graph(time.perf_counter() - started + graph.captured)
    RECORDER.warn_if_nothing_matched()
    graph.write(lambda dump: dump.report(RECORDER.snapshot()))
    return compile_inner(gm, example_inputs, inner)


@hooks.surround
@contextmanager
def _reported(tracer: Any) -> Iterator[None]:
    """What was noted of a frame that gives no graph is reported too, when Dynamo does not try it again."""
    RECORDER.begin(hooks.wrapper_of(tracer, moe_fx))
    try:
        yield
    except torch._dynamo.exc.RestartAnalysis:
        raise
    except Exception:
        for note in hooks.take_notes():
            RECORDER.add(_noted(note))
        raise


def _noted(note: hooks.Note) -> Site:
    return Site(note.fqn, False, None, "", None, note.reasons, note.source, RECORDER.graphs, 0, "", ())


_UNAVAILABLE = hooks.install(moe_fx, lambda: not disabled())  # what this torch lacks; "" when all is there


def _wrapper() -> object:
    """The torch.compile wrapper that asks: it is the caller, and the only identity that all its graphs share."""
    frame = sys._getframe(2)
    return frame.f_locals.get("self") if frame is not None else None


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What is known of all regions of one fingerprint.  operands: positions in ``Region.inputs``."""

    proposal: Proposal | None
    plan: Plan | None
    operands: tuple[int, ...] = ()
    rejects: tuple[Reject, ...] = ()


_VERDICTS: dict[str, _Verdict] = {}


class _Graph:
    """One Dynamo graph on its way through the stages."""

    def __init__(self, gm: GraphModule, example_inputs: list[Any], options: Options):
        self.gm, self.inputs, self.options = gm, example_inputs, options
        self.seconds: dict[str, float] = {}
        self.captured = 0.0  # seconds of ours while Dynamo traced
        self.dump: Dump | None = None
        self.computed: list[tuple[Graph, Found]] = []
        self.readings: list[tuple[Graph, list[Reading]]] = []

    def write(self, what: Callable[[Dump], None]) -> None:
        """A dump; that it fails costs a warning and no block."""
        with self._stage("dump"):
            self.dump = self.dump or Dump.open(self.options.dump_dir)
            what(self.dump)

    def fuse(self) -> list[Site]:
        sites: list[Site] = []
        accepted: list[tuple[Graph, Region, Proposal, Plan, int]] = []
        with self._stage("capture") as failed:
            notes, self.captured = hooks.drain()
            for note in notes:
                if note.reasons[0].code == "internal":
                    self._failed(note.reasons[0].text, None)
                sites.append(_noted(note))
        self.seconds["capture"] += self.captured
        with self._stage("find", failed):
            for graph, weights, buffers in graph_parts(self.gm, self.inputs):
                readings: list[Reading] = []
                self.readings.append((graph, readings))
                read_products(graph, readings)
                found = find_regions(graph, weights)
                self.computed.append((graph, found))
                for node, rejects in found.rejects:
                    sites.append(self._left(node, fqn_of(node), tuple(rejects)))
                for region in found.regions:
                    where, verdict = region.down.uses[0], self._judge(region, buffers)
                    if verdict.proposal is None or verdict.plan is None:
                        sites.append(self._left(where, fqn_of(where), verdict.rejects))
                        continue
                    whole = replace(verdict.proposal, operands=tuple(region.inputs[i] for i in verdict.operands))
                    result = self._formed(graph, region, whole, verdict.plan, found)
                    if isinstance(result, Reject):
                        sites.append(self._left(where, fqn_of(where), (result,)))
                        continue
                    sites.append(self._fused(region, *result))
                    accepted.append((graph, region, *result, len(sites) - 1))
        if _UNAVAILABLE and not accepted:
            failed.append(Reject("capture.unavailable", f"no loop could be made traceable: {_UNAVAILABLE}"))
        if failed:
            sites.append(self._left(None, "", tuple(failed)))
        if data_sizes.useless(self.gm, [n for _, region, *_ in accepted for n in region.nodes]):
            for site in sites:
                RECORDER.add(site)
            data_sizes.retrace()
        taken = {node for _, region, *_ in accepted for node in region.nodes}
        for graph, read in self.readings:
            settle(graph, read, taken)
        self._rewrite(accepted, sites)
        for graph, left in self.readings:
            restore(graph, left)
        return [replace(s, seconds=tuple(self.seconds.items())) for s in sites]

    def lower(self) -> list[Site]:
        """Puts what the inner compiler is to see in the place of our ops; a site where that fails."""
        with self._stage("lower") as failed:
            inline(self.gm)
        return [self._left(None, "", tuple(failed))] if failed else []

    def _judge(self, region: Region, buffers: dict[Node, Tensor]) -> _Verdict:
        """MATCH, PLAN and VERIFY, once per fingerprint."""
        training = region.training
        if training and region.overwritten:
            text = f"{region.overwritten} writes to what the block reads, which its backward would read again"
            return _Verdict(None, None, rejects=(Reject("find.effect", text, region.overwritten),))
        with self._stage("match") as failed:
            bounds = id_range(region.ids, buffers, region.top_k)
            key = fingerprint(region, bounds, training, self.options)
            if self.options.verify != "always" and key in _VERDICTS:
                return _VERDICTS[key]
        if not failed:
            verdict = self._decide(region, bounds, training, failed, key)
            if not failed:
                if not any(r.code == "verify.memory" for r in verdict.rejects):  # the next try may have more
                    _VERDICTS[key] = verdict
                return verdict
        return _Verdict(None, None, rejects=tuple(failed))

    def _decide(self, region: Region, bounds: Any, training: bool, failed: list[Reject], key: str) -> _Verdict:
        rejects: list[Reject] = []
        proposals: list[Proposal] = []
        with self._stage("match", failed), isolated():
            twin = shrink(region)
            result = propose(twin.region, Sampler(twin.region, bounds))
            if isinstance(result, Reject):
                rejects.append(result)
            else:
                proposals = result
        for small in proposals:
            proposal = twin.enlarge(small)
            plan: Plan | None = None
            with self._stage("plan", failed):
                plan = plan_for(region, proposal, training, self.options)
            if plan is None:
                break
            with self._stage("verify", failed), isolated():
                reject = self._verify(twin, small, plan, bounds, training)
                if reject is None:
                    proposal, plan = quantised_plan(region, proposal, plan, training, self.options)
                    positions = tuple(region.inputs.index(n) for n in proposal.operands)
                    self.write(partial(Dump.region, key=key, region=region, proposal=proposal, plan=plan))
                    return _Verdict(replace(proposal, operands=()), plan, positions)  # nodes would keep the graph alive
                rejects.append(reject)
            if failed:
                break
        return _Verdict(None, None, rejects=tuple(dict.fromkeys(rejects)))

    def _formed(
        self, graph: Graph, region: Region, proposal: Proposal, plan: Plan, found: Found
    ) -> tuple[Proposal, Plan] | Reject:
        """The same in the form in which the op reads the block's weights; a Reject where there is none."""
        with self._stage("match") as failed:
            of_weights = forms(graph, region, proposal, found.computed)
            return planning.formed_plan(region, of_weights, (proposal, plan), self.options)
        return failed[0]

    def _verify(self, twin: Twin, small: Proposal, plan: Plan, bounds: IdRange, training: bool) -> Reject | None:
        if self.options.verify == "off":
            return None

        def fused(x: Tensor, ids: Tensor, weights: Tensor, operands: list[Tensor], proposal: Proposal) -> list[Tensor]:
            call = (x, ids, weights, operands, str(proposal.spec), str(proposal.binding), plan.op_string())
            inline = run_inline(*call)
            return [torch.ops.moe_fx.experts(*call), *([] if inline is None else [inline])]

        return verify(twin, small, bounds, training, fused)

    def _rewrite(self, accepted: list[tuple[Graph, Region, Proposal, Plan, int]], sites: list[Site]) -> None:
        """Last block first, so that no region refers to a node that another rewrite replaced."""
        calls: dict[Node, int] = {}
        for graph, region, proposal, plan, index in reversed(accepted):
            where = region.down.uses[0]
            fqn = sites[index].fqn
            with self._stage("rewrite") as failed:
                calls[rewrite(graph, region, proposal, plan.op_string())] = index
            if failed:
                sites[index] = self._left(where if where in graph.nodes else None, fqn, tuple(failed))
        if accepted:
            with self._stage("rewrite") as failed:
                for graph, found in self.computed:
                    sweep(graph, found.computed.values())
                for graph in {id(g): g for g, *_ in accepted}.values():
                    graph.lint()
                    if graph.owning_module is not None:
                        graph.owning_module.recompile()
            if failed:
                sites.append(self._left(None, "", tuple(failed)))
        if calls and self.options.router == "fuse":
            blocks = {index: (region, proposal) for _, region, proposal, _, index in accepted}
            plans = WholePlans({call: blocks[index] for call, index in calls.items()}, self.options)
            self._fuse_routers(calls, sites, plans)

    def _fuse_routers(self, calls: dict[Node, int], sites: list[Site], plans: WholePlans) -> None:
        """Routers that a RouterSpec describes go into the op of their experts; others stay, and the report says why."""
        with self._stage("router") as failed:
            for outcome in fuse_routers(self.gm, self.inputs, plans):
                if (index := calls.get(outcome.call)) is None:
                    continue  # a call that the user wrote
                site = sites[index]
                if outcome.router is None or site.spec is None:
                    plans.kept(outcome.call, outcome.reason)
                    sites[index] = replace(site, note=f"{site.note} router kept: {outcome.reason}".strip())
                else:
                    spec = replace(site.spec, router=outcome.router)
                    plan = plans.made.get(outcome.call, site.plan)
                    sites[index] = replace(site, spec=spec, binding=outcome.binding, plan=plan)
        if failed:
            sites.append(self._left(None, "", tuple(failed)))

    def _fused(self, region: Region, proposal: Proposal, plan: Plan) -> Site:
        node = region.down.uses[0]
        return Site(
            fqn=fqn_of(node),
            fused=True,
            spec=proposal.spec,
            binding=str(proposal.binding),
            plan=plan,
            rejects=(),
            source=source_of(node),
            graph=RECORDER.graphs,
            replaced=len(region.nodes),
            note=self._doubt(region, proposal),
            seconds=(),
            quantised=self._quantised(region, proposal, plan),
        )

    def _quantised(self, region: Region, proposal: Proposal, plan: Plan) -> Quantisation | None:
        """What ``options.quantize`` does to the block; to its output where the weights have values."""
        if self.options.quantize is None:
            return None
        before, after = sizes(proposal.spec, proposal.binding, [fake(n) for n in proposal.operands])
        operands = values_of(proposal.operands, self.gm, self.inputs)
        if operands is None:
            return Quantisation(self.options.quantize, before, after)
        with self._stage("quantise"), isolated():
            try:
                error = output_error(proposal.spec, proposal.binding, plan, operands, fake(region.x).dtype)
            except Exception as failure:
                text = f"quantize={self.options.quantize!r} failed on {fqn_of(region.down.uses[0])}: {failure}"
                raise MoEFxUnsupportedError(text) from failure
        return Quantisation(self.options.quantize, before, after, error)

    def _doubt(self, region: Region, proposal: Proposal) -> str:
        """What was not verified, or is done otherwise; "" when there is nothing."""
        if self.options.verify == "off":
            return "unverified"
        if fake(region.down.params[0]).device.type == "meta":
            return "unverified in its own dtypes: weights on meta have no values, only the formula was checked"
        return planning.unrounded(region, proposal)

    def _left(self, node: Node | None, fqn: str, rejects: tuple[Reject, ...]) -> Site:
        source = "" if node is None else source_of(node)
        note = "" if node is None else describe(node)
        return Site(fqn, False, None, "", None, tuple(rejects), source, RECORDER.graphs, 0, note, ())

    @contextmanager
    def _stage(self, name: str, failed: list[Reject] | None = None) -> Iterator[list[Reject]]:
        """Times a stage without the stages inside it; turns a failure of ours into a Reject in the yielded list and a
        warning, or raises if strict.

        Everything is caught because an exception of FakeTensor that leaves a backend is a silent graph break.
        """
        failed = [] if failed is None else failed
        started, inside = time.perf_counter(), sum(self.seconds.values())
        try:
            yield failed
        except (MoEFxOptionError, MoEFxUnsupportedError, MoEFxInternalError):
            raise  # what was asked for cannot be had
        except Exception as error:  # noqa: BLE001  see above
            text = f"{name}: {type(error).__name__}: {error}"
            if name in ("match", "verify") and out_of_memory(error):
                failed.append(Reject("verify.memory", text.splitlines()[0], name))
                return
            self._failed(text, error)
            failed.append(Reject("internal", text, name))
        finally:
            inside = sum(self.seconds.values()) - inside
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started - inside

    def _failed(self, text: str, error: Exception | None) -> None:
        """A stage of ours failed: a warning, or an error if strict."""
        if self.options.strict:
            raise MoEFxInternalError(f"moe_fx failed in stage {text}") from error
        warnings.warn(f"moe_fx left a block as it was; stage {text}", MoEFxWarning, stacklevel=3)


def reset() -> None:
    """Forgets every report, verdict and device description; compiled code stays valid."""
    _VERDICTS.clear()
    forget()
    planning.forget()
    RECORDER.reset()
