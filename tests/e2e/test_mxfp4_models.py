"""gpt-oss checkpoints as they are stored: pairs of e2m1 and exponents, made matrices by transformers' own function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations import mxfp4

import moe_fx
from moe_fx.passes.capture.quantised_libraries import FORMS

from .helpers import watched

E, H, I, K = 6, 128, 64, 2  # noqa: E741


class GptOss(nn.Module):
    """Router and experts of gpt-oss over the tensors of its checkpoints; all experts on all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        for name, rows, cols in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
            blocks = torch.randint(0, 256, (E, rows, cols // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(119, 124, (E, rows, cols // 32), generator=generator, dtype=torch.uint8)
            bias = torch.randn(E, rows, generator=generator).to(torch.bfloat16)
            for part, value in (("blocks", blocks), ("scales", scales), ("bias", bias)):
                self.register_parameter(f"{name}_{part}", nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        logits = self.router(x.to(torch.bfloat16))
        values, ids = logits.topk(K, -1)
        scores = torch.zeros_like(logits).scatter_(1, ids, values.softmax(-1)).to(dtype)
        up = mxfp4.convert_moe_packed_tensors(self.gate_up_proj_blocks, self.gate_up_proj_scales, dtype=dtype)
        down = mxfp4.convert_moe_packed_tensors(self.down_proj_blocks, self.down_proj_scales, dtype=dtype)
        rows = torch.bmm(x.repeat(E, 1).view(E, -1, H), up) + self.gate_up_proj_bias[:, None].to(dtype)
        gate, linear = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
        hidden = (linear + 1) * (gate * torch.sigmoid(gate * 1.702))
        out = torch.bmm(hidden, down) + self.down_proj_bias[:, None].to(dtype)
        return (out.view(E, -1, H) * scores.t().view(E, -1, 1)).sum(0)


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    moe_fx.reset()
    return torch.compile(model.eval(), backend="moe_fx", options={"inner_backend": "eager"} | options)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_runs_on_codes(inner: str) -> None:
    model = GptOss()
    run = compiled(model, inner_backend=inner)
    with torch.no_grad():
        for tokens in (9, 1, 20):
            x = torch.randn(tokens, H, dtype=torch.bfloat16)
            exact = model(x.double(), torch.float64)
            own, usual = ((y.double() - exact).norm() / exact.norm() for y in (run(x), model(x)))
            assert own <= 2 * usual + 4 * torch.finfo(torch.bfloat16).eps, tokens
    site = moe_fx.last_report().sites[0]
    assert site.fused, site.rejects
    assert site.spec.quant.w13 == site.spec.quant.w2 == "float4_e2m1:1x32:float8_e8m0fnu"


def test_no_bank_is_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    with torch.no_grad():
        compiled(GptOss())(torch.randn(3, H, dtype=torch.bfloat16))
    assert seen.most == 2 * I * H  # one expert's up projection


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_form_is_the_library_s_function(dtype: torch.dtype) -> None:
    form = FORMS["transformers.integrations.mxfp4", "_convert_moe_packed_tensors"]
    model = GptOss()
    for name in ("gate_up_proj", "down_proj"):
        parts = getattr(model, f"{name}_blocks"), getattr(model, f"{name}_scales")
        assert torch.equal(form(*parts, dtype=dtype), mxfp4._convert_moe_packed_tensors(*parts, dtype=dtype))
