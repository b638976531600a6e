"""The report: what it counts, what it folds, what it says, and that it survives JSON."""

import json
import subprocess
import sys
import threading

import pytest

from moe_fx.hints import HINTS
from moe_fx.plan import Plan, Range, Verdict
from moe_fx.reasons import CODES, Reject
from moe_fx.recorder import KEPT, ReportBuilder
from moe_fx.report import Report, Site, describe, fold, ranges
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec

SPEC = MoESpec(8, ExpertSpec(32, 1024, 512))
PLAN = Plan(
    "view",
    (Range(1, 24, "rows"), Range(25, None, "grouped")),
    "recompute",
    (1, 64),
    (
        Verdict("rows/view", "chosen", (), (439.0, 7000.5)),
        Verdict("grouped/view", "chosen", (), (1439.0, 3000.0)),
        Verdict("reference/view", "survived", (), (1e5, 1e5)),
        Verdict(
            "triton/view",
            "vetoed",
            (Reject("veto.device", "device.kind is 'cpu'", "triton"), Reject("veto.package", "no triton", "triton")),
        ),
    ),
)


def fused(fqn: str, graph: int = 0) -> Site:
    return Site(
        fqn, True, SPEC, "bind/1 w13:stacked:out_in:gate_up", PLAN, source="m.py:3: y", graph=graph, replaced=31
    )


def left(fqn: str, node: str, graph: int = 0) -> Site:
    reject = Reject("find.escape", f"{node} is read outside", node)
    return Site(fqn, False, rejects=(reject,), source="model.py:120: y = act(gate) * up", graph=graph)


def a_report() -> Report:
    sites = [fused(f"model.layers.{i}.experts", g) for g in range(2) for i in range(24) if i != 7]
    return Report((*sites, left("model.layers.7.experts", "mul_17")), 2, (("find", 0.5), ("all", 2.0)), ("beware",))


def test_counts_blocks_not_graphs() -> None:
    report = a_report()
    assert (report.num_blocks, report.num_fused, report.num_graphs) == (24, 23, 2)


def test_a_block_left_alone_in_one_graph_is_not_fused() -> None:
    report = Report((fused("experts", 0), left("experts", "mul", 1)), 2)
    assert (report.num_blocks, report.num_fused) == (1, 0)


def test_a_module_used_twice_in_a_graph_is_two_blocks() -> None:
    assert Report((fused("experts"), fused("experts")), 1).num_fused == 2


def test_says_everything() -> None:
    text = str(a_report())
    for part in (
        "23 of 24 mixture-of-experts blocks fused, 2 graphs",
        "find 0.50 s",
        "model.layers.0-6,8-23",
        "E32 k8 H1024 I512 silu gated",
        "T 1-24 rows; T ≥ 25 grouped; layout view",
        "439 µs",
        "1.44 ms",
        "veto.device: device.kind is 'cpu'",
        "veto.package: no triton",
        "left as it was: model.layers.7.experts",
        "source   model.py:120: y = act(gate) * up",
        "find.escape: mul_17 is read outside",
        "at     mul_17",
        CODES["find.escape"],
        HINTS["find.escape"],
        "warning: beware",
    ):
        assert part in text, f"{part!r} is not in:\n{text}"


def test_is_plain_text_of_120_columns() -> None:
    lines = str(a_report()).splitlines()
    assert all(len(line) <= 120 and line == line.rstrip() and "\x1b" not in line for line in lines)


def test_an_empty_report_is_readable() -> None:
    assert str(Report()).startswith("moe_fx: 0 of 0 mixture-of-experts blocks fused, 0 graphs")


def test_brackets_are_not_markup() -> None:
    site = Site("layers[0].experts", False, rejects=(Reject("find.no_exit", "weights are [E, 2I, H] [/red]", "n"),))
    assert "weights are [E, 2I, H] [/red]" in str(Report((site,), 1))


def test_like_reasons_fold_whatever_the_node_is_called() -> None:
    text = str(Report((left("layers.0.experts", "mul_1"), left("layers.1.experts", "mul_17")), 1))
    assert "layers.0-1.experts" in text
    assert "(first of 2)" in text


def test_different_plans_do_not_fold() -> None:
    other = Site("layers.1.experts", True, SPEC, "", Plan("view", (Range(1, None, "reference"),)))
    text = str(Report((fused("layers.0.experts"), other), 1))
    assert "layers.0.experts" in text
    assert "layers.1.experts" in text


def test_round_trips_through_json() -> None:
    report = a_report()
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_refuses_json_of_another_version() -> None:
    with pytest.raises(ValueError, match="report/0"):
        Report.from_json({"version": "report/0"})


@pytest.mark.parametrize(
    ("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2), "0-2"), ((5, 0, 1, 3), "0-1,3,5"), ((1, 1), "1")]
)
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text


def test_folds_every_number_of_a_name() -> None:
    names = [f"a.{i}.b.{j}" for i in range(2) for j in range(3)]
    assert fold([*names, "c", "x.1", "x.y"]) == ["a.0-1.b.0-2", "c", "x.1", "x.y"]


def test_fold_joins_only_what_differs_in_numbers() -> None:
    assert fold(["a.0.b.0", "a.0.b.1", "a.1.b.0"]) == ["a.0-1.b.0", "a.0.b.1"]


def test_describe_names_what_is_unusual() -> None:
    expert = ExpertSpec(8, 16, 32, act="relu", gated=False, w2_bias=True, norm="rms")
    assert describe(MoESpec(1, expert, CombineSpec("input"))) == "E8 k1 H16 I32 relu bias norm=rms weight on input"


def test_every_code_has_a_hint() -> None:
    assert HINTS.keys() == CODES.keys()


class Wrapper:
    """Stands for a torch.compile wrapper."""


def test_a_wrapper_that_compiles_again_goes_on_with_its_own_record() -> None:
    builder, first, second = ReportBuilder(), Wrapper(), Wrapper()
    for wrapper, name in ((first, "a"), (second, "b"), (first, "c")):
        builder.begin(wrapper)
        builder.add(fused(name, builder.graphs))
        builder.graph(1.0)
    report = builder.snapshot()
    assert [(s.fqn, s.graph) for s in report.sites] == [("a", 0), ("c", 1)]
    assert (report.num_graphs, report.seconds) == (2, (("all", 2.0),))


def test_sums_the_stages_of_each_graph_once() -> None:
    builder = ReportBuilder()
    builder.begin()
    for graph in range(2):
        for name in "ab":
            builder.add(Site(name, True, graph=graph, seconds=(("find", 0.25),)))
        builder.graph(0.5)
    assert builder.snapshot().seconds == (("find", 0.5), ("all", 1.0))


def test_no_wrapper_is_a_new_record_each_time_and_none_is_kept_alive() -> None:
    builder = ReportBuilder()
    builder.begin()
    builder.add(fused("a"))
    builder.begin()
    assert builder.snapshot() == Report()
    for _ in range(KEPT * 2):
        builder.begin(Wrapper())
    assert len(builder._records) <= 2


def test_an_unhashable_wrapper_is_fine() -> None:
    builder = ReportBuilder()
    for name in "ab":
        builder.begin(wrapper := [name])
        builder.add(fused(name))
    builder.begin(wrapper)
    assert [s.fqn for s in builder.snapshot().sites] == ["b"]


def test_keeps_a_warning_once_and_forgets_on_reset() -> None:
    builder = ReportBuilder()
    builder.begin()
    builder.warn("x")
    builder.warn("x")
    assert builder.snapshot().warnings == ("x",)
    builder.reset()
    assert builder.snapshot() == Report()


def test_takes_sites_from_many_threads() -> None:
    builder = ReportBuilder()
    builder.begin()
    work = [threading.Thread(target=lambda: [builder.add(fused("a")) for _ in range(200)]) for _ in range(8)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(builder.snapshot().sites) == 1600


def test_rich_is_imported_only_to_render() -> None:
    code = "import sys, moe_fx.report as r; print('rich' in sys.modules); str(r.Report()); print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
