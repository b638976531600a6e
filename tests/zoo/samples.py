"""Tiny random models of the zoo.

Enters: a family's name, an experts implementation, a dtype and a seed. Leaves: a Sample, that is a model in evaluation
mode, inputs that run every MoE block of it, and what to compare of its output. Holds: the same arguments give the same
bits; weights and biases are random at a scale that keeps activations O(1), so no MoE block is negligible
(`moe_matters`); nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from .families import FAMILIES, Family, Implementation

COMMON: dict[str, Any] = dict(
    vocab_size=96,
    vocab_size_per_layer_input=96,
    unpadded_vocab_size=96,
    tie_word_embeddings=False,
    max_position_embeddings=128,
    model_max_length=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_size=32,
    hidden_size_per_layer_input=8,
    num_hidden_layers=2,
    mlp_layer_types=["sparse", "sparse"],
    mlp_only_layers=[],
    first_k_dense_replace=0,
    # attention: grouped, latent, indexed
    num_attention_heads=4,
    num_key_value_heads=2,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    head_dim=8,
    swa_head_dim=8,
    kv_lora_rank=16,
    q_lora_rank=16,
    o_lora_rank=16,
    o_groups=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    sliding_window=8,
    sliding_window_size=8,
    index_topk=64,
    index_head_dim=16,
    index_n_heads=2,
    # linear attention and state-space mixers
    linear_head_dim=8,
    linear_num_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_dt_rank=8,
    mamba_chunk_size=8,
    # feed-forward: dense, shared, routed. 2 * 24 is no other size of the model: a transposed weight cannot pass
    intermediate_size=40,
    shared_intermediate_size=40,
    shared_expert_intermediate_size=40,
    shared_experts_intermediate_size=40,
    moe_intermediate_size=24,
    num_experts=8,
    num_local_experts=8,
    n_routed_experts=8,
    moe_num_experts=8,
    num_experts_per_tok=2,
    num_experts_per_token=2,
    top_k_experts=2,
    moe_topk=2,
    moe_k=2,
    num_shared_experts=1,
    n_shared_experts=1,
    moe_num_shared_experts=1,
    swiglu_limit=0.5,  # low enough to clamp activations of a tiny model
)

_CORRECTION = re.compile("correction_bias|expert_bias|balancing_biases")


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A tiny model ready to run: `sample.output(sample.model(**sample.inputs))`.

    model: evaluation mode, on the CPU. inputs: keyword arguments of 2 sequences of 11 tokens.
    """

    family: Family
    implementation: Implementation | None
    model: nn.Module
    inputs: Mapping[str, Any]

    def inputs_of(self, batch: int, length: int, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for `batch` sequences of `length` tokens, drawn with `seed`.

        Patches: `batch` images of 2 by (length rounded up to even) patches. Images: `batch`, whatever the length.
        """
        generator = torch.Generator().manual_seed(seed)
        return _INPUTS[self.family.inputs](self.model, batch, length, generator)

    def output(self, out: Any) -> tuple[Tensor, ...]:
        """What to compare of a forward's result: logits, or else the last hidden state, or else feature maps."""
        for name in ("logits", "last_hidden_state", "feature_maps"):
            value = getattr(out, name, None)
            if value is not None:
                return (value,) if isinstance(value, Tensor) else tuple(value)
        raise TypeError(f"{self.family.name}: nothing to compare in {type(out).__name__}")


def unavailable(name: str) -> str | None:
    """Why this transformers has no such family, or None when it has it."""
    family = FAMILIES[name]
    try:
        module = importlib.import_module(family.python_module)
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None if hasattr(module, family.model) else f"{family.python_module} has no {family.model}"


def available(name: str) -> bool:
    """Whether the installed transformers has the family; `unavailable` gives the reason."""
    return unavailable(name) is None


def build(
    name: str,
    implementation: Implementation | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Sample:
    """A tiny random model of the family with its inputs.

    implementation: experts_implementation, None for the model's own default. dtype: the float32 sample as
    from_pretrained(dtype=...) would load it: rounded, except what transformers creates or keeps in float32.
    config: overrides of the family's tiny configuration, for variants.
    """
    family = FAMILIES[name]
    if implementation not in family.implementations:
        raise ValueError(f"{name}: implementation {implementation!r} is not one of {family.implementations}")
    model_class = getattr(importlib.import_module(family.python_module), family.model)
    chosen = {} if implementation is None else {"experts_implementation": implementation}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(_config(model_class, family, config or {}), dtype=dtype, **chosen).eval()
    if family.inputs == "patches":
        AttentionInterface.register("zoo_flash", _packed_attention)
        model.config._attn_implementation_internal = "zoo_flash"  # the setter would look for a package of that name
    if dtype is torch.float32:
        _randomise(model, torch.Generator().manual_seed(seed))
    else:
        _keep_in_float32(model, dtype)
        model.load_state_dict(build(name, implementation, torch.float32, seed, config).model.state_dict())
    sample = Sample(family, implementation, model, {})
    return dataclasses.replace(sample, inputs=sample.inputs_of(batch=2, length=11, seed=seed))


def experts_modules(sample: Sample) -> dict[str, nn.Module]:
    """The experts of every MoE block, executed or not, by qualified name."""
    pattern = re.compile(sample.family.experts_class)
    return {name: module for name, module in sample.model.named_modules() if pattern.fullmatch(type(module).__name__)}


@torch.no_grad()
def blocks_run(sample: Sample) -> list[str]:
    """Qualified names of the experts modules one forward executes, in order, once per execution."""
    run: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: run.append(name))
        for name, module in experts_modules(sample).items()
    ]
    sample.model(**sample.inputs)
    for hook in hooks:
        hook.remove()
    return run


@torch.no_grad()
def moe_matters(sample: Sample) -> dict[str, float]:
    """How much each MoE block that runs weighs: relative change of the output when one of its experts is scaled by 1.5.

    Leaves block name -> the largest change over that block's experts; the model is left as it was.
    """
    experts = experts_modules(sample)
    reference = sample.output(sample.model(**sample.inputs))
    return {
        name: max(_change(sample, reference, weights) for weights in _experts_weights(experts[name]))
        for name in dict.fromkeys(blocks_run(sample))
    }


def relative_error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest absolute difference over largest absolute expected value, the worst of a tuple of tensors.

    Infinite if a shape differs or an actual value is not finite.
    """
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape or not bool(torch.isfinite(a).all()):
            return float("inf")
        worst = max(worst, float((a.double() - e.double()).abs().max() / e.double().abs().max()))
    return worst


def _config(model_class: type[nn.Module], family: Family, overrides: Mapping[str, Any]) -> Any:
    """The tiny configuration: COMMON where the class has such a field, then the family's own, then the caller's."""
    fields = {f.name for f in dataclasses.fields(model_class.config_class)}
    values = {key: value for key, value in COMMON.items() if key in fields}
    if {"kv_lora_rank", "num_key_value_heads"} <= fields:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has one key per query head
    return model_class.config_class(**{**values, **family.config, **overrides})


def _keep_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Widens what from_pretrained keeps in float32: _keep_in_fp32_modules_strict, and the lenient list in float16."""
    patterns = [re.compile(p.replace(".", r"\.").replace("*", ".*")) for p in model._get_dtype_plan(dtype)]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(pattern.search(name) for pattern in patterns):
            tensor.data = tensor.data.float()


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter and saved buffer.

    Matrices N(0, 1/fan_in); embeddings N(0, 1); vectors and scalars the value they had + 0.1 N(0, 1), so norms are near
    one, and biases and attention sinks are not zero; correction biases of routers 0.05 N(0, 1), enough to move some
    choices and not enough to make all of them.
    """
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for path, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) not in saved:
                continue
            saved.remove(id(tensor))  # tied weights are drawn once
            noise = torch.randn(tensor.shape, generator=generator)
            if name == "tid2eid":
                tensor.copy_(_hash_routes(*tensor.shape, module.num_experts, generator))
            elif not tensor.is_floating_point():
                raise TypeError(f"{path}.{name}: no rule for a saved {tensor.dtype}")
            elif _CORRECTION.search(name):
                tensor.copy_(0.05 * noise)
            elif isinstance(module, nn.Embedding):
                tensor.copy_(noise)
            elif tensor.ndim < 2:
                tensor.copy_(tensor.float() + 0.1 * noise)
            else:
                gain = 2.0 if "router_mlp" in path else 1.0  # zaya's router: its three layers shrink the logits
                tensor.copy_(gain * noise * _fan_in(tensor) ** -0.5)


def _fan_in(weight: Tensor) -> int:
    """Inputs per output of [out, in], experts' [E, out, in], depthwise [C, 1, width], [out, in, height, width]."""
    return weight[0].numel() if weight.ndim >= 4 else weight.shape[-1]


def _hash_routes(tokens: int, k: int, experts: int, generator: torch.Generator) -> Tensor:
    """k distinct experts for each token id, [tokens, k] int64."""
    return torch.rand(tokens, experts, generator=generator).argsort(dim=-1)[:, :k]


def _experts_weights(module: nn.Module) -> Iterator[list[Tensor]]:
    """For each expert of an experts module, views of its weights."""
    containers = [child for child in module.modules() if isinstance(child, nn.ModuleDict | nn.ModuleList)]
    stacked = [p.data for p in module.parameters() if p.ndim == 3]
    if containers:
        experts = [[p.data for p in child.parameters()] for child in containers[0].children()]
        yield from filter(None, experts)
    elif stacked:
        yield from ([weight[e] for weight in stacked] for e in range(min(len(weight) for weight in stacked)))
    else:
        flat = [p.data for p in module.parameters() if p.ndim == 2 and len(p) % module.num_experts == 0]
        yield from (list(weights) for weights in zip(*(p.chunk(module.num_experts) for p in flat), strict=True))


def _change(sample: Sample, reference: tuple[Tensor, ...], weights: list[Tensor]) -> float:
    """Relative change of the output when `weights` are multiplied by 1.5; they are put back."""
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.mul_(1.5)
    change = relative_error(sample.output(sample.model(**sample.inputs)), reference)
    for weight, value in zip(weights, kept, strict=True):
        weight.copy_(value)
    return change


def _tokens(model: nn.Module, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(3, COMMON["vocab_size"], (batch, length), generator=generator)
    return {"input_ids": ids, "use_cache": False}


def _embeddings(model: nn.Module, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    embeddings = torch.randn(batch, length, model.config.hidden_size, generator=generator)
    return {"inputs_embeds": embeddings.to(model.dtype), "use_cache": False}


def _patches(model: nn.Module, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    width, config = length + length % 2, model.config
    pixels = torch.randn(batch * 2 * width, config.num_channels * config.patch_size**2, generator=generator)
    grid = torch.tensor([[1, 2, width]] * batch)
    return {
        "pixel_values": pixels.to(model.dtype),
        "grid_thw": grid,
        # what follows from the grid is computed here: in the model it would break the graph
        "position_ids": get_vision_position_ids(grid, config.spatial_merge_size),
        "cu_seqlens": get_vision_cu_seqlens(grid),
        "max_seqlen": 2 * width,
    }


def _packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, cu_seq_lens_q: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Attention of each image to itself, [1, heads, patches, dim] -> [1, patches, heads, dim], in one graph.

    Transformers' sdpa path splits by cu_seqlens.tolist(), which no graph can hold; its flash path needs a GPU.
    """
    image = torch.bucketize(torch.arange(query.shape[2], device=query.device), cu_seq_lens_q, right=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=image[:, None] == image)
    return out.transpose(1, 2), None


def _images(model: nn.Module, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    config = model.config
    pixels = torch.randn(batch, config.num_channels, *config.image_size, generator=generator)
    return {"pixel_values": pixels.to(model.dtype), "dataset_index": torch.arange(batch) % config.num_experts}


_INPUTS = {"tokens": _tokens, "embeddings": _embeddings, "patches": _patches, "images": _images}
