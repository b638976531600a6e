"""The reference as a kernel: always legal, never fast.  What every other kernel is compared with."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from moe_fx.binding import Experts, Form
from moe_fx.kernels.capability import NO_ALL2ALL, PLAIN, Capability, Open, RowSchemes
from moe_fx.kernels.config.parallel import ALL2ALL_BACKENDS, BATCHED
from moe_fx.kernels.experts.torch_experts import Scratch, TorchExperts
from moe_fx.kernels.registry import Cost, experts_kernel
from moe_fx.reference import ACTIVATIONS, experts_forward
from moe_fx.spec import DTypeName, MoESpec, Norm

DTYPES = frozenset(get_args(DTypeName)) - {""}
DEVICES = frozenset({"cpu", "cuda", "rocm", "xpu"})
ALL = Capability(
    devices=DEVICES,
    dtypes=DTYPES,
    activations=frozenset(name for name, _ in ACTIVATIONS),
    forms=frozenset(get_args(Form)),
    biases=True,
    norms=frozenset(get_args(Norm)),
    weight_on=frozenset({"output", "input"}),
    act_dtypes=DTYPES | {""},
    compute_dtypes=DTYPES | {""},
    accumulate=DTYPES | {""},
    out_dtypes=DTYPES | {""},
    backward="save",
    schemes=RowSchemes({PLAIN}),  # by the definition of each, one expert at a time
    all2all=frozenset({NO_ALL2ALL, *ALL2ALL_BACKENDS}) - BATCHED,
)
# One torch.mm per expert, share of peak by rows: bf16, Zen 5, two cores (docs: CPU.md); fp32 through MKL reaches half.
EFFICIENCY = ((1, 0.04), (2, 0.055), (8, 0.17), (32, 0.43), (128, 0.7), (512, 0.8))
# The same with cuBLAS, of the products alone: 535 of 989 TFLOP/s at 1024 rows of 6144 x 2048 on an H200, where a
# grouped product reaches 569 (pytorch issue 163425); other numbers of rows are guesses.
GPU_EFFICIENCY = ((1, 0.01), (16, 0.08), (128, 0.3), (512, 0.45), (2048, 0.58))
# What ops around separate products move on a device, in multiples of Cost's activations (4 H + 2 N + 2 I for a row):
# some 7 H + 1.5 N + 3.5 I, counted in ``torch_grouped``, to copy rows, activate, clear, weigh and add up.
PASSES = 1.5
# ``reference.dequantise`` is some ten ops in float32.  Measured on one core of a Zen 5 at 30 GB/s: 20 for int8, 70 to
# 190 for int4, 230 for e4m3, which torch casts one by one there.
DEQUANTISE = (100.0, 20)
ANYTHING = Capability(
    devices=Open(ALL.devices),
    dtypes=Open(ALL.dtypes),
    activations=Open(ALL.activations),
    forms=Open(ALL.forms),
    biases=True,
    norms=Open(ALL.norms),
    weight_on=Open(ALL.weight_on),
    act_dtypes=Open(ALL.act_dtypes),
    compute_dtypes=Open(ALL.compute_dtypes),
    accumulate=Open(ALL.accumulate),
    out_dtypes=Open(ALL.out_dtypes),
    backward="recompute",
    schemes=Open({PLAIN}),
    all2all=Open(ALL.all2all),
)


@experts_kernel(
    "reference",
    capability=ANYTHING,
    cost=Cost("active", lambda E, T, k: 16 * E, tuple((rows, 0.8 * share) for rows, share in EFFICIENCY), DEQUANTISE),
    rank=90,
)
class ReferenceExperts(TorchExperts):
    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        """See ``moe_fx.reference.experts_forward``."""
        return experts_forward(x, ids, weights, experts, spec)
