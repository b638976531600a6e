"""Run real tensors in the middle of a compilation, apart from everything that surrounds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes


def unseen() -> saved_tensors_hooks:
    """Hides what is saved for a backward from the caller's hooks: checkpointing counts it."""
    return saved_tensors_hooks(lambda t: t, lambda t: t)


@contextmanager
def isolated() -> Iterator[None]:
    """No tracing context, no dispatch or function modes (a default device among them), no inference mode, and the
    global random state as it was."""
    state = torch.get_rng_state()
    try:
        with (
            torch._guards.tracing(None),
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
            torch.inference_mode(False),
            unseen(),
        ):
            yield
    finally:
        torch.set_rng_state(state)
