"""What happened to every mixture-of-experts block: values that ``recorder`` collects, and how they read.

``str(report)`` is plain text (120 columns, no terminal needed), a rich console prints the same with colours,
``to_json`` and ``from_json`` round-trip.  Sites that differ only in their place are shown as one row.  rich is imported
when something is rendered.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from moe_fx.hints import HINTS
from moe_fx.plan import Plan, Verdict
from moe_fx.reasons import CODES, Reject
from moe_fx.spec import MoESpec, parse

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

VERSION = "report/1"
WIDTH = 120


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What the option ``quantize`` did to the weights of one block.

    scheme: its name.  before, after: bytes of the matrices in the model, and of their codes, scales and zero points,
    which lie beside them.  error: of the block's output on random inputs, the root mean square of the difference over
    that of the block without quantisation; None where it was not measured (weights without values).
    """

    scheme: str
    before: int
    after: int
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """One block in one graph.

    fqn: the module it belongs to.  binding: its WeightBinding as text.  plan: None unless fused.  rejects: every reason
    why it was left alone.  source: "file:line: code" of the user.  graph: number of ``recorder.ReportBuilder.graphs``.
    replaced: graph nodes that the fused op stands for.  note: anything a reader should know.
    seconds: (stage, seconds) pairs.  quantised: None unless the option ``quantize`` is set.
    """

    fqn: str
    fused: bool
    spec: MoESpec | None = None
    binding: str = ""
    plan: Plan | None = None
    rejects: tuple[Reject, ...] = ()
    source: str = ""
    graph: int = 0
    replaced: int = 0
    note: str = ""
    seconds: tuple[tuple[str, float], ...] = ()
    quantised: Quantisation | None = None

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What the oracle thought of every candidate."""
        return self.plan.verdicts if self.plan else ()

    def to_json(self) -> dict[str, Any]:
        return {
            "fqn": self.fqn,
            "fused": self.fused,
            "spec": None if self.spec is None else str(self.spec),
            "binding": self.binding,
            "plan": None if self.plan is None else self.plan.to_json(),
            "rejects": [r.to_json() for r in self.rejects],
            "source": self.source,
            "graph": self.graph,
            "replaced": self.replaced,
            "note": self.note,
            "seconds": [list(pair) for pair in self.seconds],
            "quantised": None if self.quantised is None else asdict(self.quantised),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Site:
        converted = {
            "spec": None if data["spec"] is None else parse(data["spec"]),
            "plan": None if data["plan"] is None else Plan.from_json(data["plan"]),
            "rejects": tuple(Reject(**r) for r in data["rejects"]),
            "seconds": _pairs(data["seconds"]),
            "quantised": None if data["quantised"] is None else Quantisation(**data["quantised"]),
        }
        return Site(**{**data, **converted})


@dataclass(frozen=True, slots=True)
class Report:
    """Every site of one torch.compile wrapper: all its graphs, resumed frames and recompilations.

    num_graphs: distinct graphs that reached the backend.  seconds: (stage, seconds) summed over graphs, "all" last.
    """

    sites: tuple[Site, ...] = ()
    num_graphs: int = 0
    seconds: tuple[tuple[str, float], ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Distinct blocks; the same module in two graphs is one."""
        return len(self._fused_by_block())

    @property
    def num_fused(self) -> int:
        """Distinct blocks that are fused in every graph in which they appear."""
        return sum(self._fused_by_block().values())

    def _fused_by_block(self) -> dict[tuple[str, int], bool]:
        """(fqn, which use of it within a graph) → fused everywhere."""
        uses: Counter[tuple[int, str]] = Counter()
        blocks: dict[tuple[str, int], bool] = {}
        for site in self.sites:
            block = (site.fqn, uses[site.graph, site.fqn])
            uses[site.graph, site.fqn] += 1
            blocks[block] = blocks.get(block, True) and site.fused
        return blocks

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "num_graphs": self.num_graphs,
            "seconds": [list(pair) for pair in self.seconds],
            "warnings": list(self.warnings),
            "sites": [site.to_json() for site in self.sites],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Report:
        """Inverse of ``to_json``; ValueError for another version."""
        if data.get("version") != VERSION:
            raise ValueError(f"report version {data.get('version')!r} cannot be read; this version reads {VERSION!r}")
        sites = tuple(Site.from_json(site) for site in data["sites"])
        return Report(sites, data["num_graphs"], _pairs(data["seconds"]), tuple(data["warnings"]))

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, highlight=False).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        groups = _groups(self.sites)
        yield _headline(self)
        if groups:
            yield _overview(groups)
        for number, group in enumerate(groups, 1):
            yield from _fused_details(number, group) if group[0].fused else _left_details(number, group)
        for warning in self.warnings:
            yield _text(f"warning: {warning}", "yellow")


def _pairs(data: Iterable[Sequence[Any]]) -> tuple[tuple[str, float], ...]:
    return tuple((stage, seconds) for stage, seconds in data)


# --- rendering -------------------------------------------------------------------------------------------------------


def _groups(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites that differ in place only, together, in order of first appearance."""
    found: dict[Hashable, list[Site]] = {}
    for site in sites:
        reasons = tuple((r.code, _unnumbered(r.text)) for r in site.rejects)
        size = site.quantised and (site.quantised.scheme, site.quantised.before, site.quantised.after)
        key = (site.fused, str(site.spec), site.binding, site.plan, reasons, _unnumbered(site.note), size)
        found.setdefault(key, []).append(site)
    return list(found.values())


def _unnumbered(text: str) -> str:
    """Node names without the number that makes them unique."""
    return re.sub(r"(?<=[A-Za-z])(_\d+)+\b", "_#", text)


def ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} → "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def fold(fqns: Iterable[str]) -> list[str]:
    """Names that differ in a number become one with its ranges: "layers.0.mlp", "layers.1.mlp" → "layers.0-1.mlp"."""
    names = [tuple(fqn.split(".")) for fqn in dict.fromkeys(fqns)]
    for position in range(max(map(len, names), default=0)):
        merged: dict[tuple[str | None, ...], list[str]] = {}
        for name in names:
            numbered = position < len(name) and name[position].isdigit()
            template = (*name[:position], None, *name[position + 1 :]) if numbered else name
            merged.setdefault(template, []).append(name[position] if numbered else "")
        names = [tuple(ranges(map(int, found)) if t is None else t for t in key) for key, found in merged.items()]
    return [".".join(name) for name in names]


def describe(spec: MoESpec) -> str:
    """A spec in a few words: "E32 k8 H1024 I512 silu gated"."""
    e = spec.expert
    words = [f"E{e.experts} k{spec.top_k} H{e.hidden} I{e.intermediate} {e.act}"]
    words += ["gated"] if e.gated else []
    words += ["bias"] if e.w13_bias or e.w2_bias else []
    words += [f"norm={e.norm}"] if e.norm else []
    words += ["weight on input"] if spec.combine.weight_on == "input" else []
    return " ".join(words)


def _text(text: str, style: str = "") -> RenderableType:
    from rich.text import Text

    return Text(text, style=style)


FEW = 6  # candidates that cannot run here, whose reasons are still printed one by one


def _table(*columns: str, title: str = "") -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for column in columns:
        fixed = column in ("candidate", "vetoed", "")
        table.add_column(column, overflow="fold", no_wrap=fixed, justify="right" if column.startswith("T=") else "left")
    return table


def _headline(report: Report) -> RenderableType:
    blocks = f"{report.num_fused} of {report.num_blocks} mixture-of-experts blocks fused"
    graphs = f"{report.num_graphs} graph{'' if report.num_graphs == 1 else 's'}"
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in report.seconds)
    style = "bold green" if report.num_blocks and report.num_fused == report.num_blocks else "bold"
    return _text(f"moe_fx: {blocks}, {graphs}" + (f" ({stages})" if stages else ""), style)


def _overview(groups: list[list[Site]]) -> RenderableType:
    table = _table("#", "block", "count", "graphs", "specification", "result")
    for number, group in enumerate(groups, 1):
        site, fqns = group[0], [s.fqn for s in group]
        name = _text("\n".join(fold(fqn or "(unnamed)" for fqn in fqns)))
        count, graphs = f"{len(set(fqns))}", ranges(s.graph for s in group)
        table.add_row(str(number), name, count, graphs, describe(site.spec) if site.spec else "-", _text(_result(site)))
    return table


def _result(site: Site) -> str:
    if not site.fused:
        return "left alone: " + ", ".join(dict.fromkeys(r.code for r in site.rejects))
    kernels = "/".join(dict.fromkeys(r.kernel for r in site.plan.spans)) if site.plan else "?"
    return f"fused: {kernels}"


def _fused_details(number: int, group: list[Site]) -> Iterator[RenderableType]:
    site = group[0]
    yield _text(f"#{number}  {site.spec}", "bold")
    if site.binding:
        yield _text(f"    weights  {site.binding}")
    plan = site.plan
    if plan is None:
        return
    kernels = "; ".join(f"{_span(r.t_min, r.t_max)} {r.kernel}" for r in plan.ranges)
    if plan.inline:
        kernels += f"; inside a graph compiled for {_span(1, plan.inline.t_max)}: {plan.inline.kernel}"
    yield _text(f"    plan     {kernels}; layout {plan.layout}; backward: {plan.backward} activations")
    if site.replaced:
        yield _text(f"    graph    {site.replaced} nodes → 1")
    if site.quantised:
        yield _text(f"    quantize {_quantised([s.quantised for s in group if s.quantised])}")
    if site.note:
        yield _text(f"    note     {site.note}")
    live = [v for v in plan.verdicts if v.status != "vetoed"]
    prices = {v: v.price_us for v in live}
    times = {v: v.measured_us for v in live if v.measured_us}
    for what, counts, rows in (("price", plan.priced_at, prices), ("measured time", plan.measured_at, times)):
        if rows:
            table = _table("candidate", "", *(f"T={t}" for t in counts), title=f"{what} of one forward")
            for v in sorted(rows, key=lambda v: v.status):
                table.add_row(v.candidate, v.status, *map(_price, rows[v]))
            yield table
    vetoed: dict[str, list[str]] = {}
    away = {v.candidate for v in plan.verdicts if {r.code for r in v.reasons} & {"veto.device", "veto.package"}}
    elsewhere = sorted({c.partition("/")[0] for c in away}) if len(away) > FEW else []
    for verdict in plan.verdicts:
        if verdict.status == "vetoed" and not (elsewhere and verdict.candidate in away):
            vetoed.setdefault("\n".join(f"{r.code}: {r.text}" for r in verdict.reasons), []).append(verdict.candidate)
    if elsewhere:
        yield _text(
            f"    not for this device, or not installed (to_json has the reasons): {', '.join(elsewhere)}", "dim"
        )
    if vetoed:
        table = _table("vetoed", "reasons")
        for reasons, candidates in vetoed.items():
            table.add_row("\n".join(candidates), _text(reasons))
        yield table


def _quantised(found: list[Quantisation]) -> str:
    """Of blocks that differ in their errors only."""
    one = found[0]
    errors = sorted(q.error for q in found if q.error is not None)
    span = " to ".join(dict.fromkeys(f"{e:.1e}" for e in (*errors[:1], *errors[-1:])))
    error = f"relative RMS error {span} on random inputs" if errors else "error not measured"
    return f"{one.scheme}: {_size(one.before)} of weights → {_size(one.after)} beside them; {error}"


def _size(count: int) -> str:
    """3_200_000 → "3.05 MiB"."""
    scale, unit = next((s, u) for s, u in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (0, "B")) if count >= s)
    value = count / (scale or 1)
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _price(us: float | None) -> str:
    """439 → "439 µs", 1_250 → "1.25 ms", None → "-"."""
    if us is None:
        return "-"
    scale, unit = next((s, u) for s, u in ((1e6, "s"), (1e3, "ms"), (0.0, "µs")) if us >= s)
    value = us / (scale or 1.0)
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _span(low: int, high: int | None) -> str:
    if high is None:
        return f"T ≥ {low}" if low > 1 else "any T"
    return f"T {low}" if low == high else f"T {low}-{high}"


def _left_details(number: int, group: list[Site]) -> Iterator[RenderableType]:
    site = group[0]
    where = f" (first of {len(group)})" if len(group) > 1 else ""
    yield _text(f"#{number}  left as it was: {site.fqn or '(unnamed)'}{where}", "bold")
    if site.source:
        yield _text(f"    source   {site.source}")
    if site.note:
        yield _text(f"    note     {site.note}")
    for reject in site.rejects:
        yield _text(f"    {reject.code}: {reject.text}", "red")
        if reject.where:
            yield _text(f"      at     {reject.where}")
        yield _text(f"      means  {CODES[reject.code]}")
        yield _text(f"      try    {HINTS.get(reject.code, 'see docs/troubleshooting.md')}")
