"""Routers three ways: a RouterSpec, the same by hand over Python floats, and as models write it in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.spec import RouterSpec

E, K = 8, 2
Row = list[float]
ByHand = Callable[[Row, Row, Row, int], tuple[list[int], Row]]
Written = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Router:
    """name: a class of HF-MOE.md, with what sets a variant apart.  by_hand: one row → (ids by falling choice, weights).
    written: (logits [T, E], bias [E], scale [E]) → (ids, weights); bias and scale are read where the spec has them."""

    name: str
    spec: RouterSpec
    by_hand: ByHand
    written: Written

    def __str__(self) -> str:
        return self.name


# --- by hand


def softmax(row: Row) -> Row:
    top = max(row)
    parts = [math.exp(v - top) for v in row]
    return [p / math.fsum(parts) for p in parts]


def sigmoid(row: Row) -> Row:
    return [1 / (1 + math.exp(-v)) for v in row]


def sqrtsoftplus(row: Row) -> Row:
    return [math.sqrt(math.log1p(math.exp(v))) for v in row]


def best(row: Row, k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda e: -row[e])[:k]


def limited(choice: Row, groups: int, kept: int, worth: Callable[[Row], float], fill: float) -> Row:
    size = len(choice) // groups
    worths = [worth(choice[g * size : (g + 1) * size]) for g in range(groups)]
    keep = set(best(worths, kept))
    return [v if e // size in keep else fill for e, v in enumerate(choice)]


def top2(row: Row) -> float:
    return sum(sorted(row)[-2:])


def over(row: Row, total: float) -> Row:
    return [v / total for v in row]


def hand_softmax(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    scores = softmax(row)
    ids = best(scores, k)
    return ids, [scores[e] for e in ids]


def hand_mixtral(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    ids, w = hand_softmax(row, bias, scale, k)
    return ids, over(w, sum(w))


def hand_late(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    ids = best(row, k)
    return ids, softmax([row[e] for e in ids])


def hand_g0(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    scores = sigmoid(row)
    ids = best([s + b for s, b in zip(scores, bias, strict=True)], k)
    w = [scores[e] for e in ids]
    return ids, [2.5 * v for v in over(w, sum(w) + 1e-20)]


def hand_kolibri(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    ids = best([v + b for v, b in zip(row, bias, strict=True)], k)
    return ids, sigmoid([row[e] for e in ids])


def hand_g1(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    scores = sigmoid(row)
    choice = limited([s + b for s, b in zip(scores, bias, strict=True)], 4, 2, top2, -math.inf)
    ids = best(choice, k)
    w = [scores[e] for e in ids]
    return ids, [2.5 * v for v in over(w, sum(w) + 1e-20)]


def hand_s2(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    choice = limited(softmax(row), 4, 2, max, 0.0)
    ids = best(choice, k)
    return ids, [16.0 * choice[e] for e in ids]


def hand_s2_top2(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    scores = softmax(row)
    ids = best(limited(scores, 4, 2, top2, 0.0), k)
    w = [scores[e] for e in ids]
    return ids, over(w, sum(w) + 1e-20)


def hand_s3(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    scores = softmax(row)
    ids = best([s + b for s, b in zip(scores, bias, strict=True)], k)
    w = [scores[e] for e in ids]
    return ids, over(w, max(sum(w), 1e-3))


def hand_gemma(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    ids, w = hand_mixtral(row, bias, scale, k)
    return ids, [v * scale[e] for v, e in zip(w, ids, strict=True)]


def hand_q1(row: Row, bias: Row, scale: Row, k: int) -> tuple[list[int], Row]:
    scores = sqrtsoftplus(row)
    ids = best([s + b for s, b in zip(scores, bias, strict=True)], k)
    w = [scores[e] for e in ids]
    return ids, [1.5 * v for v in over(w, sum(w) + 1e-20)]


# --- as models write it


def written_softmax(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float), K, dim=-1)
    return ids, weights.to(logits.dtype)


def written_mixtral(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(F.softmax(logits.float(), dim=-1), K, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return ids, weights


def written_late(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(logits, K, dim=-1)
    return ids, F.softmax(values, dim=1, dtype=values.dtype)


def written_g0(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(logits.to(torch.float32))
    ids = torch.topk(scores + bias, k=K, dim=1, sorted=False)[1]
    weights = scores.gather(dim=1, index=ids)
    return ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5


def written_kolibri(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.topk(logits + bias, K, dim=-1).indices
    return ids, torch.gather(logits, 1, ids).sigmoid()


def _groups(choice: Tensor, worth: Tensor, fill: float) -> Tensor:
    best_groups = torch.topk(worth, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(worth)
    mask.scatter_(1, best_groups, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, E // 4).reshape(-1, E)
    return choice.masked_fill(~mask.bool(), fill)


def written_g1(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    choice = scores + bias
    choice = _groups(choice, choice.view(-1, 4, E // 4).topk(2, dim=-1)[0].sum(dim=-1), float("-inf"))
    ids = torch.topk(choice, k=K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return ids, weights * 2.5


def written_s2(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    weights, ids = torch.topk(_groups(scores, scores.view(-1, 4, E // 4).max(dim=-1).values, 0.0), k=K, sorted=False)
    return ids, weights * 16.0


def written_s2_top2(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1)
    ids = torch.topk(_groups(scores, scores.view(-1, 4, E // 4).topk(2, dim=-1)[0].sum(dim=-1), 0.0), K, sorted=False)[
        1
    ]
    weights = scores.gather(1, ids)
    return ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)


def written_s3(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.softmax(logits, dim=1, dtype=torch.float)
    ids = torch.topk(scores + bias.squeeze(), K, dim=-1)[1]
    weights = torch.gather(scores, dim=-1, index=ids)
    weights = weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=1e-3)
    return ids, weights.to(logits.dtype)


def written_gemma(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float32), k=K, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return ids, weights * scale[ids]


def written_q1(logits: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.softplus(logits).sqrt()
    ids = torch.topk(scores + bias, K, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    return ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 1.5


_BIASED = dict(bias="scores", renormalise=True, sorted=False)
_G1 = dict(groups=4, topk_groups=2, group_score="top2_sum", group_fill=-math.inf)
ROUTERS = [
    Router("S1", RouterSpec(), hand_softmax, written_softmax),
    Router("S1 renormalised", RouterSpec(renormalise=True), hand_mixtral, written_mixtral),
    Router("T1", RouterSpec(order="topk_first"), hand_late, written_late),
    Router("G0", RouterSpec("sigmoid", eps=1e-20, scale=2.5, **_BIASED), hand_g0, written_g0),
    Router("G0 bias on logits", RouterSpec("sigmoid", "topk_first", bias="logits"), hand_kolibri, written_kolibri),
    Router("G1", RouterSpec("sigmoid", eps=1e-20, scale=2.5, **_BIASED, **_G1), hand_g1, written_g1),
    Router(
        "S2", RouterSpec(groups=4, topk_groups=2, weights_from="masked", scale=16.0, sorted=False), hand_s2, written_s2
    ),
    Router(
        "S2 top-2 sums",
        RouterSpec(groups=4, topk_groups=2, group_score="top2_sum", renormalise=True, eps=1e-20, sorted=False),
        hand_s2_top2,
        written_s2_top2,
    ),
    Router("S3", RouterSpec(bias="scores", renormalise=True, eps=1e-3, eps_form="clamp"), hand_s3, written_s3),
    Router("S1g", RouterSpec(renormalise=True, expert_scale=True), hand_gemma, written_gemma),
    Router("Q1", RouterSpec("sqrtsoftplus", eps=1e-20, scale=1.5, **_BIASED), hand_q1, written_q1),
]
