"""The weight store: when a packed copy is stale, where it lives, when it dies."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from moe_fx.binding import Operand, WeightBinding, bind
from moe_fx.reasons import MoEFxOptionError, MoEFxRuntimeError
from moe_fx.weights import WeightStore

E, H, I = 3, 8, 4  # noqa: E741
LISTS = WeightBinding((Operand("w13", "list"), Operand("w2", "list"), Operand("w2_bias", "list")))
STACKED = WeightBinding((Operand("w13"), Operand("w2")))


class Experts(nn.Module):
    """A list of Linear, as Mixtral had it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(H, 2 * I, bias=False) for _ in range(E))
        self.down = nn.ModuleList(nn.Linear(I, H) for _ in range(E))

    def operands(self) -> list[Tensor]:
        return [*(m.weight for m in self.up), *(m.weight for m in self.down), *(m.bias for m in self.down)]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def is_fresh(store: WeightStore, model: Experts, layout: str) -> bool:
    packed, real = store.get(layout, LISTS, model.operands(), E), bind(LISTS, model.operands(), E)
    pairs = [(packed.up[0], real.up[0]), (packed.down, real.down), (packed.down_bias, real.down_bias)]
    return all(torch.equal(a[e], b[e]) for a, b in pairs for e in range(E))


def address(store: WeightStore, model: Experts, layout: str) -> int:
    up = store.get(layout, LISTS, model.operands(), E).up[0]
    assert isinstance(up, Tensor)
    return up.data_ptr()


def train(optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[Experts], None]:
    def step(model: Experts) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer(model.parameters()).step()

    return step


def in_place(model: Experts) -> None:
    model.up[1].weight.mul_(2)


def through_a_view(model: Experts) -> None:
    model.up[1].weight[0].zero_()


def through_detach(model: Experts) -> None:
    model.down[2].bias.detach().add_(1)


def load(model: Experts) -> None:
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


def load_assign(model: Experts) -> None:
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)


def set_data(model: Experts) -> None:
    model.up[0].weight.data = torch.randn(2 * I, H)


def new_parameter(model: Experts) -> None:
    model.down[0].weight = nn.Parameter(torch.randn(H, I))


def swap_experts(model: Experts) -> None:
    model.up[0].weight, model.up[1].weight = model.up[1].weight, model.up[0].weight


def double(model: Experts) -> None:
    model.double()


SEEN = [
    pytest.param(train(lambda p: torch.optim.SGD(p, lr=0.1, foreach=False)), id="sgd"),
    pytest.param(train(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)), id="foreach"),
    pytest.param(train(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)), id="fused"),
    *(in_place, through_a_view, through_detach, load, load_assign, set_data, new_parameter, swap_experts, double),
]


def data_mul(model: Experts) -> None:
    model.up[0].weight.data.mul_(2)


def numpy_write(model: Experts) -> None:
    model.up[0].weight.numpy()[0, 0] += 1


@pytest.mark.parametrize("layout", ["stacked", "transposed"])
@pytest.mark.parametrize("write", SEEN)
def test_write_is_seen(write: Callable[[Experts], None], layout: str) -> None:
    store, model = WeightStore(), Experts()
    assert is_fresh(store, model, layout)
    write(model)
    assert is_fresh(store, model, layout)


@pytest.mark.parametrize("layout", ["stacked", "transposed"])
@pytest.mark.parametrize("write", [data_mul, numpy_write])
def test_hidden_write_needs_invalidate(write: Callable[[Experts], None], layout: str) -> None:
    store, model = WeightStore(), Experts()
    before = address(store, model, layout)
    write(model)
    assert not is_fresh(store, model, layout), "seen after all: CAPTURE.md and the module's text can be relaxed"
    assert store.invalidate(Experts()) == 0, "another model's parameters"
    assert not is_fresh(store, model, layout)
    assert store.invalidate(model) == 1
    assert is_fresh(store, model, layout)
    write(model)
    assert store.invalidate() == 1
    assert is_fresh(store, model, layout)
    assert address(store, model, layout) == before


@pytest.mark.parametrize("layout", ["view", "stacked", "transposed"])
def test_view_of_hidden_write(layout: str) -> None:
    """What is read in place is never stale: all of "view", and stacked weights in "stacked"."""
    store, w13, w2 = WeightStore(), torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    before = store.get(layout, STACKED, [w13, w2], E)
    w13.data.mul_(2)
    w13.numpy()[0] = 1
    assert torch.equal(before.up[0], w13) == (layout != "transposed")
    assert store.bytes() == (0 if layout != "transposed" else (w13.numel() + w2.numel()) * 4)


@pytest.mark.parametrize("write", [in_place, load, SEEN[1].values[0], SEEN[2].values[0]])
def test_refresh_keeps_the_address(write: Callable[[Experts], None]) -> None:
    store, model = WeightStore(), Experts()
    before = address(store, model, "stacked")
    write(model)
    assert address(store, model, "stacked") == before
    assert is_fresh(store, model, "stacked")


def test_no_write_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    store, model = WeightStore(), Experts()
    before = address(store, model, "stacked")

    def fail(*_: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr("moe_fx.weights._pack", fail)
    assert address(store, model, "stacked") == before


def test_copies_are_shared_by_storage_not_by_object() -> None:
    """An op receives detached aliases of the parameters."""
    store, model = WeightStore(), Experts()
    before = address(store, model, "stacked")
    aliases = [p.detach() for p in model.operands()]
    assert store.get("stacked", LISTS, aliases, E).up[0].data_ptr() == before
    del aliases
    gc.collect()
    assert store.bytes() > 0, "the aliases' death is not the model's"


def test_freed_with_the_model() -> None:
    store, model = WeightStore(), Experts()
    experts = store.get("stacked", LISTS, model.operands(), E)
    packed = weakref.ref(experts.up[0])
    del experts
    store.get("transposed", LISTS, model.operands(), E)
    assert store.bytes() == 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    gc.collect()
    assert store.bytes() == 0
    assert packed() is None


def test_copy_does_not_keep_the_model_alive() -> None:
    store, model = WeightStore(), Experts()
    store.get("stacked", LISTS, model.operands(), E)
    weight = weakref.ref(model.up[0].weight)
    del model
    gc.collect()
    assert weight() is None


def test_an_address_that_is_used_again_finds_nothing() -> None:
    store = WeightStore()
    for value in range(20):
        operands = [torch.full(s, float(value)) for s in ((E, 2 * I, H), (E, H, I))]
        experts = store.get("transposed", STACKED, operands, E)
        assert float(experts.up[0][0][0, 0]) == value
        del operands
    del experts
    assert store.bytes() == 0


def test_clear() -> None:
    store, model = WeightStore(), Experts()
    store.get("stacked", LISTS, model.operands(), E)
    store.clear()
    assert store.bytes() == 0
    assert is_fresh(store, model, "stacked")


def test_grad_mode() -> None:
    store, model = WeightStore(), Experts()
    with torch.enable_grad():
        with pytest.raises(MoEFxRuntimeError, match="require grad"):
            store.get("stacked", LISTS, model.operands(), E)
        assert store.bytes() == 0
        store.get("view", LISTS, model.operands(), E)
        model.requires_grad_(False)
        assert is_fresh(store, model, "stacked")
        model.requires_grad_(True)
        with pytest.raises(MoEFxRuntimeError, match="require grad"):
            store.get("stacked", LISTS, model.operands(), E)


def test_inference_mode() -> None:
    """A copy made inside inference mode is refreshed outside; inference tensors themselves have no version."""
    store, model = WeightStore(), Experts()
    with torch.inference_mode():
        assert is_fresh(store, model, "stacked")
    in_place(model)
    assert is_fresh(store, model, "stacked")
    with torch.inference_mode():
        built = Experts()
        with pytest.raises(MoEFxRuntimeError, match="inference_mode"):
            store.get("stacked", LISTS, built.operands(), E)


def test_bad_requests() -> None:
    model = Experts()
    with pytest.raises(MoEFxOptionError, match="known: view"):
        WeightStore().get("no_such", LISTS, model.operands(), E)
    with pytest.raises(ValueError, match="operands"):
        WeightStore().get("stacked", LISTS, model.operands()[:-1], E)


def test_optimizer_hook_only_while_a_copy_exists() -> None:
    hooks = _global_optimizer_post_hooks
    before = len(hooks)
    store, model, other = WeightStore(), Experts(), Experts()
    store.get("view", LISTS, model.operands(), E)
    store.get("stacked", STACKED, [torch.zeros(E, 2 * I, H), torch.zeros(E, H, I)], E)
    assert len(hooks) == before
    store.get("stacked", LISTS, model.operands(), E)
    store.get("stacked", LISTS, other.operands(), E)
    assert len(hooks) == before + 1
    del model
    gc.collect()
    assert len(hooks) == before + 1
    del other
    gc.collect()
    assert len(hooks) == before


def test_a_copied_model_has_its_own_copy() -> None:
    store, model = WeightStore(), Experts()
    assert is_fresh(store, model, "stacked")
    twin = copy.deepcopy(model)
    in_place(twin)
    assert is_fresh(store, twin, "stacked")
    assert is_fresh(store, model, "stacked")
    assert address(store, twin, "stacked") != address(store, model, "stacked")


def test_threads() -> None:
    """Many threads ask while one writes between barriers: never a torn or stale copy, one address."""
    store, model, threads = WeightStore(), Experts(), 4
    gate, errors, seen = threading.Barrier(threads, timeout=30), [], set()

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    if index == 0:
                        in_place(model)
                    gate.wait()
                    seen.add(address(store, model, "stacked"))
                    assert is_fresh(store, model, "stacked")
                    gate.wait()
        except BaseException as error:  # reported by the main thread
            errors.append(error)
            gate.abort()
            raise

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert len(seen) == 1
