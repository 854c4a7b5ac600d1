"""Which operators are left in float where it is not known what a runtime computes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.bricks.quantized import Int8Conv2d
from tersenet.deploy import checked
from tersenet.deploy.checked import _narrowed
from tersenet.errors import ExportError, FileError
from tersenet.graph.trace import trace


@pytest.mark.parametrize("guilty", "abcdefgh")
def test_the_one_that_suffices_is_found_in_three_files(guilty: str) -> None:
    asked: list[list[str]] = []

    def is_right(some: list[str]) -> bool:
        asked.append(some)
        return guilty in some

    assert _narrowed(list("abcdefgh"), is_right) == [guilty]
    assert len(asked) == 3


def test_a_workaround_that_does_not_open_hides_no_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sentence is about what is wrong with the file, and not about what was tried against it."""
    findings: Any = {"openvino": "far off"}

    def refuses(*_: Any) -> Any:
        raise FileError("openvino cannot open it")

    def says(finding: Any, what: str) -> None:
        raise ExportError(f"{what} is {finding}")

    monkeypatch.setattr(checked, "_compared", lambda *_: (findings, "openvino"))
    monkeypatch.setattr(checked, "_worked_around", refuses)
    monkeypatch.setattr(checked, "check", says)
    monkeypatch.setattr(checked, "_where", lambda *_: "")
    with pytest.raises(ExportError, match="in openvino is far off"):
        checked.held(tmp_path / "model.onnx", ["openvino"], None, rewrite=lambda _: None)  # type: ignore[arg-type]


def test_layers_of_the_shapes_that_were_wrong_twice_are_left_in_float_together() -> None:
    """One after another there would be as many files as there are blocks."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (Int8Conv2d(4, 4, 3, padding=1, groups=2) for _ in range(3))
            self.other, self.wide = Int8Conv2d(4, 4, 1), Int8Conv2d(4, 4, 3, padding=1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.other(self.c(self.b(self.a(x)))).repeat(1, 1, 2, 2))

    graph = trace(Net().eval(), torch.randn(2, 4, 8, 8))
    assert checked._alike(graph, ["a"], []) == ["a"]
    assert checked._alike(graph, ["other"], ["a"]) == ["other"]
    assert checked._alike(graph, ["b"], ["a"]) == ["b", "c"], "and not the one of larger images"
