"""An ONNX file's own rows: the counts of the model that it came from, and integers where it has integers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.deploy.causes import explained
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.profile import profile_file, profile_model
from tersenet.deploy.profile_file import works_of_file
from tersenet.deploy.profile_table import ProfilesTable, ProfileTable
from tersenet.deploy.roofline import Roofline
from tersenet.deploy.work import Work, works_of
from tersenet.errors import FileError, SettingsError
from tersenet.graph.costs import costs
from tersenet.graph.trace import trace
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
ROOF = Roofline(1, {"float32": {"a": 1e11}, "int8": {"a": 4e11}}, 1e10, 1e11, 2**25, 16)


class Mixed(nn.Module):
    """Dense, depthwise, strided and linear; a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depth = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.down, self.head = nn.Conv2d(16, 24, 3, stride=2, bias=False), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.down(F.relu(x + self.depth(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def quantized(mixed: nn.Module) -> nn.Module:
    model, _ = Quantize().run(mixed, Task(example=X, calibrate=[(X, torch.zeros(2))], quiet=True))
    return model


@pytest.fixture(scope="module")
def float_file(mixed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(mixed, X, tmp_path_factory.mktemp("float") / "model.onnx")


@pytest.fixture(scope="module")
def int8_file(quantized: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(quantized, X, tmp_path_factory.mktemp("int8") / "model.onnx")


def by_path(works: list[Work]) -> dict[str, Work]:
    return {work.path: work for work in works}


def of_model(model: nn.Module, integers: bool) -> list[Work]:
    graph = trace(model, X)
    keys = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            name = type(graph.get_submodule(str(node.target))).__name__.removeprefix("Parametrized")
            keys[node] = (str(node.target), name)
        elif node.op == "call_function":
            keys[node] = (node.meta.get("path", ""), node.target._opname.rstrip("_"))
    return works_of(graph, costs(model, X), keys, integers)


LAYERS = {  # (inputs, outputs, groups, positions), multiply-adds
    "first": ((8, 16, 1, 64), 16 * 64 * 8 * 9),
    "depth": ((1, 1, 16, 64), 16 * 64 * 9),
    "down": ((16, 24, 1, 9), 24 * 9 * 16 * 9),
    "head": ((24, 5, 1, 1), 24 * 5),
}


def check_layers(works: list[Work]) -> None:
    found = by_path(works)
    for path, (shape, macs) in LAYERS.items():
        work = found[path]
        assert (work.inputs, work.outputs, work.groups, work.positions) == shape, path
        assert work.macs == macs, path


@pytest.mark.parametrize("which", ["float", "int8"])
def test_the_file_has_the_counts_of_the_model(which: str, float_file: Path, int8_file: Path) -> None:
    works, rows = works_of_file(proto := onnx.load(float_file if which == "float" else int8_file))
    check_layers(works)
    assert len(rows) == len(proto.graph.node)
    assert {row for row in rows if row is not None} == {work.key for work in works}
    assert len(works) == len({work.key for work in works})
    precision = "float32" if which == "float" else "int8"
    assert {by_path(works)[path].precision for path in LAYERS} == {precision}


def test_the_model_has_the_same(mixed: nn.Module, quantized: nn.Module) -> None:
    check_layers(of_model(mixed, integers=True))
    check_layers(of_model(quantized, integers=True))


def test_bytes_of_floats_are_those_of_the_costs(mixed: nn.Module, float_file: Path) -> None:
    works = of_model(mixed, integers=True)
    assert [work.weight_bytes + work.activation_bytes for work in works] == [
        layer.bytes_moved for layer in costs(mixed, X)
    ]
    found, expected = by_path(works_of_file(onnx.load(float_file))[0]), by_path(works)
    for path in LAYERS:
        assert found[path].weight_bytes == expected[path].weight_bytes, path
        assert found[path].activation_bytes == expected[path].activation_bytes, path


def test_bytes_of_integers(quantized: nn.Module, int8_file: Path) -> None:
    """One byte for each input, weight and output of a quantized layer whose output goes into a quantizer."""
    expected = by_path(of_model(quantized, integers=True))
    found = by_path(works_of_file(onnx.load(int8_file))[0])
    for path, moved in {"first": (8 + 16) * 64, "depth": (16 + 16) * 64, "down": 16 * 64 + 24 * 9}.items():
        assert found[path].activation_bytes == moved, path
        assert expected[path].activation_bytes == moved, path
    assert 8 * 16 * 9 <= expected["first"].weight_bytes < 2 * 8 * 16 * 9
    assert 8 * 16 * 9 <= found["first"].weight_bytes < 2 * 8 * 16 * 9
    simulated = by_path(of_model(quantized, integers=False))
    assert simulated["first"].precision == "float32"
    assert simulated["first"].activation_bytes == 4 * expected["first"].activation_bytes


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_int8_file_is_profiled(runtime: str, int8_file: Path) -> None:
    pytest.importorskip(runtime)
    found = explained(profile_file(int8_file, runtime=runtime, batch=2), ROOF)
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert found["totals"]["macs"] == sum(macs for _, macs in LAYERS.values())
    assert found["batch"] == 2
    timed = {row["path"] for row in found["rows"] if row["calls"]}
    assert {"first", "down", "head"} <= timed
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit(width: int, mixed: nn.Module, float_file: Path) -> None:
    one, other = profile_model(mixed, X, runtime="pytorch"), profile_file(float_file)
    for table in (
        ProfileTable(explained(one, ROOF)),
        ProfilesTable([explained(each, ROOF) for each in (one, other)]),
    ):
        console = Console(width=width, record=True, force_terminal=False, file=io.StringIO())
        console.print(table)
        text = console.export_text()
        assert all(len(line) <= width for line in text.splitlines())
        for path in LAYERS:
            rows = [line for line in text.splitlines() if line.startswith(f"{path} ")]
            assert rows
            assert not any("…" in line for line in rows)
        assert "Measured roof with 1 thread: 100 in float32 and 400 in int8" in text


@pytest.mark.parametrize("width", [80, 100])
def test_the_widest_figures_fit(width: int, float_file: Path) -> None:
    found = profile_file(float_file)
    wide = {"path": "a.very.long.path.of.blocks.17.conv.0.0", "kind": "ParametrizedConvTranspose2d", "ms": 12345.678}
    wide |= {"macs": 999_900_000, "weight_bytes": 500 * 2**20, "bytes_moved": 999 * 2**20, "intensity": 99999.0}
    found["rows"] = [{**row, **wide} for row in found["rows"] if row["channels"]]
    found["rows"][0]["channels"] = {"inputs": 1, "outputs": 1, "groups": 16, "positions": 64}
    console = Console(width=width, record=True, force_terminal=False, file=io.StringIO())
    console.print(ProfileTable(explained(found, ROOF)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if line.startswith("…")]
    assert len(rows) == len(found["rows"])
    for line in rows:
        assert all(cell in line for cell in ("conv.0.0", "999.9 M", "999.00 MiB", "12345.678"))
        assert line.rstrip().endswith(("parallelism", "platform", "memory", "macs"))


def test_what_cannot_be_profiled(tmp_path: Path, fixed_onnx: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"no model" * 10)
    with pytest.raises(FileError, match=r"junk\.onnx"):
        profile_file(tmp_path / "junk.onnx")
    with pytest.raises(SettingsError, match="fixed batch of 2, so it cannot be profiled with 1"):
        profile_file(fixed_onnx)
    with pytest.raises(SettingsError, match="'pytorch'; allowed: onnxruntime, openvino"):
        profile_file(fixed_onnx, runtime="pytorch", batch=2)
