"""The inner backend: compiles what is left of the graph, our ops included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from moe_fx.options import Options
from moe_fx.reasons import MoEFxOptionError


def compile_inner(gm: GraphModule, example_inputs: list[Any], options: Options) -> Callable[..., Any]:
    """The callable that Dynamo runs.  Raises MoEFxOptionError when the inner backend is not installed."""
    if options.inner_backend == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = dict(list_mode_options(options.mode)) if options.mode and options.mode != "default" else {}
        compiled: Any = compile_fx(gm, example_inputs, config_patches={**patches, **options.inductor})
        return compiled
    try:
        backend = torch._dynamo.lookup_backend(options.inner_backend)
    except Exception as error:
        raise MoEFxOptionError(f"inner_backend={options.inner_backend!r} is not available here: {error}") from error
    return backend(gm, example_inputs)
