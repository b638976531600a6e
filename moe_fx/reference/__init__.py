"""The meaning of a spec in plain PyTorch: the one definition that every kernel, idiom and rewrite is compared with."""

from moe_fx.reference.activations import ACTIVATIONS, Activation, activation
from moe_fx.reference.experts import experts_backward, experts_forward

__all__ = ["ACTIVATIONS", "Activation", "activation", "experts_backward", "experts_forward"]
