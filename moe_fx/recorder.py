"""Collects sites while graphs are compiled, for every torch.compile wrapper, and gives them as a frozen ``Report``."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_fx.reasons import MoEFxWarning
from moe_fx.report import Report, Site

KEPT = 64  # wrappers whose records a builder keeps


@dataclass(slots=True)
class _Record:
    """owner: gives the wrapper that the record belongs to, or None when it is gone."""

    owner: Callable[[], object]
    sites: list[Site] = field(default_factory=list)
    graphs: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def report(self) -> Report:
        stages: dict[int, dict[str, float]] = {}  # every site of a graph carries that graph's stages
        for site in self.sites:
            stages.setdefault(site.graph, {}).update(site.seconds)
        total: Counter[str] = Counter()
        for spent in stages.values():
            total.update(spent)
        seconds = (*total.items(), ("all", self.seconds)) if self.graphs else ()
        return Report(tuple(self.sites), self.graphs, seconds, tuple(self.warnings))


class ReportBuilder:
    """Collects what happens while graphs are compiled; every method may be called from any thread.

    One record per torch.compile wrapper; a wrapper that compiles again goes on with its own.  All methods but ``begin``
    speak of the record begun last.  Wrappers are not kept alive.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[_Record] = []
        self._current = _Record(lambda: None)

    def begin(self, wrapper: object = None) -> None:
        """``wrapper`` starts to compile a graph; None starts a record of its own."""
        with self._lock:
            alive = [r for r in self._records if r.owner() is not None]
            own = [r for r in alive if r.owner() is wrapper]
            self._current = own[0] if own else _Record(_reference(wrapper))
            self._records = [*[r for r in alive if r is not self._current], self._current][-KEPT:]

    @property
    def graphs(self) -> int:
        """Graphs finished so far: the number of the one in the making."""
        with self._lock:
            return self._current.graphs

    def graph(self, seconds: float) -> None:
        """A graph is finished; moe_fx took ``seconds`` for it."""
        with self._lock:
            self._current.graphs += 1
            self._current.seconds += seconds

    def add(self, site: Site) -> None:
        with self._lock:
            self._current.sites.append(site)

    def warn(self, text: str) -> None:
        """Keeps a warning, once."""
        with self._lock:
            if text not in self._current.warnings:
                self._current.warnings.append(text)

    def warn_if_nothing_matched(self) -> None:
        """Once for a torch.compile wrapper: silence would look like success."""
        report = self.snapshot()
        misses = [site for site in report.sites if site.rejects]
        if report.num_fused == 0 and misses and not report.warnings:
            nearest = misses[0]
            text = (
                f"no mixture-of-experts block was fused. Nearest: {nearest.fqn or 'a block'}, {nearest.rejects[0]}"
                f"{' at ' + nearest.source if nearest.source else ''}. moe_fx.last_report() holds every reason"
            )
            self.warn(text)
            warnings.warn(text, MoEFxWarning, stacklevel=3)  # who calls the backend

    def snapshot(self) -> Report:
        """The report of the wrapper begun last, as it stands."""
        with self._lock:
            return self._current.report()

    def reset(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._records.clear()
            self._current = _Record(lambda: None)


def _reference(wrapper: object) -> Callable[[], object]:
    try:
        return weakref.ref(wrapper)
    except TypeError:  # of a class without weak references
        return lambda: wrapper


RECORDER = ReportBuilder()
