"""Tile sizes by rule: what a device can hold, and enough programs for it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
CPU = torch.device("cpu")
LAYERS = {"mixtral": (8, 2, 4096, 14336), "qwen3": (128, 8, 2048, 768), "granite": (32, 8, 1024, 512)}


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [1, 16, 256, 4096, 65536])
@pytest.mark.parametrize("name", LAYERS)
def test_fits_and_fills(name: str, tokens: int, itemsize: int, kib: int) -> None:
    from moe_fx.kernels.triton import configs

    experts, k, hidden, intermediate = LAYERS[name]
    rows = tokens * k
    with mock.patch.object(configs, "_shared", return_value=kib << 10):
        both = [configs.choose(rows, experts, CPU, itemsize, m, w) for m, w in ((2, intermediate), (1, hidden))]
    assert both[0].rows == both[1].rows  # one sort serves both
    for config, matrices, width in zip(both, (2, 1), (intermediate, hidden), strict=True):
        assert config.shared_bytes(itemsize, matrices) <= kib << 10
        assert config.stages >= 2
        assert min(config.rows, config.columns, config.inner) >= 16
        busy = min(experts, rows)
        programs = busy * -(-rows // busy // config.rows) * -(-width // config.columns)
        assert programs >= 2 * 132 or config.columns == 32
    if tokens == 65536 and itemsize == 2 and kib == 227:
        assert (both[0].rows, both[0].columns) == (128, 128)


def test_float32_is_rounded_only_where_torch_may() -> None:
    from moe_fx.kernels.triton.launch import precision

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        found = []
        for value in ("ieee", "tf32"):  # by the newer name: the older one then raises
            matmul.fp32_precision = value
            found.append((precision(torch.float32), precision(torch.bfloat16)))
        assert found == [("ieee", "ieee"), ("tf32", "ieee")]
    finally:
        matmul.fp32_precision = before
