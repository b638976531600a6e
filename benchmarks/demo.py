"""The main job, end to end: Granite-3.0-1B-A400M at its true size, random weights, no downloads, one command.

    python benchmarks/demo.py

Builds the model, compiles it with Inductor and with moe_fx, generates greedily from a static cache with each of them
and with eager in turn, and prints what was fused, how fast each one is, and whether the answers are right.

The check.  All three continue the same prompt with the tokens that eager chose (teacher forcing), so every step of
prefill and decoding is compared, and a float32 run of the same weights is the truth.  A candidate passes if
  - the relative RMS error of its logits is at most 2 × eager's own + 4·eps(bfloat16),
  - its largest error is at most 2 × eager's own + 4·eps(bfloat16) × the largest logit,
  - its arg max is the truth's wherever the truth's margin exceeds twice eager's largest error at that position.
To show that the check can see a wrong expert, it is run once on eager with gate and up swapped in one layer of the 24:
that must fail.  Exit code 1 if anything is wrong.

Random weights have the scale of trained ones where it matters: matrices at 1/sqrt(fan in) and a router that is sure of
itself (twice that); at the initialisation of transformers (0.02 everywhere) the experts add nothing to the logits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

PROMPT, NEW, VOCAB = 64, 32, 49155
EPS = torch.finfo(torch.bfloat16).eps
# ibm-granite/granite-3.0-1b-a400m-base
GRANITE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=1024,
    intermediate_size=512,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=8,
    num_local_experts=32,
    num_experts_per_tok=8,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    embedding_multiplier=12.0,
    attention_multiplier=0.015625,
    residual_multiplier=0.22,
    logits_scaling=6.0,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


@dataclass
class Contestant:
    """forward: called as the model is.  prefill, decode: seconds of each round.  logits: of the check, [NEW, V]."""

    name: str
    forward: Callable[..., Any]
    first_call: float = 0.0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    logits: Tensor | None = None


@dataclass(frozen=True)
class Error:
    """Of logits against the truth.  rms: relative.  largest: absolute, at every position [NEW]."""

    rms: float
    largest: Tensor


def build_model(layers: int) -> nn.Module:
    """The model in bfloat16 with random weights, the same on every run."""
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM
    from transformers.initialization import no_init_weights

    config = GraniteMoeConfig(**{**GRANITE, "num_hidden_layers": layers})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():  # filled below, once
            model = GraniteMoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            elif "embed" in name:
                weight.normal_(std=0.02)
            else:
                weight.normal_(std=(2.0 if "router" in name else 1.0) * weight.shape[-1] ** -0.5)
    return model


def static_cache(model: nn.Module) -> Any:
    from transformers import StaticCache

    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=PROMPT + NEW)
    head = config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, config.num_key_value_heads, head, torch.bfloat16, torch.device("cpu"))
    return cache


def generate(forward: Callable[..., Any], cache: Any, prompt: Tensor, forced: Tensor | None = None) -> tuple[Any, ...]:
    """After ``prompt`` [1, P], greedily or with ``forced`` tokens: (logits [NEW, V], s of prefill, s of decoding)."""
    cache.reset()
    started = time.perf_counter()
    last = forward(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    prefilled = time.perf_counter()
    logits = [last]
    for step in range(NEW - 1):
        token = logits[-1].argmax(-1, keepdim=True) if forced is None else forced[step].view(1, 1)
        logits.append(forward(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1])
    done = time.perf_counter()
    return torch.cat(logits), prefilled - started, done - prefilled


def truth(model: nn.Module, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits [NEW, V] in float32 arithmetic of the same weights, in one pass without a cache."""
    weights = {name: p.float() for name, p in model.named_parameters()}
    inputs = torch.cat([prompt, tokens[None, :-1]], dim=1)
    keywords = {"input_ids": inputs, "logits_to_keep": NEW, "use_cache": False}
    output: Any = torch.func.functional_call(model, weights, kwargs=keywords)
    return output.logits[0]


def error(logits: Tensor, exact: Tensor) -> Error:
    difference = logits.float() - exact
    return Error((difference.norm() / exact.norm()).item(), difference.abs().amax(-1))


def failures(logits: Tensor, exact: Tensor, eager: Error) -> list[str]:
    """What is wrong with a candidate's logits; empty when it passes."""
    found, own, wrong = [], error(logits, exact), []
    if not logits.isfinite().all():
        return ["logits are not finite"]
    if own.rms > (bound := 2 * eager.rms + 4 * EPS):
        found.append(f"relative RMS error {own.rms:.4f} > {bound:.4f}")
    largest, bound = own.largest.max().item(), 2 * eager.largest.max().item() + 4 * EPS * exact.abs().max().item()
    if largest > bound:
        found.append(f"largest error {largest:.4f} > {bound:.4f}")
    decided = margin(exact) > 2 * eager.largest
    wrong = (decided & (logits.argmax(-1) != exact.argmax(-1))).nonzero().flatten().tolist()
    if wrong:
        found.append(f"another token at decided positions {wrong}")
    return found


def margin(exact: Tensor) -> Tensor:
    """Best minus second best logit [NEW]."""
    best = exact.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def swap_gate_and_up(model: Any) -> None:
    """In place, in the middle layer; twice is the identity."""
    weight = model.model.layers[len(model.model.layers) // 2].block_sparse_moe.experts.gate_up_proj
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))


def contestants(model: nn.Module, backend: str) -> list[Contestant]:
    names = dict.fromkeys(("inductor", backend))
    return [Contestant("eager", model), *(Contestant(n, torch.compile(model, backend=n)) for n in names)]


@torch.no_grad()
def run(args: argparse.Namespace, console: Console) -> int:
    started = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=9 + 3 * args.rounds)

        def say(text: str) -> None:
            progress.update(task, description=text, advance=1)
            if not console.is_terminal:
                console.print(f"[{time.perf_counter() - started:5.0f} s] {text}", markup=False)

        say("building Granite-3.0-1B-A400M with random weights")
        model = build_model(args.layers)
        prompt = torch.randint(1, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        field_ = contestants(model, args.backend)
        eager = field_[0]
        caches = {c.name: static_cache(model) for c in field_}

        say("eager: choosing the tokens")
        generate(eager.forward, caches["eager"], prompt)  # first touch
        tokens = generate(eager.forward, caches["eager"], prompt)[0].argmax(-1)
        eager.logits = generate(eager.forward, caches["eager"], prompt, tokens)[0]

        say("the same in float32, for the check")
        exact = truth(model, prompt, tokens)
        own = error(eager.logits, exact)

        say("a wrong expert, for the check")
        swap_gate_and_up(model)
        seen = failures(generate(eager.forward, caches["eager"], prompt, tokens)[0], exact, own)
        swap_gate_and_up(model)

        for contestant in field_[1:]:
            say(f"{contestant.name}: compiling prefill and decoding")
            begun = time.perf_counter()
            contestant.logits = generate(contestant.forward, caches[contestant.name], prompt, tokens)[0]
            contestant.first_call = time.perf_counter() - begun

        for number in range(args.rounds):
            if number and time.perf_counter() - started > args.budget:
                break
            for contestant in field_:
                say(f"{contestant.name}: round {number + 1} of {args.rounds}")
                _, prefill, decode = generate(contestant.forward, caches[contestant.name], prompt, tokens)
                contestant.prefill.append(prefill)
                contestant.decode.append(decode)

    if args.backend == "moe_fx":
        import moe_fx

        console.print(moe_fx.last_report())
    console.print(speed_table(field_))
    wrong = {c.name: failures(c.logits, exact, own) for c in field_[1:] if c.logits is not None}
    console.print(check_table(field_, exact, own, wrong))
    decided = int((margin(exact) > 2 * own.largest).sum())
    console.print(f"{decided} of {NEW} tokens are decided by more than the error of bfloat16.")
    if seen:
        console.print(f"Gate and up swapped in one layer: the check says {seen[0]}, as it should.")
    else:
        console.print("[red]Gate and up swapped in one layer: the check did not notice.")
    console.print(f"[dim]{time.perf_counter() - started:.0f} s in all, {torch.get_num_threads()} threads")
    return 1 if any(wrong.values()) or not seen else 0


def speed_table(field_: list[Contestant]) -> Table:
    title = f"Prompt {PROMPT}, {NEW} new tokens, batch 1, bfloat16: median of {len(field_[0].decode)} rounds in turn"
    table = Table(title=title, title_justify="left")
    for column in ("", "first call, s", "prefill, ms", "decode, tokens/s", "slowest … fastest", "× eager"):
        table.add_column(column, justify="right" if column else "left")
    base = statistics.median(field_[0].decode)
    for c in field_:
        median = statistics.median(c.decode)
        rate, low, high = ((NEW - 1) / s for s in (median, max(c.decode), min(c.decode)))
        first = f"{c.first_call:.1f}" if c.first_call else "-"
        prefill = f"{statistics.median(c.prefill) * 1e3:.0f}"
        table.add_row(c.name, first, prefill, f"{rate:.1f}", f"{low:.1f} … {high:.1f}", f"{base / median:.2f}")
    return table


def check_table(field_: list[Contestant], exact: Tensor, eager: Error, wrong: dict[str, list[str]]) -> Table:
    table = Table(title="Teacher-forced logits against float32", title_justify="left")
    for column in ("", "relative RMS error", "largest error", "verdict"):
        table.add_column(column, justify="left" if column in ("", "verdict") else "right")
    for c in field_:
        if c.logits is None:
            continue
        own = error(c.logits, exact)
        verdict = (
            "the yardstick" if c.name == "eager" else "[red]" + "; ".join(wrong[c.name]) if wrong[c.name] else "ok"
        )
        table.add_row(c.name, f"{own.rms:.4f}", f"{own.largest.max():.4f}", verdict)
    bound = f"{2 * eager.rms + 4 * EPS:.4f}", f"{2 * eager.largest.max() + 4 * EPS * exact.abs().max():.4f}"
    table.add_row("allowed", *bound, "", style="dim")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=24, help="fewer layers than the true 24, for a quick look")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (3)")
    parser.add_argument("--budget", type=float, default=270, help="seconds after which no further round starts (270)")
    parser.add_argument("--backend", default="moe_fx", help="another backend in the place of moe_fx")
    args = parser.parse_args()
    # said once per process of the version checks in transformers, whatever compiles it
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`-wrapped function")
    with tempfile.TemporaryDirectory() as folder:  # nothing compiled earlier may shorten the first call
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["MOE_FX_CACHE_DIR"] = folder
        return run(args, Console(width=None if sys.stdout.isatty() else 120))


if __name__ == "__main__":
    sys.exit(main())
