"""Operators that the exporter or a runtime gets wrong, held to PyTorch in ONNX Runtime and OpenVINO."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.settle import settle
from tersenet.deploy.checked import checked
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.reference import Reference
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

X = torch.randn(12, 4, 11, 9, generator=torch.Generator().manual_seed(0))
RUNTIMES = ("onnxruntime", "openvino")


class Every(nn.Module):
    """Operators side by side, so that one export serves for all."""

    def __init__(self, *parts) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts)


def test_pools_resizes_and_pads_are_right_in_float(tmp_path):
    for runtime in RUNTIMES:
        pytest.importorskip(runtime)
    model = Every(
        nn.AvgPool2d(2, divisor_override=3),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False, divisor_override=5),
        nn.AvgPool2d(2, 2, 1, ceil_mode=True),  # its last window would begin in the padding
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(2, 2, 1, ceil_mode=True),
        nn.LPPool2d(2, 2, ceil_mode=True),
        nn.AdaptiveMaxPool2d((4, 3)),
        lambda x: F.adaptive_avg_pool3d(x[:, :, None].expand(-1, -1, 5, -1, -1), (2, 3, 4)),
        lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear", antialias=True),
        lambda x: F.interpolate(x, size=(5, 20), mode="bicubic", antialias=True),
        lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"),
    )
    path = export_onnx(model, X[:2], tmp_path / "model.onnx")
    agreements = checked(path, RUNTIMES, Reference(model, X[:2], [X]))
    assert all(each.max_abs_error < 1e-4 for each in agreements.values())


def test_attention_of_other_than_four_dimensions_is_right(tmp_path):
    def attention(x: Tensor, **more) -> Tensor:
        return F.scaled_dot_product_attention(x, x.flip(-2), 2 * x, **more)

    allowed = torch.ones(11, 11, dtype=torch.bool).triu(-3)
    model = Every(
        lambda x: attention(x[:, 0]),  # one head
        lambda x: attention(x[:, 0], is_causal=True, scale=0.7),
        lambda x: attention(x[:, 0], attn_mask=allowed),
        lambda x: attention(x[:, 0], attn_mask=torch.linspace(-1, 1, 121).view(11, 11)),
        lambda x: attention(x.unflatten(1, (2, 2))),  # windows
        attention,
    )
    path = export_onnx(model, X[:2], tmp_path / "model.onnx")
    agreements = checked(path, RUNTIMES, Reference(model, X[:2], [X]))
    assert all(each.max_abs_error < 1e-4 for each in agreements.values())


def test_heads_are_put_together_behind_an_attention_with_a_mask(tmp_path):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.bias, self.out = nn.Linear(8, 24), nn.Parameter(torch.randn(2, 11, 11)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x).reshape(len(x), 11, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            x = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias[None])
            return self.out(x.transpose(1, 2).reshape(len(query), 11, 8))

    x = torch.randn(12, 11, 8, generator=torch.Generator().manual_seed(0))
    model = Attention().eval()
    path = export_onnx(model, x[:2], tmp_path / "model.onnx")
    agreements = checked(path, RUNTIMES, Reference(model, x[:2], [x]))
    assert all(each.max_abs_error < 1e-5 for each in agreements.values())
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "Identity" not in kinds


class Pooled(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.conv, self.pool, self.last = nn.Conv2d(4, 8, 3, padding=1), pool, nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(F.relu(self.conv(x))))


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2, 1, divisor_override=2)], ids=str)
def test_average_pools_are_right_in_int8(pool, tmp_path):
    torch.manual_seed(0)
    model, _ = Quantize().run(Pooled(pool).eval(), Task(example=X[:2], calibrate=[X], quiet=True))
    model = settle(model)
    path = export_onnx(model, X[:2], tmp_path / "model.onnx")
    for runtime, agreement in checked(path, RUNTIMES, Reference(model, X[:2], [X])).items():
        assert agreement.steps is not None, runtime
        assert agreement.steps.beyond < 1e-3
