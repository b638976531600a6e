from __future__ import annotations

import pytest

from moe_fx.plan import parse_plan

from . import golden_registered as golden
from .golden import short

SITUATIONS = {str(situation): situation for situation in golden.situations()}


@pytest.fixture(scope="module")
def then(request: pytest.FixtureRequest) -> dict:
    if request.config.getoption("--accept-golden", default=False):
        golden.FILE.accept()
    return golden.FILE.accepted()


def test_every_situation_once(then: dict) -> None:
    assert len(SITUATIONS) == len(list(golden.situations())) >= 150
    assert list(then) == list(SITUATIONS)


@pytest.mark.parametrize("name", SITUATIONS)
def test_plan_is_the_accepted_one(name: str, then: dict) -> None:
    assert short(SITUATIONS[name].plan) == then[name]


def test_goldens_meet_the_kernels_of_a_gpu_and_of_libraries(then: dict) -> None:
    chosen = {r.kernel for entry in then.values() for r in parse_plan(entry["plan"]).ranges}
    ours = {"triton", "triton_fp8", "triton_wna16", "torch_grouped", "sorted_loop", "gather_bmm", "batched_loop"}
    assert chosen >= ours | {"flashinfer_trtllm", "flashinfer_trtllm_fp8", "aiter", "aiter_block", "triton_kernels"}
    assert "reference" not in chosen


def test_triton_waits_for_a_device_code_of_amd(then: dict) -> None:
    for request in golden.REQUESTS:
        vetoed = then[f"mi300x | qwen3-30b-a3b | {request} | ours"]["vetoed"]
        assert any("triton/view" in names.split() for codes, names in vetoed.items() if "veto.device" in codes)
