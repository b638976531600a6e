"""Readable dumps of every stage: numbered files of Python and text in one directory."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from moe_fx.passes.match import Proposal
from moe_fx.passes.regions import Region
from moe_fx.plan import Plan

if TYPE_CHECKING:
    from moe_fx.report import Report

_COUNTERS: dict[str, itertools.count[int]] = {}


@dataclass(slots=True)
class Dump:
    """directory: None writes nothing.  Files: NNN-captured.py, NNN-block-KEY.py (region, spec, binding, plan),
    NNN-rewritten.py, report.txt, report.json."""

    directory: Path | None
    counter: itertools.count[int] = field(default_factory=itertools.count)

    @staticmethod
    def open(directory: str | None) -> Dump:
        if directory is None:
            return Dump(None)
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        return Dump(path, _COUNTERS.setdefault(str(path.resolve()), itertools.count()))

    def graph(self, stage: str, gm: GraphModule) -> None:
        if self.directory is not None:
            self._write(f"{stage}.py", gm.print_readable(print_output=False))

    def region(self, key: str, region: Region, proposal: Proposal, plan: Plan) -> None:
        if self.directory is None:
            return
        reads = ", ".join(n.name for n in region.inputs)
        head = (
            f"# block {key}\n# reads   {reads}\n# spec    {proposal.spec}\n# binding {proposal.binding}\n"
            f"# plan    {plan.op_string()}\n"
        )
        self._write(f"block-{key}.py", head + region.module().print_readable(print_output=False))

    def report(self, report: Report) -> None:
        if self.directory is not None:
            (self.directory / "report.txt").write_text(f"{report}\n")
            (self.directory / "report.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        assert self.directory is not None
        (self.directory / f"{next(self.counter):03d}-{name}").write_text(text)
