"""The options of ``torch.compile(..., backend="moe_fx", options={...})``, validated before anything is compiled."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moe_fx.quant import SCHEMES
from moe_fx.reasons import MoEFxOptionError

InnerBackend = Literal["inductor", "eager", "aot_eager", "cudagraphs", "tensorrt"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

LEAST_WORKSPACE = 1 << 20  # less would cut a handful of tokens into pieces

_NOT_BUILT = {
    "parallel": "expert parallelism",
}
ENVIRONMENT = {
    "MOE_FX_DISABLE": "1 hands every graph to the inner backend untouched",
    "MOE_FX_CACHE_DIR": "where measured plans and compiled kernels are kept; Inductor's cache directory by default",
    "MOE_FX_CXX": "the C++ compiler of the CPU kernels; empty does without them; CXX, g++ or clang++ by default",
    "MOE_FX_DUMP": "a directory: the same as dump_dir",
    "MOE_FX_OPTIONS": "a JSON object of options; those given to torch.compile win",
}


@dataclass(frozen=True, slots=True)
class Options:
    """kernel, layout: names, requested explicitly: used, or an error with every reason.  inner_backend: compiles the
    rest of the graph; ``inductor``: a dict of settings passed to it; ``mode``: as torch.compile's.  verify: "once" per
    distinct block, "always", or "off" (unsafe).  tune: measure the best candidates, as mode "max-autotune" does.
    memory: "view" the model's own storage, "copy" to a kernel's layout, "replace" the model's storage.  strict: raise
    where a stage fails.  dump_dir: readable dumps of every stage.  quantize: a scheme of ``quant.SCHEMES`` to which the
    expert weights are rounded, which changes results.  router: "keep" it in the graph or "fuse" it.  policy: how the
    oracle ranks.  workspace_bytes: most that the intermediate results of a block take; more tokens go through a part at
    a time."""

    kernel: str | None = None
    layout: str | None = None
    inner_backend: InnerBackend = "inductor"
    inductor: dict[str, Any] = field(default_factory=dict)
    mode: Mode | None = None
    verify: Literal["once", "always", "off"] = "once"
    tune: bool = False
    memory: Literal["view", "copy", "replace"] = "view"
    strict: bool = False
    dump_dir: str | None = None
    quantize: str | None = None
    parallel: dict[str, Any] | None = None
    router: Literal["keep", "fuse"] = "keep"
    policy: Literal["price", "priority"] = "price"
    workspace_bytes: int = 1 << 30

    @property
    def captured(self) -> bool:
        """CUDA graphs will hold what is compiled, where there is such a device: by the options, or by Inductor's own
        configuration."""
        from torch._inductor import config

        if self.inner_backend != "inductor":
            return self.inner_backend == "cudagraphs"
        if "triton.cudagraphs" in self.inductor:
            return bool(self.inductor["triton.cudagraphs"])
        return self.mode in ("reduce-overhead", "max-autotune") or bool(config.triton.cudagraphs)


def resolve(options: dict[str, Any] | None, mode: str | None = None) -> Options:
    """Options from MOE_FX_OPTIONS, then ``options``, then ``mode``; MoEFxOptionError says what to write instead."""
    given = {**_from_environment(), **(options or {})}
    if mode is not None:
        given["mode"] = mode
    hints = get_type_hints(Options)
    for name, value in given.items():
        if name not in hints:
            raise MoEFxOptionError(f"unknown option {name!r}{_suggest(name, list(hints))}")
        _check(name, value, hints[name])
        if name in _NOT_BUILT and value not in (None, False):
            raise MoEFxOptionError(f"option {name!r} is not available in this version: {_NOT_BUILT[name]} is not built")
    if given.get("memory") == "replace":
        raise MoEFxOptionError('memory="replace" is not available in this version; use "copy"')
    _check_quantize(given.get("quantize"), given.get("layout"))
    if (room := given.get("workspace_bytes", LEAST_WORKSPACE)) < LEAST_WORKSPACE:
        raise MoEFxOptionError(f"option 'workspace_bytes' must be at least {LEAST_WORKSPACE} (1 MiB), got {room}")
    if given.get("inductor") and given.get("inner_backend", "inductor") != "inductor":
        raise MoEFxOptionError(f"option 'inductor' has settings, but inner_backend is {given['inner_backend']!r}")
    if str(given.get("mode")).startswith("max-autotune"):
        given.setdefault("tune", True)
    return Options(**given)


def _check_quantize(scheme: str | None, layout: str | None) -> None:
    """Raises for an unknown scheme, and for a layout that contradicts it."""
    if scheme is not None and scheme not in SCHEMES:
        choices = ", ".join(map(repr, SCHEMES))
        raise MoEFxOptionError(f"option 'quantize' is {scheme!r}{_suggest(scheme, list(SCHEMES))}; allowed: {choices}")
    if scheme is not None and layout not in (None, "quantised"):
        raise MoEFxOptionError(f"quantize={scheme!r} makes a layout of its own: drop layout={layout!r} or quantize")
    if scheme is None and layout == "quantised":
        raise MoEFxOptionError("layout='quantised' needs a scheme: give quantize= instead")


def _from_environment() -> dict[str, Any]:
    text = os.environ.get("MOE_FX_OPTIONS")
    found: dict[str, Any] = {}
    if text:
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise MoEFxOptionError(f"MOE_FX_OPTIONS is not a JSON object: {error}") from error
        if not isinstance(found, dict):
            raise MoEFxOptionError(f"MOE_FX_OPTIONS must be a JSON object, got {text!r}")
    if dump := os.environ.get("MOE_FX_DUMP"):
        found.setdefault("dump_dir", dump)
    return found


def _check(name: str, value: Any, hint: Any) -> None:
    """Raises unless ``value`` is of the annotated type."""
    allowed = get_args(hint) if get_origin(hint) is not dict else ()
    literals = [a for arg in (hint, *allowed) if get_origin(arg) is Literal for a in get_args(arg)]
    if literals:
        optional = type(None) in allowed
        if value not in literals and not (value is None and optional):
            choices = ", ".join(repr(c) for c in literals)
            raise MoEFxOptionError(f"option {name!r} is {value!r}{_suggest(value, literals)}; allowed: {choices}")
        return
    types = tuple(get_origin(a) or a for a in (allowed or (get_origin(hint) or hint,)))
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise MoEFxOptionError(f"option {name!r} must be {wanted}, got {value!r}")


def _suggest(name: object, known: list[Any]) -> str:
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(map(str, known))}"


def disabled() -> bool:
    """The off switch."""
    return os.environ.get("MOE_FX_DISABLE", "") not in ("", "0")


def names() -> list[str]:
    return [f.name for f in fields(Options)]
