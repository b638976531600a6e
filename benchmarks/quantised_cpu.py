"""Times blocks over quantised weights on this machine's CPU: eager, Inductor, and moe_fx on Inductor, in one process.

    python benchmarks/quantised_cpu.py --json out.json          forms of libraries that are not installed are left out

One MoE block of gated-SiLU experts in numbered modules, a loop with ``torch.where`` over them, bfloat16, no gradients.
The contestants take turns; the median of the rounds is printed, and how many times as fast as eager each is.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 1024, 1024
Make = Callable[[nn.Linear], nn.Module]


class Naive(nn.Module):
    """Dequantise, then multiply.  Groups of ``group`` inputs share a scale."""

    def __init__(self, linear: nn.Linear, kind: str, group: int) -> None:
        super().__init__()
        w = linear.weight.detach().float().unflatten(-1, (-1, group))
        most = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[kind]
        scale = w.abs().amax(-1) / most
        flat = (w / scale[..., None]).flatten(-2)
        codes = flat.to(torch.float8_e4m3fn) if kind == "fp8" else flat.round().to(torch.int8)
        self.kind, self.group = kind, group
        if kind == "int4":
            nibbles = (codes + 8).to(torch.uint8)
            codes = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        codes: Tensor = self.codes  # type: ignore[assignment]
        if self.kind == "int4":
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.int8) - 8
        w = codes.to(x.dtype).unflatten(-1, (-1, self.group)) * self.scale[..., None]  # type: ignore[index]
        return F.linear(x, w.flatten(-2))


class Expert(nn.Module):
    def __init__(self, make: Make) -> None:
        super().__init__()
        sizes = {"gate": (HIDDEN, INTERMEDIATE), "up": (HIDDEN, INTERMEDIATE), "down": (INTERMEDIATE, HIDDEN)}
        for name, (size, out) in sizes.items():
            setattr(self, name, make(nn.Linear(size, out, bias=False, dtype=torch.bfloat16)))

    def forward(self, x: Tensor) -> Any:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[operator]


class Block(nn.Module):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=torch.bfloat16)
        self.experts = nn.ModuleList(Expert(make) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


def _torchao(config: str) -> nn.Module:
    import torchao.quantization as library

    model = Block(lambda linear: linear)
    library.quantize_(model.experts, getattr(library, config)())
    return model


def _bitsandbytes(linear: nn.Linear, bits: int) -> nn.Module:
    import bitsandbytes as library

    made: Any
    if bits == 8:
        made = library.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        made.weight = library.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False)
    else:
        made = library.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
        made.support_avx512bf16_for_cpu = False  # the packing that moe_fx does not read
        made.weight = library.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    found: nn.Module = made.to("cpu")
    return found


FORMS: dict[str, Callable[[], nn.Module]] = {
    "fp8, a scale a channel": lambda: Block(partial(Naive, kind="fp8", group=1024)),
    "fp8, groups of 128": lambda: Block(partial(Naive, kind="fp8", group=128)),
    "int8, a scale a channel": lambda: Block(partial(Naive, kind="int8", group=1024)),
    "int4, groups of 128": lambda: Block(partial(Naive, kind="int4", group=128)),
    "torchao int8": partial(_torchao, "Int8WeightOnlyConfig"),
    "torchao fp8": partial(_torchao, "Float8WeightOnlyConfig"),
    "bitsandbytes int8": lambda: Block(partial(_bitsandbytes, bits=8)),
    "bitsandbytes nf4": lambda: Block(partial(_bitsandbytes, bits=4)),
}


def _apart(model: nn.Module) -> nn.Module:
    """A copy with code of its own: where Dynamo gives a loop up, it skips that code for every backend."""
    own: Any = Block.forward
    forward = FunctionType(own.__code__.replace(), own.__globals__)
    twin = copy.deepcopy(model)
    twin.__class__ = type("Block", (Block,), {"forward": forward})
    return twin


def measure(name: str, tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = FORMS[name]().eval()
    model(torch.randn(64, HIDDEN, dtype=torch.bfloat16))  # libraries make their state
    torch._dynamo.reset()
    runs = {
        "eager": model,
        "inductor": torch.compile(_apart(model), dynamic=True),
        "moe_fx": torch.compile(model, backend="moe_fx", dynamic=True),
    }
    found = []
    for count in tokens:
        inputs = [torch.randn(count, HIDDEN, dtype=torch.bfloat16) for _ in range(4)]
        times: dict[str, list[float]] = {run: [] for run in runs}
        for x in inputs:
            exact = model(x).double()
            assert (runs["moe_fx"](x).double() - exact).norm() <= 0.03 * exact.norm(), (name, count)
            runs["inductor"](x)
        assert moe_fx.last_report().num_fused, name
        for turn in range(rounds):
            for run, function in runs.items():
                started = time.perf_counter()
                function(inputs[turn % 4])
                times[run].append(time.perf_counter() - started)
        medians = {run: statistics.median(each) for run, each in times.items()}
        found.append({"form": name, "tokens": count, "ms": {run: 1e3 * m for run, m in medians.items()}})
        ratios = "  ".join(f"{run} {1e3 * m:7.2f} ms {medians['eager'] / m:5.2f}x" for run, m in medians.items())
        print(f"{name:26} T {count:4}  {ratios}", flush=True)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.forms:
        try:
            rows += measure(name, options.tokens, options.rounds)
        except ImportError as error:
            print(f"{name:26} left out: {error}")
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
