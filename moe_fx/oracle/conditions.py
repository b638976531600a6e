"""What a backend is wanted for, and the named conditions that tables of backends are written with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_fx.hardware import Device, detect
from moe_fx.kernels.capability import NO_ALL2ALL, PLAIN, Scheme
from moe_fx.kernels.config import FusedMoEConfig
from moe_fx.kernels.libraries.rows import SM100, SM120
from moe_fx.quant import FP8_BLOCK, FP8_GROUP

PLATFORMS = frozenset({"cuda", "rocm", "xpu", "cpu", "tpu"})


def this_device() -> Device:
    """The device that this process would run a layer on."""
    return detect(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True, slots=True)
class Asked:
    """config: the layer, with the backend that the user insists on (``moe_backend``, "auto": none).  scheme: keys of
    weights and activations.  use_ep, use_dp: experts, tokens are spread over ranks; None: as ``config`` says.
    without: backends that the caller rules out, with the reason."""

    config: FusedMoEConfig
    device: Device
    scheme: Scheme = PLAIN
    use_ep: bool | None = None
    use_dp: bool | None = None
    without: Mapping[Any, str] = field(default_factory=dict)

    @property
    def batched(self) -> bool:
        """Tokens come as one batch an expert."""
        return self.config.moe_parallel_config.use_batched_activation_format

    @property
    def all2all(self) -> str:
        """What carries tokens to other ranks."""
        parallel = self.config.moe_parallel_config
        return parallel.all2all_backend if parallel.use_all2all_kernels else NO_ALL2ALL

    @property
    def spreads_experts(self) -> bool:
        return self.config.use_ep if self.use_ep is None else self.use_ep

    @property
    def spreads_tokens(self) -> bool:
        return self.config.dp_size > 1 if self.use_dp is None else self.use_dp


@dataclass(frozen=True, slots=True)
class Condition:
    """text: completes "where …"."""

    text: str
    holds: Callable[[Asked], bool]


def no(condition: Condition) -> Condition:
    return Condition(f"not: {condition.text}", lambda asked: not condition.holds(asked))


def on(*kinds: str) -> Condition:
    """The device is of one of these kinds."""
    return Condition(f"the device is {' or '.join(kinds)}", lambda asked: asked.device.kind in kinds)


HOPPER = Condition("the device is sm90 exactly", lambda asked: asked.device.arch == "sm90")
BLACKWELL = Condition("the device is of the sm100 family", lambda asked: asked.device.arch in SM100)
BLACKWELL_RTX = Condition("the device is of the sm120 family", lambda asked: asked.device.arch in SM120)
ELSEWHERE = Condition(
    "the device is of a kind that only a plugin knows", lambda asked: asked.device.kind not in PLATFORMS
)
EP = Condition("ep_size > 1", lambda asked: asked.config.ep_size > 1)
DP = Condition("dp_size > 1", lambda asked: asked.spreads_tokens)
EP_WITHOUT_DP = Condition(
    "experts are spread over ranks and tokens are not",
    lambda asked: asked.spreads_experts and not asked.spreads_tokens,
)
DEEPEP_V2 = Condition("tokens travel by deepep_v2", lambda asked: asked.all2all == "deepep_v2")
BLOCKS = Condition("fp8 in blocks of 128", lambda asked: asked.scheme == (FP8_BLOCK, FP8_GROUP))
ROUNDED = Condition("activations are quantised", lambda asked: asked.scheme[1] is not None)
OAI = Condition("the activation is swiglu_oai", lambda asked: asked.config.mathematics.expert.act == "swiglu_oai")
LORA = Condition("experts have LoRA adapters", lambda asked: asked.config.is_lora_enabled)
