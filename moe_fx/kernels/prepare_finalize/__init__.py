"""Prepare/finalize for one rank: tokens stay where they are, as a list or as one batch an expert."""

from moe_fx.kernels.prepare_finalize.batched import BatchedPrepareAndFinalize
from moe_fx.kernels.prepare_finalize.no_ep import MonolithicPrepareAndFinalizeNoEP, PrepareAndFinalizeNoEP

__all__ = ["BatchedPrepareAndFinalize", "MonolithicPrepareAndFinalizeNoEP", "PrepareAndFinalizeNoEP"]
