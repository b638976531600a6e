"""The command line: ``moe_fx explain MODEL | tune MODEL | zoo | doctor`` (also as ``python -m moe_fx``).

Models get random weights and nothing is downloaded.  Exit code 0: done; 1: the zoo found a failure; 2: bad input.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_fx.reasons import MoEFxError

PACKAGES = ("torch", "transformers", "triton", "torch-tensorrt", "sympy", "rich")
# private names that capture, verification and lowering build on: module, attribute path, what it serves
HOOKS = (
    ("torch._dynamo.symbolic_convert", "InliningInstructionTranslator.inline_call", "loops of transformers' experts"),
    ("torch._dynamo.variables", "UserFunctionVariable", "loops of transformers' experts"),
    ("torch._dynamo.exc", "TorchDynamoException", "loops of transformers' experts, and with torch.where"),
    ("transformers.integrations.moe", "ExpertsInterface.get_interface", "loops of transformers' experts"),
    ("transformers.integrations.moe", "grouped_mm_experts_forward", "loops of transformers' experts"),
    ("torch._dynamo.symbolic_convert", "InstructionTranslator.run", "loops with torch.where, without fullgraph"),
    ("torch._dynamo.exc", "BackendCompilerFailed", "loops with torch.where, without fullgraph"),
    ("torch._dynamo.exc", "RestartAnalysis", "loops with torch.where, without fullgraph"),
    ("torch._dynamo.exc", "SkipFrame", "loops with torch.where, without fullgraph"),
    ("torch._dynamo.exc", "TensorifyScalarRestartAnalysis", "loops with torch.where, without fullgraph"),
    ("torch._dynamo.exc", "UnspecializeRestartAnalysis", "loops with torch.where, without fullgraph"),
    (
        "torch._dynamo.resume_execution",
        "ContinueExecutionCache.generated_code_metadata",
        "loops with torch.where, without fullgraph",
    ),
    ("torch._guards", "CompileContext.get", "loops with torch.where, without fullgraph"),
    ("torch._guards", "TracingContext.try_get", "loops with torch.where, without fullgraph"),
    ("torch.fx.experimental.symbolic_shapes", "ShapeEnvSettings", "loops with torch.where, without fullgraph"),
    ("torch.fx.experimental.symbolic_shapes", "free_unbacked_symbols", "reading the sizes of a graph"),
    ("torch.fx.experimental.symbolic_shapes", "statically_known_true", "reading the sizes of a graph"),
    ("torch._subclasses.fake_tensor", "FakeTensor", "telling captured values from true ones"),
    ("torch._ops", "HigherOrderOperator", "blocks inside activation checkpointing"),
    ("torch._ops", "OpOverload", "what an operator writes to"),
    ("torch._guards", "tracing", "verifying apart from Dynamo's state"),
    ("torch.utils._python_dispatch", "TorchDispatchMode", "verifying in float64"),
    ("torch.utils._python_dispatch", "_disable_current_modes", "verifying apart from Dynamo's state"),
    ("torch.utils._pytree", "tree_leaves", "the arguments of a node"),
    ("torch._C", "DisableTorchFunction", "verifying apart from Dynamo's state"),
    ("torch._C", "_DisableAutocast", "ops that autocast does not touch"),
    ("torch._C", "_AutoDispatchBelowAutograd", "ops that save what their backward reads"),
    ("torch.autograd.forward_ad", "_current_level", "refusing forward-mode derivatives"),
    ("torch.autograd.forward_ad", "_set_fwd_grad_enabled", "refusing forward-mode derivatives"),
    ("torch._dynamo", "lookup_backend", "inner backends by name"),
    ("torch._inductor", "list_mode_options", "inner_backend inductor"),
    ("torch._inductor.compile_fx", "compile_fx", "inner_backend inductor"),
    ("torch._inductor.runtime.cache_dir_utils", "cache_dir", "measured plans on disk"),
    ("torch._inductor.decomposition", "decompositions", "kernels inside Inductor's graph"),
    ("torch._inductor.decomposition", "fast_random_decomps", "kernels inside Inductor's graph"),
)


TUNED_AT = (8, 32, 128, 512, 2048, 8192, 32768, 131072)


class UsageError(MoEFxError, ValueError):
    """The command line names something that does not exist or cannot be built here."""


def main(argv: list[str] | None = None) -> int:
    """Parses ``argv`` (sys.argv by default) and runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="moe_fx", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", help="a transformers model type, a config (folder or .json), or module:callable")
    model.add_argument("--implementation", help="experts implementation of transformers: eager, batched_mm, …")
    model.add_argument("--dtype", default="bfloat16", help="dtype of the weights (bfloat16)")
    model.add_argument("--layers", type=int, help="number of layers, to shrink a model")
    model.add_argument("--tokens", type=int, default=8, help="length of the sampled input (8)")
    model.add_argument("--options", type=json.loads, default={}, help="options of moe_fx as JSON")

    explain = commands.add_parser(
        "explain", parents=[model], help="what would be fused in a model, and why not the rest"
    )
    explain.add_argument("--json", action="store_true", help="print the report as JSON")
    explain.set_defaults(run=_explain)

    tune = commands.add_parser("tune", parents=[model], help="measure tile sizes of a model's layers on this GPU")
    tune.add_argument("--rows", type=int, nargs="+", default=TUNED_AT, help="routed rows: tokens times top-k")
    tune.set_defaults(run=_tune)

    zoo = commands.add_parser("zoo", add_help=False, help="families × implementations; arguments of tests.zoo.run")
    zoo.set_defaults(run=_zoo)

    commands.add_parser("doctor", help="versions, device, kernels, private hooks").set_defaults(run=_doctor)

    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "zoo":
        parser.parse_args(argv)  # says what it does not know, and exits
    args.rest = rest
    try:
        return int(args.run(args))
    except MoEFxError as error:
        print(f"moe_fx: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _explain(args: argparse.Namespace) -> int:
    import torch
    from rich import print as rich_print

    import moe_fx

    model, inputs, keywords = _model(args)
    with torch.no_grad():
        report = moe_fx.explain(model, *inputs, options=args.options, **keywords)
    print(json.dumps(report.to_json(), indent=1)) if args.json else rich_print(report)
    return 0


def _tune(args: argparse.Namespace) -> int:
    """Measures on the GPU and writes a file that every later process of this machine reads."""
    import torch

    import moe_fx
    from moe_fx.hardware import detect

    if not torch.cuda.is_available():
        raise UsageError("tile sizes are those of device code, and this machine has no GPU: nothing to measure")
    if "moe_fx.triton" not in detect(torch.device("cuda")).installed:
        raise UsageError("device code needs triton 3.3 or later: pip install triton")
    from moe_fx.kernels.triton import stopwatch, tiles

    model, inputs, keywords = _model(args)
    with torch.no_grad():
        sites = moe_fx.explain(model, *inputs, options=args.options, **keywords).sites
    name = torch.cuda.get_device_name()
    source = f"moe_fx tune {args.model}, torch {torch.__version__}, triton {_version('triton')}"
    specs = [site.spec for site in sites if site.spec is not None]
    if not specs:
        raise UsageError(f"no mixture-of-experts block was recognised in {args.model}: see moe_fx explain")
    layers = dict.fromkeys(tiles.Layer.of(spec, getattr(torch, args.dtype)) for spec in specs if not spec.quant)
    if not layers:
        raise UsageError(f"the blocks of {args.model} multiply codes, whose tiles are not measured: nothing to do")
    for layer in layers:
        found = list(tiles.search(args.rows, layer, stopwatch.of_layer(layer, torch.device("cuda"))))
        print(f"{layer}: {len(found)} numbers of rows → {tiles.write(name, source, layer, found)}")
    return 0


def _model(args: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(model, args, kwargs) of one forward, by the user's callable or from a transformers configuration."""
    module, colon, name = args.model.partition(":")
    if colon:
        sys.path.insert(0, "")  # the user's module may lie in the working directory
        try:
            build = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"{args.model!r} cannot be imported: {error}") from error
        model, inputs, keywords = build()
        return model, tuple(inputs), dict(keywords)

    import torch

    from moe_fx.hardware import detect

    try:
        import transformers
    except ImportError as error:
        raise UsageError("explaining a model type needs transformers: pip install 'transformers>=5.17'") from error
    config = _config(args.model, transformers)
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"--dtype {args.dtype!r} is not a torch dtype; try bfloat16 or float32")
    text = config.get_text_config()
    if args.layers is not None:
        _shrink(text, args.layers)
    if args.implementation is not None:
        config._experts_implementation = args.implementation
    with torch.device("meta"):
        model = _instantiate(transformers, config, dtype).eval()
    size, room = sum(p.numel() for p in model.parameters()) * dtype.itemsize, detect(torch.device("cpu")).memory_bytes
    torch.manual_seed(0)
    ids = torch.randint(0, text.vocab_size, (1, args.tokens))
    if size > room / 2:
        need, have = f"{size / 2**30:.0f} GiB", f"{room / 2**30:.0f} GiB"
        print(f"{args.model} takes {need} of {have}: explained without values, on the meta device", file=sys.stderr)
        ids = ids.to("meta")
    else:
        model = _instantiate(transformers, config, dtype).eval()
    return model, (), {"input_ids": ids, "use_cache": False}


def _config(name: str, transformers: Any) -> Any:
    """The configuration of a model type, a config.json, or a folder that holds one."""
    if Path(name).exists():
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    try:
        return transformers.AutoConfig.for_model(name)
    except ValueError as error:
        advice = "use a model_type of transformers, a path, or module:callable"
        raise UsageError(f"{name!r} is no known model type and no path; {advice}") from error


def _shrink(config: Any, layers: int) -> None:
    """Keeps ``layers`` layers, in every field that lists one entry a layer too."""
    before = config.num_hidden_layers
    for field, value in config.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == before:
            setattr(config, field, type(value)(value[:layers]))
    config.num_hidden_layers = layers


def _instantiate(transformers: Any, config: Any, dtype: Any) -> Any:
    try:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        advice = "write a callable that returns (model, args, kwargs) and pass module:callable"
        raise UsageError(f"{config.model_type} is no causal language model; {advice}") from error


def _zoo(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parent.parent
    if not (root / "tests" / "zoo" / "run.py").exists():
        raise UsageError("the zoo is part of the source checkout, not of the installed package: run it from a checkout")
    sys.path.insert(0, str(root))
    run = importlib.import_module("tests.zoo.run")
    return int(run.main(args.rest) or 0)


def _doctor(args: argparse.Namespace) -> int:
    import torch
    from rich import print as rich_print
    from rich.table import Table
    from rich.text import Text

    from moe_fx.hardware import detect
    from moe_fx.oracle.priority import survey

    print(f"python {sys.version.split()[0]}, moe_fx {_version('moe_fx')}")
    for package in PACKAGES:
        print(f"  {package:15} {_version(package)}")
    device = detect(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"device: {device.name} ({device.kind}, {device.arch}, {device.units} units)")
    peaks = ", ".join(f"{dtype} {peak / 1e12:.3g} TFLOP/s" for dtype, peak in device.peaks)
    print(f"  {device.memory_bytes / 2**30:.0f} GiB at {device.bandwidth / 1e9:.0f} GB/s; {peaks}")
    table = Table("layers", "backend", "kernel", "for bfloat16 layers, or quantised as it has them", title="kernels")
    for entry in survey(device):
        said = "\n".join(f"{reason.code}: {reason.text}" for reason in entry.reasons)
        shown = Text(f"vetoed: {said}" if said else "available")  # a reason may hold [brackets]
        table.add_row(entry.scheme, entry.backend, entry.kernel, shown)
    rich_print(table)
    print("private hooks:")
    for module, path, purpose in HOOKS:
        print(f"  {'found  ' if _found(module, path) else 'MISSING'} {module}.{path}: {purpose}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _found(module: str, path: str) -> bool:
    """Whether ``module`` can be imported and holds the attribute path."""
    try:
        value: Any = importlib.import_module(module)
        for name in path.split("."):
            value = getattr(value, name)
    except (ImportError, AttributeError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
