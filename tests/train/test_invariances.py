"""A training that starts from a trained network does not mirror what means something else in a mirror."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tersenet.data import TensorBatches
from tersenet.findings import collecting
from tersenet.task import Preparation, Task
from tersenet.train import Train
from tersenet.train.batches import training_data

PREPARATION = Preparation((16, 16), (0.0,) * 3, (1.0,) * 3, ("left", "right"))


class Side(nn.Module):
    """Says on which side of the image it is brighter, looking at the columns from `margin` to 16 - `margin`."""

    def __init__(self, margin: int = 0) -> None:
        super().__init__()
        self.margin, self.scale = margin, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., self.margin : 16 - self.margin].mean((1, 2))
        left, right = x.chunk(2, dim=1)
        return torch.stack([left.mean(1), right.mean(1)], 1) * self.scale


class Anything(Side):
    """Tells bright images from dark ones, in a mirror and moved as well."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1) * self.scale


def images(kind: str, augment: str | None) -> TensorBatches:
    x, y = torch.zeros(300, 3, 16, 16, dtype=torch.uint8), torch.arange(300) % 2
    if kind == "sides":
        x[y == 0, :, :, :8] = 200
        x[y == 1, :, :, 8:] = 200
    elif kind == "edges":  # gone, or in the middle, when moved
        x[y == 0, :, :, 7] = 200
        x[y == 1, :, :, 8] = 200
    else:
        x[y == 1] = 255
    return TensorBatches(x, y, 64, PREPARATION, shuffle=True, augment=augment)


@pytest.mark.parametrize(
    ("kind", "model", "given", "kept"),
    [
        ("sides", Side(), "crop_flip", "crop"),
        ("edges", Side(), "crop_flip", None),
        ("edges", Side(), "crop", None),
        ("shades", Anything(), "crop_flip", "crop_flip"),
        ("sides", Side(), None, None),
    ],
)
def test_the_original_is_asked(kind: str, model: nn.Module, given: str | None, kept: str | None) -> None:
    data = images(kind, given)
    task = Task(example=torch.zeros(2, 3, 16, 16), train=data, original=model, preparation=PREPARATION, quiet=True)
    with collecting() as findings:
        assert training_data(Train(), task).augment == kept  # type: ignore[attr-defined]
    assert len(findings) == (given != kept)
    if given != kept:
        assert f"augmented by {kept or 'nothing'} in place of {given}: the original has 100.0 % right" in findings[0]
        assert training_data(Train(augment=given), task).augment == given  # type: ignore[attr-defined]


def test_an_original_that_knows_nothing_is_not_asked() -> None:
    data = images("shades", "crop_flip")
    task = Task(example=torch.zeros(2, 3, 16, 16), train=data, original=Side(), preparation=PREPARATION, quiet=True)
    assert training_data(Train(), task) is data
    assert training_data(Train(), Task(example=torch.zeros(2, 3, 16, 16), train=data)) is data
