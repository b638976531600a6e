"""Whole models of four layers at their true width: a prompt of 512 tokens, and decoding at batches of 1 and 16.

Weights are random and the vocabulary is cut to 1024.  Every contender continues the same prompt with the same tokens
from a static cache of its own; a float32 run of the same weights is the truth.  A contender passes if its relative RMS
error is at most 2 × that of the uncompiled model + 4·eps(bfloat16); with experts of random weights a routing that tips
over counts for both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import moe_fx
from benchmarks.gpu.contenders import inner
from benchmarks.gpu.report import number
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import error
from benchmarks.gpu.timing import MOST, Timed, attempt

EPS = torch.finfo(torch.bfloat16).eps
VOCAB, PROMPT, FORCED = 1024, 512, 8  # FORCED: decoding steps that are compared
DRY_PROMPT = 12
_COMMON = dict(vocab_size=VOCAB, max_position_embeddings=4096, num_hidden_layers=4, tie_word_embeddings=False)
# name → (its class in transformers without ForCausalLM, true width, the same in small)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3-30b-a3b": (
        "Qwen3Moe",
        dict(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)
        | dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128),
        dict(hidden_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
        | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    ),
    "olmoe-1b-7b": (
        "Olmoe",
        dict(hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8)
        | dict(num_attention_heads=16, num_key_value_heads=16),
        dict(hidden_size=64, intermediate_size=32, num_experts=4, num_experts_per_tok=2)
        | dict(num_attention_heads=4, num_key_value_heads=4),
    ),
    "granite-1b-a400m": (
        "GraniteMoe",
        dict(hidden_size=1024, intermediate_size=512, num_local_experts=32, num_experts_per_tok=8)
        | dict(num_attention_heads=16, num_key_value_heads=8),
        dict(hidden_size=64, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)
        | dict(num_attention_heads=4, num_key_value_heads=2),
    ),
}
WORKLOADS = ("decode 1", "prefill 512", "decode 16")  # in order of worth
NAMES = ("hf_eager", "hf_grouped_mm", "inductor_grouped_mm", "moe_fx:compiled")


@dataclass(slots=True)
class Job:
    """One workload of one model.  batch 0: the prompt alone."""

    model: Any
    batch: int
    prompt: Tensor
    forced: Tensor

    @property
    def exact(self) -> Tensor:
        """float32 logits of what is compared, in one pass without a cache."""
        weights = {name: p.float() for name, p in self.model.named_parameters()}
        ids, keep = torch.cat([self.prompt, self.forced], 1), self.forced.shape[1]
        given = dict(input_ids=ids, use_cache=False) | (dict(logits_to_keep=keep) if keep else {})
        found: Any = torch.func.functional_call(self.model, weights, kwargs=given)
        return found.logits.float()


def items(session: Session) -> list[str]:
    return [f"{name} {workload}" for name in chosen(session) for workload in WORKLOADS]


def chosen(session: Session) -> list[str]:
    return [name for name in MODELS if name in session.shapes]


def models(session: Session, part: str) -> Iterator[str]:
    left = len(items(session))
    session.layer = None
    for name in chosen(session):
        model: Any = None
        for workload in WORKLOADS:
            yield f"{name} {workload}"
            model = build(session, name) if model is None else model
            session.found["models"] += _measured(session, model, name, workload, 0.4 * session.slice(left))
            left -= 1


def build(session: Session, name: str) -> nn.Module:
    """Matrices at 1/sqrt(fan in), routers twice that, so that a routing seldom tips over."""
    import transformers

    family, wide, small = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**_COMMON, **(small if session.dry else wide))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with session.device:
            model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    for label, weight in model.named_parameters():
        router = "router" in label or label.endswith("mlp.gate.weight")
        if weight.dim() == 1:
            weight.fill_(1.0)
        elif "embed" in label:
            weight.normal_()
        else:
            weight.normal_(std=(2.0 if router else 1.0) * weight.shape[-1] ** -0.5)
    found: nn.Module = model
    return found


def _measured(session: Session, model: Any, name: str, workload: str, seconds: float) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    batch = 0 if workload.startswith("prefill") else int(workload.split()[1])
    draw = torch.Generator(session.device).manual_seed(batch)
    length = DRY_PROMPT if session.dry else PROMPT
    ids = torch.randint(1, VOCAB, (max(1, batch), length + FORCED), device=session.device, generator=draw)
    job = Job(model, batch, ids[:, :length], ids[:, length:] if batch else ids[:, :0])
    implement(model, "eager")  # which takes float32 on every device
    exact = job.exact
    own, rows, timed = float("inf"), [], []
    for contender in NAMES:
        row: dict[str, Any] = dict(model=name, workload=workload, contender=contender, reason="", ms=None)
        row |= dict(fastest_ms=None, rounds=0, tokens_per_s=None, error=None, own_error=None, fused=None, notes=[])
        rows.append(row)
        if contender not in session.names:
            row["reason"] = "not asked for"
            continue
        before = dict(counters["inductor"])
        made, reason = attempt(session.device, lambda c=contender: _ready(session, job, c))  # type: ignore[misc]
        if made is None:
            row["reason"] = f"failed: {reason}"
            continue
        call, logits = made
        found = error(logits, exact)
        own = min(own, found) if contender.startswith("hf_") else own
        row |= dict(error=number(found), own_error=number(own))
        if contender == "moe_fx:compiled":
            report = moe_fx.last_report()
            row["fused"] = f"{report.num_fused}/{report.num_blocks}"
        more = {k: n - before.get(k, 0) for k, n in counters["inductor"].items() if "cudagraph" in k}
        row["notes"] = [f"{k}: {n}" for k, n in more.items() if n]
        bound = 2 * own + 4 * EPS
        if not found <= bound:
            row["reason"] = f"wrong: relative RMS error {found:.1e} > {bound:.1e}"
            continue
        timed.append(Timed(contender, call))
    session.clock.interleave(timed, lambda turn: None, seconds)
    for one in timed:
        row = next(r for r in rows if r["contender"] == one.name)
        row["reason"] = "" if one.ms else one.why
        if one.ms:
            ms = statistics.median(one.ms)
            count = batch or length
            row |= dict(ms=ms, fastest_ms=min(one.ms), rounds=len(one.ms), tokens_per_s=count / ms * 1e3)
    return rows


def implement(model: Any, name: str) -> None:
    model.config._experts_implementation = name


def _ready(session: Session, job: Job, contender: str) -> tuple[Callable[[], Any], Tensor]:
    """(what is timed: the prompt, or one more step of decoding; the logits that are compared)."""
    model, implementation = job.model, "eager" if contender == "hf_eager" else "grouped_mm"
    implement(model, implementation)
    forward = _forward(session, model, contender)

    def run(**given: Any) -> Tensor:
        implement(model, implementation)  # Dynamo guards on it
        if session.clock.cuda:
            torch.compiler.cudagraph_mark_step_begin()  # the last result may be written over
        found: Tensor = forward(**given).logits
        return found

    if not job.batch:
        given = dict(input_ids=job.prompt, use_cache=False)
        for _ in range(2):  # a graph is recorded at the second call
            run(**given)
        return lambda: run(**given), run(**given).float()
    cache = _cache(session, job)
    model(input_ids=job.prompt, past_key_values=cache, logits_to_keep=1)
    token, logits = job.forced[:, :1].clone(), []
    for step in range(job.forced.shape[1]):
        token.copy_(job.forced[:, step : step + 1])
        logits.append(run(input_ids=token, past_key_values=cache, logits_to_keep=1).float())
    return lambda: run(input_ids=token, past_key_values=cache, logits_to_keep=1), torch.cat(logits, 1)


def _forward(session: Session, model: Any, contender: str) -> Callable[..., Any]:
    mode = "reduce-overhead" if session.clock.cuda else None
    if contender == "moe_fx:compiled":
        options: dict[str, Any] = dict(mode=mode) if mode else {}
        found: Callable[..., Any] = moe_fx.compile(model, dynamic=False, inner_backend=inner(session.device), **options)
        return found
    if contender == "inductor_grouped_mm":
        return torch.compile(model, backend=inner(session.device), mode=mode, dynamic=False)
    forward: Callable[..., Any] = model
    return forward


def _cache(session: Session, job: Job) -> Any:
    from transformers import StaticCache

    config: Any = job.model.config
    room = job.prompt.shape[1] + FORCED + MOST + 2
    cache = StaticCache(config=config, max_cache_len=room)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(job.batch, config.num_key_value_heads, head, torch.bfloat16, session.device)
    return cache
