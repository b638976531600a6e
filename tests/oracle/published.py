"""Published runs beside our prices: facts enter, the page docs/prices.md leaves.  The bands are in ``test_published``.

    python -m tests.oracle.published --write           writes the page anew

Times and TFLOP/s are those of the sources, work is counted here (``flops``), our prices come from the costs of the
kernels that are registered, on the devices of the catalogue.  Sources are named as the notes on backends name them
(section 4, "published numbers"); a * marks one that is not among them.

What those notes publish and no price says:
- seconds and tokens/s of whole servers (v0.19 against v0.20 of vLLM but for one token of Mixtral, the throughput of
  Nemotron, SonicMoE's tokens a day, ScatterMoE's and SonicMoE's training against kernels that are not here): attention,
  sampling and communication are in them.  Their order is a fact where one layer's experts are what differs.
- VeOmni's own Triton (11.50 ms where torch's grouped product takes 10.22): rows are copied and activated apart, as ours
  are not; Liger's, built as ours is, takes 4.7 ms for the same layer.
- tuned against default tiles, FlashInfer's compile times, memory of training, all-to-all: not in a price.
- eager against CUDA graphs (sglang PR 21872: FlashInfer 7 % before Triton in one, 14 % behind it in the other): a
  launch costs the same in both; the larger difference decides.
- forward with backward (Liger's 413 TFLOP/s): a backward is not priced.
- a model's own loop over experts: "reference" stands for it, less its masks and waits, so that with 128 tokens it comes
  before copied weights (published: 480 ms behind 317).
- with torch.compile (experts-backends): the same launches, written by a compiler.
- the priority lists of section 2: they order backends without prices (``golden_selection``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import moe_fx.kernels.experts  # noqa: F401  registers the built-in kernels
from moe_fx.hardware import catalogue
from moe_fx.kernels.registry import KERNELS
from moe_fx.oracle import Request
from moe_fx.oracle.price import efficiency, seconds, workload
from moe_fx.plan import Plan
from moe_fx.quant import scheme_of
from moe_fx.spec import MoESpec

from . import golden_registered
from .candidates import MODELS, moe

PAGE = Path(__file__).parents[2] / "docs" / "prices.md"
PEAK = 989.4e12  # FLOP/s of an H100, H200 and H800 in bfloat16, dense

QWEN3 = MODELS["qwen3-30b-a3b"][0]
NEXT = moe(512, 10, 2048, 512)  # Qwen3-Next-80B-A3B
# Qwen1.5-MoE-A2.7B, 24 layers: inferred from 27.3 GB.  The device is not named; for every token more, copied weights
# take what 2.0 TB/s would, and grouped products what a loop would: an A100.
HF, HF_LAYERS, HF_STEPS = moe(60, 4, 2048, 1408), 24, 63  # 64 new tokens: the first comes from the prefill
MIXTRAL_TP8 = moe(8, 2, 4096, 14336 // 8)
QWEN3_TP2 = moe(128, 8, 2048, 384)
R1_TP8 = moe(256, 8, 7168, 2048 // 8)
R1_EP8 = moe(32, 1, 7168, 2048)  # of a token's eight experts one is on this device: 103 TFLOP/s, says PR 5301 too
LLAMA4_DEBUG = moe(8, 1, 256, 1024)  # sizes are a guess: launches decide


def flops(spec: MoESpec, tokens: int) -> float:
    """Of one forward of gated experts: two products up and one down, a multiplication and an addition each."""
    e = spec.expert
    return 2.0 * tokens * spec.top_k * 3 * e.hidden * e.intermediate


def price(kernel: str, spec: MoESpec, device: str, tokens: int, scheme: str = "") -> float:
    """Our seconds of one forward, whether or not the kernel takes the layer there."""
    machine = catalogue()[device]
    if scheme:
        spec = replace(spec, quant=scheme_of(scheme, spec.expert.hidden, spec.expert.intermediate))
    cost = KERNELS[kernel].cost.on(machine.kind, machine.arch)
    return seconds(cost, workload(spec, Request("bfloat16"), machine))(tokens)


def share(kernel: str, device: str, rows: int) -> float:
    """Of the peak, that our products of so many rows reach."""
    machine = catalogue()[device]
    return float(efficiency(KERNELS[kernel].cost.on(machine.kind, machine.arch).efficiency, rows))


@dataclass(frozen=True, slots=True)
class Time:
    """published: seconds of one layer."""

    source: str
    case: str
    published: float
    ours: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Product:
    """flop: of the product that was run; published: its seconds.  rows: of one expert."""

    source: str
    case: str
    flop: float
    published: float
    kernel: str
    device: str
    rows: int


@dataclass(frozen=True, slots=True)
class Order:
    """ratio: published time of the second by that of the first; 1.1 where the source says less than a number."""

    source: str
    case: str
    ratio: float
    first: Callable[[], float]
    second: Callable[[], float]


def grouped(groups: int, rows: int, n: int, k: int) -> float:
    """FLOP of one grouped product."""
    return 2.0 * groups * rows * n * k


def _prefill(tokens: int) -> float:
    return price("gather_bmm", HF, "a100", tokens)


def _hf(kernel: str, tokens: int) -> Callable[[], float]:
    return lambda: price(kernel, HF, "a100", tokens)


EXPERTS_BACKENDS = "HF experts-backends"
TIMES = (
    Time(
        "VeOmni PR 460",
        "torch_grouped, H100, Qwen3-30B-A3B, T 32768",
        10.22e-3,
        lambda: price("torch_grouped", QWEN3, "h100", 32768),
    ),
    Time(
        "VeOmni PR 460",
        "torch_grouped, H100, E512 k10 H2048 I512, T 32768",
        11.4e-3,
        lambda: price("torch_grouped", NEXT, "h100", 32768),
    ),
    Time(
        "Liger PR 1294, inference",
        "triton, H100, Qwen3-30B-A3B, T 32768",
        flops(QWEN3, 32768) / 523e12,
        lambda: price("triton", QWEN3, "h100", 32768),
    ),
    Time(
        "Liger PR 1294, forward of training",
        "triton, H100, Qwen3-30B-A3B, T 32768",
        flops(QWEN3, 32768) / 501e12,
        lambda: price("triton", QWEN3, "h100", 32768),
    ),
    *(
        Time(
            "flashinfer PR 5301*",
            f"{kernel}, B200, DeepSeek-V3, EP8, {codes}, T 512",
            milliseconds * 1e-3,
            lambda kernel=kernel, scheme=scheme: price(kernel, R1_EP8, "b200", 512, scheme),
        )
        for kernel, codes, scheme, milliseconds in (
            ("flashinfer_trtllm", "bf16", "", 0.435795),
            ("flashinfer_trtllm_fp8", "mxfp8", "mxfp8", 0.260530),
            ("flashinfer_trtllm_nvfp4", "nvfp4", "nvfp4", 0.163697),
        )
    ),
    Time(
        EXPERTS_BACKENDS,
        "gather_bmm, A100, E60 k4 H2048 I1408, T 512 less T 128",
        (1235.64 - 316.56) * 1e-3 / HF_LAYERS,
        lambda: _prefill(512) - _prefill(128),
    ),
    Time(
        EXPERTS_BACKENDS,
        "torch_grouped less gather_bmm, A100, the same, T 1",
        (3235.42 - 2099.73) * 1e-3 / HF_STEPS / HF_LAYERS,
        lambda: price("torch_grouped", HF, "a100", 1) - price("gather_bmm", HF, "a100", 1),
    ),
)

AO = grouped(16, 512, 8192, 5120)  # 8192 rows of 16 experts
PRODUCTS = (
    Product("ao PR 2490", "16 x 512 x 8192 x 5120, bfloat16", AO, 1.31e-3, "torch_grouped", "h100", 512),
    Product("ao PR 2490", "the same, fp8 by rows", AO, 0.885e-3, "torch_scaled_grouped", "h100", 512),
    *(
        Product(
            "DeepGEMM README, H800",
            f"{groups} x {rows} x {n} x {k}, fp8",
            grouped(groups, rows, n, k),
            grouped(groups, rows, n, k) / (tflops * 1e12),
            kernel,
            "h100",
            rows,
        )
        for kernel, groups, rows, n, k, tflops in (
            ("deepgemm", 4, 8192, 4096, 7168, 1346),
            ("deepgemm", 4, 8192, 7168, 2048, 1214),
            ("batched_deepgemm", 4, 256, 4096, 7168, 932),
            ("batched_deepgemm", 4, 256, 7168, 2048, 815),
        )
    ),
    Product(
        "pytorch PR 156203*, H200",
        "128 x 1 x 2048 x 7168",
        grouped(128, 1, 2048, 7168),
        4.1462e-3,
        "torch_grouped",
        "h200",
        1,
    ),
    Product(
        "pytorch PR 156203*, H200",
        "16 x 128000 x 7168 x 7168",
        grouped(16, 128000, 7168, 7168),
        298.6668e-3,
        "torch_grouped",
        "h200",
        128000,
    ),
    Product(  # it says seconds; with those an H200 would run at 0.6 TFLOP/s
        "pytorch issue 163425*, H200",
        "32 x 1024 x 6144 x 2048",
        grouped(32, 1024, 6144, 2048),
        1.45e-3,
        "torch_grouped",
        "h200",
        1024,
    ),
    Product(
        "pytorch issue 163425*, H200",
        "the same, one by one",
        grouped(32, 1024, 6144, 2048),
        1.54e-3,
        "sorted_loop",
        "h200",
        1024,
    ),
)

ORDERS = (
    Order(
        "vllm PR 33490",
        "triton_fp8 before flashinfer_cutlass_hopper: DeepSeek-R1, TP8, H200, T 8192",
        1.3,
        lambda: price("triton_fp8", R1_TP8, "h200", 8192, "fp8_w8a8_block"),
        lambda: price("flashinfer_cutlass_hopper", R1_TP8, "h200", 8192, "fp8_w8a8_block"),
    ),
    Order(
        "vllm PR 29346",
        "triton_fp8 before deepgemm: DeepSeek-V3, TP8, H200, T 64",
        1.1,
        lambda: price("triton_fp8", R1_TP8, "h200", 64, "fp8_w8a8_block"),
        lambda: price("deepgemm", R1_TP8, "h200", 64, "fp8_w8a8_block"),
    ),
    Order(
        "vllm issue 28882",
        "deepgemm before triton_fp8: DeepSeek-R1, EP8, H200, T 32768",
        1.5,
        lambda: price("deepgemm", R1_EP8, "h200", 32768, "fp8_w8a8_block"),
        lambda: price("triton_fp8", R1_EP8, "h200", 32768, "fp8_w8a8_block"),
    ),
    Order(
        "vllm issue 28882",
        "triton_fp8 before deepgemm: the same, T 64",
        1.1,
        lambda: price("triton_fp8", R1_EP8, "h200", 64, "fp8_w8a8_block"),
        lambda: price("deepgemm", R1_EP8, "h200", 64, "fp8_w8a8_block"),
    ),
    Order(
        "vllm issue 41306",
        "triton before flashinfer_cutlass: Mixtral-8x7B, TP8, H200, T 1",
        3.22 / 2.66,
        lambda: price("triton", MIXTRAL_TP8, "h200", 1),
        lambda: price("flashinfer_cutlass", MIXTRAL_TP8, "h200", 1),
    ),
    Order(
        "sglang PR 21872",
        "triton_fp8 before flashinfer_cutlass_hopper: E128 I768, H100, T 64",
        1.138,
        lambda: price("triton_fp8", QWEN3, "h100", 64, "fp8_w8a8_block"),
        lambda: price("flashinfer_cutlass_hopper", QWEN3, "h100", 64, "fp8_w8a8_block"),
    ),
    Order(
        "torchtitan PR 1084",
        "torch_grouped before sorted_loop: llama4's debug model, H100, T 4096",
        4.0,
        lambda: price("torch_grouped", LLAMA4_DEBUG, "h100", 4096),
        lambda: price("sorted_loop", LLAMA4_DEBUG, "h100", 4096),
    ),
    *(
        Order(EXPERTS_BACKENDS, f"{first} before {second}: A100, T {tokens}", times[1] / times[0], *pair)
        for first, second, tokens, times in (
            ("gather_bmm", "torch_grouped", 1, (2099.73, 3235.42)),
            ("torch_grouped", "reference", 1, (3235.42, 4028.31)),
            ("torch_grouped", "gather_bmm", 128, (76.51, 316.56)),
            ("torch_grouped", "reference", 128, (76.51, 480.20)),
            ("torch_grouped", "reference", 512, (80.24, 523.33)),
            ("reference", "gather_bmm", 512, (523.33, 1235.64)),
        )
        for pair in [(_hf(first, tokens), _hf(second, tokens))]
    ),
)


TEXT = """# Prices beside published runs, and the plans that follow

Written by `python -m tests.oracle.published --write`; a test holds page and code together. Prices come from a formula
(`moe_fx/oracle/price.py`) and the costs beside each kernel. Nothing here was run by us: the published numbers are other
people's, on their machines. A ratio is our time divided by theirs; `test_published.py` keeps it between 0.6 and 1.67.
A * marks a source outside our notes on backends; `tests/oracle/published.py` lists what no price can say.

| source | layer, or product with experts x rows x out x in | published | ours | ratio |
|---|---|---|---|---|
{times}

Orders: which of two is faster, and how many times (published: at times of a whole server, or without a number, then
1.10). "reference" stands for a model's own loop over experts.

| source | order | published | ours |
|---|---|---|---|
{orders}

## Plans

Kernels by numbers of tokens, with nothing installed but PyTorch and Triton; `tests/oracle/golden_registered.json` has
them with prices and vetoes, for training, for CUDA graphs, and with libraries. On MI300X our Triton kernels are vetoed:
they are compiled for NVIDIA GPUs only so far, so there PyTorch's ops are all there is.

| layer | {devices} |
|---|{rule}
{plans}
"""


def page() -> str:
    """docs/prices.md."""
    devices = golden_registered.DEVICES
    return TEXT.format(
        times="\n".join(map(_row, (*TIMES, *PRODUCTS))),
        orders="\n".join(f"| {o.source} | {o.case} | {o.ratio:.2f} | {o.second() / o.first():.2f} |" for o in ORDERS),
        devices=" | ".join(devices),
        rule="---|" * len(devices),
        plans="\n".join(_plans(layer, request) for layer, request in _shown()),
    )


def _reached(product: Product) -> float:
    """Share of the peak."""
    return product.flop / product.published / PEAK


def ratio(fact: Time | Product) -> float:
    """Our time by the published one."""
    if isinstance(fact, Time):
        return fact.ours() / fact.published
    return _reached(fact) / share(fact.kernel, fact.device, fact.rows)


def _row(fact: Time | Product) -> str:
    if isinstance(fact, Time):
        case, published, ours = fact.case, f"{fact.published * 1e3:.2f} ms", f"{fact.ours() * 1e3:.2f} ms"
    else:
        case, published = f"{fact.kernel}: {fact.case}", f"{_reached(fact):.3g} of peak"
        ours = f"{share(fact.kernel, fact.device, fact.rows):.3g}"
    return f"| {fact.source} | {case} | {published} | {ours} | {ratio(fact):.2f} |"


def _shown() -> list[tuple[str, str]]:
    codes = [(layer, request) for request, (_, layers) in golden_registered.CODES.items() for layer in layers]
    return [*((layer, "bf16") for layer in golden_registered.LAYERS), *codes]


def _plans(layer: str, request: str) -> str:
    plans = [golden_registered.Situation(device, layer, request).plan for device in golden_registered.DEVICES]
    return f"| {layer}, {request} | {' | '.join(map(_ranges, plans))} |"


def _ranges(plan: Plan) -> str:
    if len(plan.ranges) == 1:
        return plan.ranges[0].kernel
    texts = [f"{r.kernel} {f'to {r.t_max}' if r.t_max else f'from {r.t_min}'}" for r in plan.ranges]
    return ", ".join(texts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print docs/prices.md.")
    parser.add_argument("--write", action="store_true", help="write it")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(page(), end="")
