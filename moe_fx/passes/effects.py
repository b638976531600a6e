"""What would be lost if one op stood in a region's place: values that others read, writes, modes, random numbers."""

from __future__ import annotations

from torch._ops import OpOverload
from torch.fx import Node

from moe_fx.passes.additions import escapes
from moe_fx.passes.dataflow import Dataflow, fake, target_name, tensors
from moe_fx.passes.regions import Region
from moe_fx.reasons import Reject

_CUTS = {"detach", "detach_", "data", "_get_data_attr"}  # a tensor of the same memory without a gradient


def effects(flow: Dataflow, region: Region, boundary: list[Node], derived: set[Node]) -> Reject | None:
    """Why ``region`` cannot be one op, or None.  boundary: what it reads.  derived: what parameters alone make, which
    stays in the graph for its other readers.  Fills in ``region.mode`` and ``region.overwritten``."""
    return (
        _escapes(flow, region, derived)
        or _writes(flow, region, boundary)
        or (escapes(flow, region.start, set(region.nodes), region.end) if region.start and _own(flow, region) else None)
        or _modes(flow, region)
    )


def _escapes(flow: Dataflow, region: Region, derived: set[Node]) -> Reject | None:
    """Values read outside, and effects beside the result."""
    inside = set(region.nodes)
    end, shared = flow.position[region.end], flow.storages[region.out]
    for node in region.nodes:
        if node in derived:
            continue
        late = node in (region.out, *region.aliases) or any(flow.storages[w] & shared for w in flow.writes[node])
        for user in flow.users(node):
            if user not in inside and not flow.is_assertion(user) and not (late and flow.position[user] > end):
                return Reject("find.escape", f"{node.name} is also used by {user.name}", node.name)
        if flow.is_random(node):
            return Reject("find.effect", f"{node.name} draws random numbers", node.name)
        if isinstance(node.target, OpOverload) and "c10d" in node.target.namespace:
            return Reject("find.effect", f"{node.name} communicates with other processes", node.name)
    for node in region.aliases:
        if not _same_layout(node, region.out):
            return Reject("find.escape", f"{node.name} views the result in another shape", node.name)
    if region.training:
        for node in flow.nodes:
            if target_name(node) in _CUTS and flow.storages[node] & shared and flow.position[node] <= end:
                text = f"{node.name} shares the result's memory and not its gradient"
                return Reject("find.escape", text, node.name)
    return None


def _same_layout(a: Node, b: Node) -> bool:
    one, other = fake(a), fake(b)
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
        and one.dtype == other.dtype
    )


def _own(flow: Dataflow, region: Region) -> set[int]:
    """The storage of a start to which the block adds in place."""
    return flow.storages[region.start] & flow.storages[region.out] if region.start is not None else set()


def _writes(flow: Dataflow, region: Region, boundary: list[Node]) -> Reject | None:
    """The op reads at the end of the block: what the block reads must be then what it was when the block read it."""
    inside = set(region.nodes)
    outer = {s for b in boundary for s in flow.storages[b]} - _own(flow, region)
    inner = {s for n in region.nodes for s in flow.storages[n]} - outer
    first, end = flow.position[region.nodes[0]], flow.position[region.end]
    for node in flow.nodes[first : end + 1]:
        if node not in inside and any(flow.storages[w] & inner for w in flow.writes[node]):
            return Reject("find.effect", f"{node.name} writes to what the block computes", node.name)
        for written in flow.writes[node]:
            storages = flow.storages[written] & outer
            if not storages:
                continue
            reads = [n for n in region.nodes if any(flow.storages[r] & storages for r in n.all_input_nodes)]
            if node in inside or any(flow.position[n] < flow.position[node] for n in reads):
                text = f"{node.name} writes to {written.name}, which the block reads"
                return Reject("find.effect", text, node.name)
    later = (n for n in flow.nodes[end + 1 :] if any(flow.storages[w] & outer for w in flow.writes[n]))
    region.overwritten = next((n.name for n in later), "")
    if flow.storages[region.out] & outer:
        return Reject("find.escape", f"the result {region.out.name} is a view of an input", region.out.name)
    return None


def _modes(flow: Dataflow, region: Region) -> Reject | None:
    floats = [n for n in region.nodes if tensors(n) and n not in flow.integers]
    if len({flow.modes[n] for n in floats}) > 1:
        return Reject("find.autocast", "autocast or grad mode changes inside the block", region.nodes[0].name)
    region.mode = flow.modes[floats[0]]
    if region.start is not None and _own(flow, region) and flow.modes[region.start] != region.mode:
        text = f"adds to {region.start.name} in place in another autocast or grad mode than made it"
        return Reject("find.autocast", text, region.start.name)
    return None
