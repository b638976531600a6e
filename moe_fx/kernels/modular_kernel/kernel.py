"""A prepare/finalize and an experts object, joined: what a layer calls.

    prepare(x, ids, weights) → experts, a chunk of tokens at a time → finalize(output)

Both members are modular or both monolithic, of one activation format.  No tokens: no chunk, and a result without rows.
Memory: the result is allocated; workspaces, and what experts allocate in their place (``temporary_shapes``), take at
most ``workspace_bytes``, which bounds the chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fx.binding import Matrices
from moe_fx.kernels.modular_kernel.experts import (
    FusedMoEExperts,
    FusedMoEExpertsModular,
    FusedMoEExpertsMonolithic,
    Up,
)
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata
from moe_fx.kernels.modular_kernel.prepare_finalize import (
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
    Prepared,
)
from moe_fx.kernels.modular_kernel.workspace import size_of, workspaces
from moe_fx.kernels.weight_and_reduce import TopKWeightAndReduceNoOP
from moe_fx.plan import WORKSPACE_BYTES
from moe_fx.reasons import MoEFxOptionError, MoEFxRuntimeError
from moe_fx.reference.experts import dtype_of

SharedExperts = Callable[[Tensor], Tensor]


class FusedMoEKernel:
    """prepare_finalize and experts: of one variant and one activation format.  shared_experts: x [T, H] → [T, H], run
    between dispatch and combine where prepare/finalize is asynchronous.  workspace_bytes: most that workspaces take.

    Raises MoEFxOptionError where the two do not fit together.
    """

    def __init__(
        self,
        prepare_finalize: FusedMoEPrepareAndFinalize,
        experts: FusedMoEExperts,
        shared_experts: SharedExperts | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
    ) -> None:
        self.prepare_finalize, self.experts, self.shared_experts = prepare_finalize, experts, shared_experts
        if prepare_finalize.activation_format != experts.activation_format():
            raise MoEFxOptionError(
                f"{type(prepare_finalize).__name__} hands over {prepare_finalize.activation_format.value} tokens, "
                f"{type(experts).__name__} takes {experts.activation_format().value} ones"
            )
        self.impl: FusedMoEKernelModularImpl | FusedMoEKernelMonolithicImpl
        if isinstance(prepare_finalize, FusedMoEPrepareAndFinalizeModular) and isinstance(
            experts, FusedMoEExpertsModular
        ):
            self.impl = FusedMoEKernelModularImpl(prepare_finalize, experts, shared_experts, workspace_bytes)
        elif isinstance(prepare_finalize, FusedMoEPrepareAndFinalizeMonolithic) and isinstance(
            experts, FusedMoEExpertsMonolithic
        ):
            if shared_experts is not None:
                raise MoEFxOptionError("a kernel that contains the router runs no shared experts: call them beside it")
            self.impl = FusedMoEKernelMonolithicImpl(prepare_finalize, experts)
        else:
            raise MoEFxOptionError(
                f"{type(prepare_finalize).__name__} and {type(experts).__name__} do not fit together: both have to be "
                "modular (ids and weights) or both monolithic (router logits)"
            )
        prepare_finalize.post_init_setup(experts)

    def apply(
        self,
        hidden_states: Tensor,
        w1: Up,
        w2: Matrices,
        topk_ids: Tensor,
        topk_weights: Tensor,
        activation: str,
        global_num_experts: int = -1,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [T, H], topk_ids and topk_weights [T, k] → [T, H]; with shared experts (their result, [T, H]).

        w1, w2: as the experts want them (canonical: [E, N, H] and [E, H, I]).  global_num_experts: -1 as many as here.
        expert_map: int32 [global_num_experts] → local expert or -1.  shared_experts_input: where it is not
        hidden_states.  Raises MoEFxRuntimeError on a monolithic kernel (``apply_monolithic``).
        """
        if not isinstance(self.impl, FusedMoEKernelModularImpl):
            raise MoEFxRuntimeError("this kernel contains the router: call apply_monolithic with router logits")
        return self.impl.apply(
            hidden_states,
            w1,
            w2,
            topk_ids,
            topk_weights,
            activation,
            global_num_experts,
            expert_map,
            apply_router_weight_on_input,
            shared_experts_input,
        )

    def apply_monolithic(
        self,
        hidden_states: Tensor,
        w1: Up,
        w2: Matrices,
        router_logits: Tensor,
        activation: str,
        global_num_experts: int = -1,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        num_expert_group: int | None = None,
        e_score_correction_bias: Tensor | None = None,
        routed_scaling_factor: float | None = None,
        topk_group: int | None = None,
    ) -> Tensor:
        """hidden_states [T, H], router_logits [T, E] → [T, H].  Raises MoEFxRuntimeError on a modular kernel."""
        if not isinstance(self.impl, FusedMoEKernelMonolithicImpl):
            raise MoEFxRuntimeError("this kernel starts from ids and weights: call apply")
        return self.impl.apply(
            hidden_states,
            w1,
            w2,
            router_logits,
            activation,
            global_num_experts,
            expert_map,
            apply_router_weight_on_input,
            num_expert_group,
            e_score_correction_bias,
            routed_scaling_factor,
            topk_group,
        )


class FusedMoEKernelModularImpl:
    """See FusedMoEKernel."""

    def __init__(
        self,
        prepare_finalize: FusedMoEPrepareAndFinalizeModular,
        experts: FusedMoEExpertsModular,
        shared_experts: SharedExperts | None,
        workspace_bytes: int,
    ) -> None:
        self.prepare_finalize, self.experts = prepare_finalize, experts
        self.shared_experts, self.workspace_bytes = shared_experts, workspace_bytes

    def apply(
        self,
        hidden_states: Tensor,
        w1: Up,
        w2: Matrices,
        topk_ids: Tensor,
        topk_weights: Tensor,
        activation: str,
        global_num_experts: int = -1,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        combine = self.experts.spec.combine
        output = hidden_states.new_empty(hidden_states.shape, dtype=dtype_of(combine.out_dtype, hidden_states.dtype))
        count = self.experts.spec.expert.experts if global_num_experts == -1 else global_num_experts
        a1q, scale, meta, ids, weights = self._prepare(
            hidden_states, topk_weights, topk_ids, count, expert_map, apply_router_weight_on_input
        )
        ids, weights = topk_ids if ids is None else ids, topk_weights if weights is None else weights
        # results of other ranks' tokens never lie where those of this rank's belong
        here = self.prepare_finalize.num_dispatchers() == 1
        reduced = here and isinstance(self.experts.finalize_weight_and_reduce_impl(), TopKWeightAndReduceNoOP)
        result = self._fused_experts(
            output if reduced and a1q.shape == output.shape else None,
            a1q,
            w1,
            w2,
            ids,
            weights,
            activation,
            count,
            expert_map,
            scale,
            meta,
            apply_router_weight_on_input,
        )
        shared_input = hidden_states if shared_experts_input is None else shared_experts_input
        shared = self._finalize(output, result, weights, ids, apply_router_weight_on_input, shared_input)
        return output if shared is None else (shared, output)

    def _allocate_buffers(
        self,
        M_full: int,
        M_chunk: int,
        sizes: tuple[int, int, int, int],
        global_num_experts: int,
        meta: ExpertTokensMetadata | None,
        activation: str,
        like: Tensor,
        with_output: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(workspace13, workspace2, room for the experts' output).  sizes: E, N, K, top-k."""
        E, N, K, topk = sizes
        asked = (N, K, topk, global_num_experts, E, meta, activation)
        first, second, _ = self.experts.workspace_shapes(M_chunk, *asked)
        _, _, out = self.experts.workspace_shapes(M_full, *asked)
        dtype = self.experts.workspace_dtype(like.dtype)
        shapes = [first, second, *([out] if with_output else [])]
        found = workspaces(shapes, dtype, like, self.workspace_bytes)
        return found[0], found[1], found[2] if with_output else None

    def _chunk_info(
        self,
        M: int,
        sizes: tuple[int, int, int, int],
        global_num_experts: int,
        meta: ExpertTokensMetadata | None,
        activation: str,
        dtype: torch.dtype,
    ) -> tuple[int, int]:
        """(number of chunks, tokens of one): as many tokens as ``workspace_bytes`` allow, at least one."""
        if M == 0:
            return 0, 0
        if not self.experts.supports_chunking():
            return 1, M
        E, N, K, topk = sizes
        asked = (N, K, topk, global_num_experts, E, meta, activation)
        kind = self.experts.workspace_dtype(dtype)

        def cost(tokens: int) -> int:
            shapes = self.experts.workspace_shapes(tokens, *asked)[:2]
            return size_of([*shapes, *self.experts.temporary_shapes(tokens, N, K, topk, activation)], kind)

        if cost(M) <= self.workspace_bytes:
            return 1, M
        low, high = 1, M  # cost(low) fits, or nothing does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= self.workspace_bytes else (low, middle)
        count = -(-M // low)
        return count, -(-M // count)

    def _prepare(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        global_num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Prepared:
        """What the experts get; both steps of an asynchronous prepare, one after the other."""
        asked = (
            hidden_states,
            topk_weights,
            topk_ids,
            global_num_experts,
            expert_map,
            apply_router_weight_on_input,
            self.experts.quant_config,
            self.experts.expects_unquantized_inputs,
        )
        if not self.prepare_finalize.supports_async():
            return self.prepare_finalize.prepare(*asked)
        return _received(self.prepare_finalize.prepare_async(*asked))

    def _fused_experts(
        self,
        output: Tensor | None,
        a1q: Tensor,
        w1: Up,
        w2: Matrices,
        topk_ids: Tensor,
        topk_weights: Tensor,
        activation: str,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> Tensor:
        """The experts' result: in ``output`` where it is given, else in a workspace."""
        E, M, N, K, topk = self.experts.moe_problem_size(a1q, w1, w2, topk_ids)
        sizes = (E, N, K, topk)
        chunks, size = self._chunk_info(M, sizes, global_num_experts, meta, activation, a1q.dtype)
        first, second, room = self._allocate_buffers(
            M, size, sizes, global_num_experts, meta, activation, a1q, output is None
        )
        result = room if output is None else output
        assert result is not None
        for chunk in range(chunks):
            part = slice(chunk * size, min((chunk + 1) * size, M))
            whole = chunks == 1
            self.experts.apply(
                output=result if whole else result[part],
                hidden_states=a1q if whole else a1q[part],
                w1=w1,
                w2=w2,
                topk_weights=topk_weights if whole else topk_weights[part],
                topk_ids=topk_ids if whole else topk_ids[part],
                activation=activation,
                global_num_experts=global_num_experts,
                expert_map=expert_map,
                a1q_scale=a1q_scale if whole else _rows(a1q_scale, part, M),
                a2_scale=self.experts.quant_config.a2_scale,
                workspace13=first,
                workspace2=second,
                expert_tokens_meta=meta,
                apply_router_weight_on_input=apply_router_weight_on_input,
            )
        return result

    def _finalize(
        self,
        output: Tensor,
        fused_out: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        shared_input: Tensor,
    ) -> Tensor | None:
        """Writes ``output``; returns what the shared experts give, None without them."""
        asked = (
            output,
            fused_out,
            topk_weights,
            topk_ids,
            apply_router_weight_on_input,
            self.experts.finalize_weight_and_reduce_impl(),
        )
        if not self.prepare_finalize.supports_async():
            self.prepare_finalize.finalize(*asked)
            return None if self.shared_experts is None else self.shared_experts(shared_input)
        started = self.prepare_finalize.finalize_async(*asked)
        shared = None if self.shared_experts is None else self.shared_experts(shared_input)  # while results travel
        _received(started)
        return shared


class FusedMoEKernelMonolithicImpl:
    """See FusedMoEKernel."""

    def __init__(
        self, prepare_finalize: FusedMoEPrepareAndFinalizeMonolithic, experts: FusedMoEExpertsMonolithic
    ) -> None:
        self.prepare_finalize, self.experts = prepare_finalize, experts

    def apply(
        self,
        hidden_states: Tensor,
        w1: Up,
        w2: Matrices,
        router_logits: Tensor,
        activation: str,
        global_num_experts: int = -1,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        num_expert_group: int | None = None,
        e_score_correction_bias: Tensor | None = None,
        routed_scaling_factor: float | None = None,
        topk_group: int | None = None,
    ) -> Tensor:
        a1q, scale, logits = self.prepare_finalize.prepare(
            hidden_states, router_logits, self.experts.quant_config, self.experts.expects_unquantized_inputs
        )
        count = self.experts.spec.expert.experts if global_num_experts == -1 else global_num_experts
        result = self.experts.apply(
            a1q,
            w1,
            w2,
            logits,
            activation,
            count,
            expert_map,
            scale,
            apply_router_weight_on_input,
            num_expert_group,
            e_score_correction_bias,
            routed_scaling_factor,
            topk_group,
        )
        return self.prepare_finalize.finalize(result)


def _received(started: object) -> object:
    """Runs the hook, if there is one, then the receiver."""
    hook, receiver = started if isinstance(started, tuple) else (None, started)
    if hook is not None:
        hook()
    return receiver()  # type: ignore[operator]


def _rows(scale: Tensor | None, part: slice, tokens: int) -> Tensor | None:
    """The scales of some tokens: a scale of all of them stays."""
    return scale[part] if scale is not None and scale.dim() and scale.shape[0] == tokens > 1 else scale
