"""Routers: from the ids and weights of a fused experts call back to the logits, and into the call (router="fuse")."""

from moe_fx.passes.routers.rewrite import Outcome, forget, fuse_routers

__all__ = ["Outcome", "forget", "fuse_routers"]
