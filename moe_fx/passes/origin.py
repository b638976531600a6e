"""Where in the user's model a node comes from, as reports say it."""

from __future__ import annotations

from torch.fx import Node


def fqn_of(node: Node) -> str:
    """Dotted name of the innermost module that the node's code belongs to."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "(root)"
    path = str(stack[-1][0]).replace("L['self']", "").replace("L['fn']", "").lstrip(".")
    for mark in ("._modules['", "']", '["', "_modules['"):
        path = path.replace(mark, "." if mark.endswith(("['", '["')) else "")
    return path.strip(".") or "(root)"


def source_of(node: Node) -> str:
    """file:line of the innermost frame outside torch, and its code."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").strip().splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ")]
    files = [i for i in frames if "/torch/" not in lines[i]] or frames
    if not files:
        return ""
    parts = lines[files[-1]].split('"')
    number = lines[files[-1]].split("line ")[-1].split(",")[0]
    code = lines[files[-1] + 1] if files[-1] + 1 < len(lines) else ""
    return f"{parts[1]}:{number} {code}"
