"""The engine of the named oracles, on a small table made here."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

import pytest

from moe_fx.kernels.capability import PLAIN
from moe_fx.kernels.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
)
from moe_fx.oracle.backends import Backend, Move, Oracle, Order, Refusal
from moe_fx.oracle.conditions import HOPPER, Asked, Condition, no, on
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_GROUP,
)
from moe_fx.reasons import MoEFxOptionError, MoEFxUnsupportedError, Reject

from .candidates import KERNELS, described
from .golden_selection import DEVICES, SCHEMES

CONFIG = FusedMoEConfig(8, 2, 256, 8, intermediate_size=128)
H100 = DEVICES["h100"]


def asked(device: str = "h100", scheme: str = "bf16", **config) -> Asked:
    return Asked(replace(CONFIG, **config), DEVICES[device], SCHEMES[scheme])


# --- the engine, on a table made here


class Fruit(Enum):
    APPLE = 1
    PEAR = 2
    PEARS = 3
    PLUM = 4
    NOTHING = 5


F = Fruit
COST = KERNELS["loop"].cost
FRUITS = {
    "apple": described("apple", 1, COST, devices=frozenset({"rocm"}), biases=False),
    "pear": described("pear", 1, COST, packages=frozenset({"knife"})),
    "pear_again": described("pear_again", 1, COST, activations=frozenset({"gelu"})),
    "pears": described("pears", 1, COST, batched=True, all2all=frozenset({"deepep_low_latency"})),
}
BASKET = Oracle(
    "fruit",
    (
        Backend(F.APPLE, ("apple",)),
        Backend(F.PEAR, ("pear", "pear_again"), ("birne",), twin=F.PEARS),
        Backend(F.PEARS, ("pears",)),
        Backend(F.PLUM, where=on("tpu")),
    ),
    {"seed": Order((F.APPLE, F.PEAR, F.PEARS, F.PLUM)), "short": Order((F.PEAR,))},
    (PLAIN,),
    nothing=F.NOTHING,
)


def eaten(case: Asked, **more) -> tuple[str, str]:
    found = BASKET.select(case, candidates=FRUITS, **more)
    return found.backend.name, found.experts


def test_the_first_that_nothing_vetoes_is_chosen_and_every_reason_is_kept() -> None:
    case = replace(asked(has_bias=True), device=replace(H100, installed=frozenset({"knife"})))
    found = BASKET.select(case, candidates=FRUITS)
    assert (found.backend, found.experts) == (F.PEAR, "pear")
    assert [(v.candidate, v.status, [r.code for r in v.reasons]) for v in found.verdicts] == [
        ("APPLE/apple", "vetoed", ["veto.device", "veto.bias"]),
        ("PEAR/pear", "chosen", []),
        ("PEAR/pear_again", "vetoed", ["veto.activation"]),
        ("PEARS/pears", "vetoed", ["veto.parallel", "veto.format"]),
        ("PLUM/", "vetoed", ["veto.device"]),
    ]
    assert found.verdicts[0].reasons[0] == Reject("veto.device", "device.kind is 'cuda'; it takes 'rocm'", "apple")


def test_the_second_kernel_of_a_backend_is_tried() -> None:
    assert eaten(asked(activation="gelu")) == ("PEAR", "pear_again")
    gelu = replace(asked(activation="gelu"), device=replace(H100, installed=frozenset({"knife"})))
    found = BASKET.select(gelu, candidates=FRUITS)
    assert [(v.candidate, v.status) for v in found.verdicts][1:3] == [
        ("PEAR/pear", "chosen"),
        ("PEAR/pear_again", "survived"),
    ]


def test_a_plugin_runs_what_has_no_kernel() -> None:
    found = BASKET.select(asked("tpu_v5p"), candidates=FRUITS)
    assert (found.backend, found.experts, found.experts_class) == (F.PLUM, "", None)


def test_nothing_left_raises_on_a_gpu_and_has_a_name_elsewhere() -> None:
    with pytest.raises(MoEFxUnsupportedError) as caught:
        BASKET.select(asked(has_bias=True), candidates=FRUITS)
    message = str(caught.value)
    for said in (
        "no backend of fruit layers runs weights plain with activations plain on NVIDIA H100",
        "APPLE/apple: veto.device: ",
        "APPLE/apple: veto.bias: ",
        "PEAR/pear: veto.package: not installed: 'knife'",
        "PEARS/pears: veto.format: ",
        "PLUM/: veto.device: ",
    ):
        assert said in message
    assert eaten(asked("xe2")) == ("NOTHING", "")
    with pytest.raises(MoEFxUnsupportedError, match="no backend of fruit"):
        replace(BASKET, nothing=None).select(asked("xe2"), candidates=FRUITS)


def test_a_request_is_met_or_raises_with_the_reasons_against_it_alone() -> None:
    assert eaten(asked("mi300x")) == ("APPLE", "apple") == eaten(asked("mi300x", moe_backend="apple"))
    assert eaten(asked("mi300x", activation="gelu", moe_backend="birne")) == ("PEAR", "pear_again")
    with pytest.raises(MoEFxUnsupportedError) as caught:
        BASKET.select(asked("mi300x", moe_backend="pear"), candidates=FRUITS)
    message = str(caught.value)
    assert "moe_backend='pear' cannot be had" in message
    assert "PEAR/pear: veto.package" in message
    assert "PEAR/pear_again: veto.activation" in message
    assert "APPLE" not in message
    with pytest.raises(MoEFxUnsupportedError, match=r"moe_backend='apple'"):  # not even where there is a name for none
        BASKET.select(asked("xe2", moe_backend="apple"), candidates=FRUITS)


def test_a_request_becomes_the_twin_where_tokens_come_in_batches() -> None:
    spread = FusedMoEParallelConfig.make(dp_size=2, use_ep=True, all2all_backend="deepep_low_latency")
    case = asked(moe_parallel_config=spread, moe_backend="pear")
    assert eaten(case) == ("PEARS", "pears")
    with pytest.raises(MoEFxUnsupportedError, match=r"APPLE/apple: veto.format"):  # has no twin
        BASKET.select(asked("mi300x", moe_parallel_config=spread, moe_backend="apple"), candidates=FRUITS)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(MoEFxOptionError, match=r"'cherry'.*known: auto, apple, pear, birne, pears, plum"):
        BASKET.map("cherry")
    with pytest.raises(MoEFxOptionError, match=r"order='late'.*known: seed, short"):
        BASKET.select(asked(), "late", FRUITS)
    with pytest.raises(MoEFxOptionError, match=r"NOTHING runs no fruit layer; .*APPLE, PEAR, PEARS, PLUM"):
        BASKET.backend(F.NOTHING)
    assert [BASKET.map(name) for name in ("apple", "pear", "birne", "pears")] == [F.APPLE, F.PEAR, F.PEAR, F.PEARS]


def test_what_an_order_leaves_out_runs_on_request_only() -> None:
    assert BASKET.ordered(asked(), "short") == (F.PEAR,)
    assert eaten(asked("mi300x", activation="gelu"), order="short") == ("PEAR", "pear_again")
    assert eaten(asked("mi300x", moe_backend="apple"), order="short") == ("APPLE", "apple")


@pytest.mark.parametrize(
    ("to", "anchor", "expected"),
    [
        ("front", None, "PEARS PLUM APPLE PEAR"),
        ("back", None, "APPLE PEAR PEARS PLUM"),
        ("before", F.PEAR, "APPLE PEARS PLUM PEAR"),
        ("after", F.APPLE, "APPLE PEARS PLUM PEAR"),
    ],
)
def test_moves(to, anchor, expected: str) -> None:
    move = Move((F.PLUM, F.PEARS), to, (HOPPER,), anchor)  # they keep the order that they have
    assert " ".join(m.name for m in move.applied(BASKET.orders["seed"].members)) == expected
    order = replace(BASKET.orders["seed"], moves=(move,))
    oracle = replace(BASKET, orders={"seed": order})
    assert " ".join(m.name for m in oracle.ordered(asked("h100"))) == expected
    assert oracle.ordered(asked("b200")) == BASKET.orders["seed"].members
    both = replace(move, when=(HOPPER, Condition("never", lambda asked: False)))
    assert replace(BASKET, orders={"seed": replace(order, moves=(both,))}).ordered(asked()) == order.members


def test_refusals() -> None:
    def refuse(**more) -> list[str]:
        refusal = Refusal("veto.lora", "not here", (on("rocm"),), **more)
        oracle = replace(BASKET, orders={"seed": replace(BASKET.orders["seed"], refusals=(refusal,))})
        verdicts = oracle.verdicts(asked("mi300x"), candidates=FRUITS)
        assert not any(r.code == "veto.lora" for v in oracle.verdicts(asked(), candidates=FRUITS) for r in v.reasons)
        return [
            v.candidate for v in verdicts if Reject("veto.lora", "not here", v.candidate.split("/")[0]) in v.reasons
        ]

    assert refuse(members=(F.APPLE,)) == ["APPLE/apple"]
    assert refuse(but=(F.APPLE, F.PLUM)) == ["PEAR/pear", "PEAR/pear_again", "PEARS/pears"]


def test_kernels_for_adapters_and_for_weights_alone() -> None:
    row = Backend(F.APPLE, ("apple",), lora=("pear",), weights_only=True)
    assert row.kernels_for(CONFIG) == ("apple",)
    assert row.kernels_for(replace(CONFIG, is_lora_enabled=True)) == ("pear",)
    assert Backend(F.APPLE, ("apple",)).kernels_for(replace(CONFIG, is_lora_enabled=True)) == ("apple",)
    assert row.question_scheme((FP8_BLOCK, FP8_GROUP)) == (FP8_BLOCK, None)
    assert Backend(F.APPLE).question_scheme((FP8_BLOCK, FP8_GROUP)) == (FP8_BLOCK, FP8_GROUP)


def test_conditions() -> None:
    case = asked("h100")
    assert HOPPER.holds(case)
    assert not no(HOPPER).holds(case)
    assert on("cuda", "rocm").holds(case)
    assert not on("cpu").holds(case)


def test_what_the_class_itself_has_against_a_layer_is_a_reason() -> None:
    class Choosy(KERNELS["loop"].experts):  # type: ignore[name-defined, misc]
        @classmethod
        def refuses(cls, spec):
            return ("veto.shape", f"{spec.quant.w13} and {spec.quant.a2}") if spec.expert.intermediate == 128 else None

    schemes = frozenset({(FP8_BLOCK, FP8_GROUP)})
    choosy = {
        "apple": replace(described("apple", 1, COST, devices=frozenset({"rocm"}), schemes=schemes), experts=Choosy)
    }
    case = replace(asked("mi300x", moe_backend="apple"), scheme=(FP8_BLOCK, FP8_GROUP))
    (verdict,) = BASKET.verdicts(case, candidates=choosy)
    assert verdict.reasons == (Reject("veto.shape", f"{FP8_BLOCK} and {FP8_GROUP}", "apple"),)
    wider = replace(case, config=replace(case.config, intermediate_size=256))
    assert BASKET.select(wider, candidates=choosy).experts == "apple"
