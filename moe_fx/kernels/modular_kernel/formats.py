"""How tokens lie between prepare, experts and finalize."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class FusedMoEActivationFormat(Enum):
    """Standard: tokens [T, H] with their ids.  BatchedExperts: [El, max_tokens, H], one batch a local expert, with a
    count each; rows after the count are garbage and must not reach a result."""

    Standard = "standard"
    BatchedExperts = "batched_experts"


@dataclass(frozen=True, slots=True)
class ExpertTokensMetadata:
    """expert_num_tokens: int32 [El] on the device, rows of each local expert.  expert_num_tokens_cpu: the same on the
    host, where it is known there without waiting."""

    expert_num_tokens: Tensor
    expert_num_tokens_cpu: Tensor | None = None
