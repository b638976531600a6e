"""How the experts of a layer are spread over ranks.

Tensor parallelism (TP) splits every expert, expert parallelism (EP) deals out whole experts, data parallelism (DP)
splits the tokens.  A MoE layer has no use for TP beside DP: the ranks of both form one group, which is all TP, or all
EP.  {size, rank} of each, for every rank of the layer::

    given            experts whole?   TP                  DP                  EP
    TP = 2, DP = 1   no               {2, 0} {2, 1}       {1, 0}              {1, 0}
    TP = 1, DP = 2   no               {2, 0} {2, 1}       {2, 0} {2, 1}       {1, 0}
    TP = 2, DP = 2   no               {4, 0} … {4, 3}     {2, 0|0|1|1}        {1, 0}
    TP = 2, DP = 1   yes              {1, 0}              {1, 0}              {2, 0} {2, 1}
    TP = 1, DP = 2   yes              {1, 0}              {2, 0} {2, 1}       {2, 0} {2, 1}
    TP = 2, DP = 2   yes              {1, 0}              {2, 0|0|1|1}        {4, 0} … {4, 3}
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_fx.reasons import MoEFxOptionError

DEFAULT_ALL2ALL = "allgather_reducescatter"
BATCHED = frozenset({"deepep_low_latency", "pplx", "nixl_ep"})  # hand tokens over as one batch an expert
ALL2ALL_BACKENDS = (
    DEFAULT_ALL2ALL,
    "naive",
    "torch_all2all",
    "deepep_high_throughput",
    "deepep_low_latency",
    "deepep_v2",
    "pplx",
    "nixl_ep",
    "mori",
    "flashinfer_nvlink_two_sided",
    "flashinfer_nvlink_one_sided",
)


@dataclass(frozen=True, slots=True)
class FusedMoEParallelConfig:
    """Sizes and ranks of the three kinds; use_ep: experts are dealt out whole.

    all2all_backend: what carries tokens to experts of other ranks.  Raises MoEFxOptionError for a rank outside its
    size, and for a backend that is not known.
    """

    tp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    tp_rank: int = 0
    dp_rank: int = 0
    ep_rank: int = 0
    use_ep: bool = False
    all2all_backend: str = DEFAULT_ALL2ALL

    def __post_init__(self) -> None:
        for kind in ("tp", "dp", "ep"):
            size, rank = getattr(self, f"{kind}_size"), getattr(self, f"{kind}_rank")
            if size < 1 or not 0 <= rank < size:
                raise MoEFxOptionError(f"{kind}_rank={rank} is not a rank of {kind}_size={size}")
        if self.all2all_backend not in ALL2ALL_BACKENDS:
            known = ", ".join(ALL2ALL_BACKENDS)
            raise MoEFxOptionError(f"all2all_backend={self.all2all_backend!r} is not known; known: {known}")

    @property
    def use_all2all_kernels(self) -> bool:
        """Tokens travel to the ranks of their experts and back."""
        return self.dp_size > 1 and self.use_ep

    @property
    def use_pplx_kernels(self) -> bool:
        return self._uses("pplx")

    @property
    def use_deepep_ht_kernels(self) -> bool:
        return self._uses("deepep_high_throughput")

    @property
    def use_deepep_ll_kernels(self) -> bool:
        return self._uses("deepep_low_latency")

    @property
    def use_batched_activation_format(self) -> bool:
        """Experts get one batch each, not one list of tokens."""
        return self.use_all2all_kernels and self.all2all_backend in BATCHED

    def _uses(self, backend: str) -> bool:
        return self.use_all2all_kernels and self.all2all_backend == backend

    @staticmethod
    def make(
        tp_size: int = 1,
        dp_size: int = 1,
        tp_rank: int = 0,
        dp_rank: int = 0,
        use_ep: bool = False,
        all2all_backend: str = DEFAULT_ALL2ALL,
    ) -> FusedMoEParallelConfig:
        """The layer's own sizes and ranks, from those of the model; see the table above."""
        group = FusedMoEParallelConfig(tp_size, dp_size, 1, tp_rank, dp_rank)  # checks the ranks
        size, rank = dp_size * tp_size, dp_rank * tp_size + tp_rank
        if use_ep and size > 1:
            return FusedMoEParallelConfig(1, dp_size, size, 0, group.dp_rank, rank, True, all2all_backend)
        return FusedMoEParallelConfig(size, dp_size, 1, rank, group.dp_rank, 0, False, all2all_backend)
