"""What files are measured, checked and profiled on follows what they say they take: ids, several inputs, any type."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersenet import files
from tersenet.deploy.apart import Entry, measure_apart
from tersenet.deploy.artifact import load_terse, save_terse, unpack
from tersenet.deploy.estimate import estimate_file
from tersenet.deploy.made_inputs import made_example, made_inputs
from tersenet.deploy.measure import Contender, measure, measure_files
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.profile import profile_file, profile_model
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.runner import Input
from tersenet.deploy.runtimes import open_file, open_module
from tersenet.deploy.verify import verify
from tersenet.errors import DataError, ModelError, SettingsError, TraceError
from tersenet.gate import gate
from tersenet.graph.costs import totals
from tersenet.graph.trace import trace
from tersenet.job import compress
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.search.bench import Bench
from tersenet.sources import example_for, open_model, open_task
from tersenet.task import Preparation, Task

FEW = {"calls": 5, "discard": 0}
WORDS, PLACES = 23, 7


class Tokens(nn.Module):
    """Ids of words, 0 for none, looked up in two tables of which the second is smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(WORDS, 8, padding_idx=0), nn.Embedding(PLACES, 8)
        self.conv, self.norm, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, t: Tensor) -> Tensor:
        x = (self.words(t) + nn.functional.embedding(t, self.kinds.weight)).transpose(1, 2)
        return self.head(torch.relu(self.norm(self.conv(x))).masked_fill((t == 0)[:, None], 0.0).mean(2))


class Two(nn.Module):
    """A picture and four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide, self.head = nn.Conv2d(3, 8, 3), nn.Linear(4, 64), nn.Linear(72, 3)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return self.head(torch.cat([torch.relu(self.conv(x)).mean((2, 3)), torch.relu(self.wide(v))], 1))


MACS_OF_TWO = 8 * 3 * 9 * 36 + 4 * 64 + 72 * 3


def ids(samples: int, seed: int) -> Tensor:
    return torch.randint(0, PLACES, (samples, 6), generator=torch.Generator().manual_seed(seed))


def pairs(samples: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(samples)
    return torch.randn(samples, 3, 8, 8, generator=made), torch.randn(samples, 4, generator=made)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokens and two, each as .terse, .onnx and .pt2."""
    pytest.importorskip("onnxruntime")
    found = tmp_path_factory.mktemp("files")
    examples: list[tuple[str, type[nn.Module], Any]] = [("tokens", Tokens, ids(2, 0)), ("two", Two, pairs(2))]
    for name, kind, example in examples:
        save_terse(made(kind), example, found / f"{name}.terse", Preparation((8, 8), (0.5,) * 3, (0.5,) * 3))
        export_onnx(made(kind), example, found / f"{name}.onnx")
        export_pt2(made(kind), example, found / f"{name}.pt2")
    return found


def test_a_network_of_ids_is_compressed_timed_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    model = made(Tokens)
    batches = [(ids(32, seed), torch.arange(32) % 3) for seed in range(2)]
    task = Task(example=ids(2, 9), train=batches, test=batches, quiet=True)
    run = compress(model, task, [FoldBatchNorm()], out=tmp_path / "run")
    assert all(row["latency_ms"]["onnxruntime"]["median"] > 0 for row in run.rows)
    assert [Path(path).name for path in files.export_to(tmp_path / "run", ["torch"], tmp_path)] == ["model.pt2"]
    x = ids(5, 3)
    torch.testing.assert_close(open_file(tmp_path / "model.pt2").run(x.numpy()), model(x).detach().numpy())
    text = (tmp_path / "run" / "README.md").read_text()
    assert "- Input 1: int64, (N, 6), the batch first" in text
    assert not any(word in text for word in ("pixels", "image.jpg", "32, 32"))
    snippets = re.findall("```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 3
    monkeypatch.chdir(tmp_path / "run")
    for code in snippets:
        exec(code, {})


@pytest.mark.parametrize("ending", ["onnx", "terse"])
def test_ids_are_measured_as_given_and_never_made_up(folder: Path, ending: str) -> None:
    path = folder / f"tokens.{ending}"
    found = measure_files([path], x=ids(2, 1).numpy(), batch=2, **FEW)
    assert found.energies
    with pytest.raises(SettingsError, match=rf"tokens\.{ending} takes int64 as \w+, and a file does not say which"):
        measure_files([path], **FEW)


def test_ids_are_whole_numbers(folder: Path) -> None:
    path = folder / "tokens.onnx"
    with pytest.raises(DataError, match="takes int64, got numbers that are not whole"):
        measure_files([path], x=np.full((1, 6), 0.5, np.float32), **FEW)


@pytest.mark.parametrize("ending", ["onnx", "terse"])
def test_files_of_two_inputs_are_measured_on_noise(folder: Path, ending: str) -> None:
    assert gate(folder / f"two.{ending}", max_latency="1000ms")["met"]


def test_files_of_two_inputs_are_measured_on_both(folder: Path) -> None:
    entry = Entry("two", folder / "two.onnx", "onnxruntime")
    x = tuple(each.numpy() for each in pairs(3))
    assert measure_apart([entry], x=x, batch=3, **FEW).batch == 3
    with pytest.raises(SettingsError, match="a batch of 4 needs as many inputs, got 3"):
        measure_apart([entry], x=x, batch=4, **FEW)
    with pytest.raises(DataError, match=r"takes 2 inputs \(x, v\), got 1"):
        measure_apart([entry], x=x[0], batch=3, **FEW)


@pytest.mark.parametrize("ending", ["onnx", "terse", "pt2"])
def test_the_estimate_of_energy_counts_all_inputs(folder: Path, ending: str) -> None:
    found = estimate_file(folder / f"two.{ending}", [x[:1].numpy() for x in pairs(2)])
    assert found is not None
    assert f"from {MACS_OF_TWO:,} 32-bit" in found.note
    of_ids = estimate_file(folder / f"tokens.{ending}", [ids(1, 0).numpy()])
    assert of_ids is not None
    assert f"from {totals(made(Tokens), ids(2, 0)).macs:,} 32-bit" in of_ids.note


def test_several_inputs_take_turns_in_one_process(folder: Path) -> None:
    runner, x = open_file(folder / "two.onnx"), tuple(each.numpy() for each in pairs(1))
    assert measure([Contender("two", runner, x)], **FEW).latency("two")["median"] > 0
    with pytest.raises(SettingsError, match="two has an input of batch 1, the measurement 2"):
        measure([Contender("two", runner, x)], batch=2, **FEW)


def test_made_inputs_are_of_the_types_that_are_taken() -> None:
    expected = [Input(kind, (None, 3, 2), kind) for kind in ("float32", "float64", "float16", "bool", "int32")]
    found = made_inputs("a file", [*expected, Input("unknown", (None, 3))], 4, {"int32": 5})
    assert [each.dtype.name for each in found] == ["float32", "float64", "float16", "bool", "int32", "float32"]
    assert [each.shape for each in found] == [(4, 3, 2)] * 5 + [(4, 3)]
    assert found[3].any()
    assert not found[3].all()
    assert set(found[4].flat) == set(range(5))
    with pytest.raises(SettingsError, match=r"a file takes inputs of any size \(x is NxNx3\); give the size"):
        made_inputs("a file", [Input("x", (None, None, 3), "float32")], 1)


def test_made_ids_are_places_in_the_smallest_table(folder: Path) -> None:
    found = made_example(load_terse(folder / "tokens.terse"), "tokens")
    assert isinstance(found, Tensor)
    assert found.dtype == torch.int64
    assert found.shape == (2, 6)
    assert 0 < int(found.max()) < PLACES
    many = [found, *(made_example(load_terse(folder / "two.terse"), "two"))]
    assert [tuple(each.shape) for each in many] == [(2, 6), (2, 3, 8, 8), (2, 4)]


@pytest.mark.parametrize("name", ["tokens", "two"])
def test_a_terse_file_is_exported_whatever_it_takes(folder: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("openvino")
    model = made(Tokens if name == "tokens" else Two)
    inputs: tuple[Tensor, ...] = (ids(3, 4),) if name == "tokens" else pairs(3)
    expected = model(*inputs).detach().numpy()
    found = files.export_to(folder / f"{name}.terse", ["onnx", "openvino", "tensorrt", "torch"], tmp_path)
    again = unpack(folder / f"{name}.terse", tmp_path / "again.onnx")
    files.pack(str(folder / f"{name}.terse"), tmp_path / "again.terse")
    for path in (*found, again, tmp_path / "again.terse"):
        np.testing.assert_allclose(open_file(path).run([x.numpy() for x in inputs]), expected, atol=1e-5)
    # Where no single image is taken, nothing is said about how one would be prepared.
    assert not any("tersenet.mean" in open_file(path).metadata for path in found)
    with pytest.raises(SettingsError, match=r"files for litert are written of models that take one input of float32"):
        files.export_to(folder / f"{name}.terse", ["onnx", "litert"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_of_two_inputs_is_profiled(folder: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    found = profile_file(folder / "two.onnx", runtime=runtime, batch=2)
    timed = {row["path"] for row in found["rows"] if row["calls"]}
    assert {"conv", "wide", "head"} <= timed
    assert found["totals"]["macs"] == MACS_OF_TWO
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(SettingsError, match=r"takes int64 as \w+, and a file does not say which"):
        profile_file(folder / "tokens.onnx", runtime=runtime)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "pytorch"])
@pytest.mark.parametrize("name", ["tokens.terse", "two.terse", "two.pt2"])
def test_a_model_of_any_inputs_is_profiled(folder: Path, name: str, runtime: str) -> None:
    pytest.importorskip(runtime if runtime != "pytorch" else "torch")
    model, preparation = open_model(str(folder / name))
    found = profile_model(model, example_for(model, preparation), runtime=runtime, batch=3)
    assert found["batch"] == 3
    timed = {row["path"] for row in found["rows"] if row["calls"]}
    assert {"conv", "head"} <= timed


def test_data_of_images_is_refused_for_other_inputs(folder: Path) -> None:
    for name, what in (("two.terse", r"2 inputs \(x, v\)"), ("tokens.terse", "an input Nx6 of int64")):
        model, preparation = open_model(str(folder / name))
        with pytest.raises(ModelError, match=f"the model takes {what}, and random:3x8x8 gives one input, images"):
            open_task(model, preparation, "random:3x8x8")
    with pytest.raises(ModelError, match=r"takes 2 inputs \(x, v\), and random:3x8x8 gives one"):
        open_task(made(Two), Preparation(), "random:3x8x8")
    with pytest.raises(ModelError, match=r"Two takes 2 inputs \(x, v\), and code does not say of which shapes"):
        example_for(made(Two), Preparation())


class Reading(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * json.loads("")


def test_what_cannot_be_captured_is_said_without_lines_of_python_itself() -> None:
    with pytest.raises(TraceError, match=r"Two takes \(x, v\) and is given 1 input: missing a required") as said:
        trace(made(Two), pairs(2)[0])
    assert ".py" not in str(said.value)
    with pytest.raises(TraceError, match=r"test_inputs_of_files\.py, line \d+ \(return x \* json\.loads") as said:
        trace(Reading(), pairs(2)[0])
    assert "decoder.py" not in str(said.value)


def test_files_are_compared_on_ids_and_on_all_inputs(folder: Path) -> None:
    agreement = verify(open_file(folder / "tokens.onnx"), made(Tokens), [ids(5, 1)])
    assert agreement.samples == 5
    assert agreement.max_abs_error < 1e-5
    found = verify(open_file(folder / "two.onnx"), made(Two), [(pairs(4), None)] * 3, limit=6)
    assert found.samples == 6
    assert found.max_abs_error < 1e-5
    assert verify(open_module(made(Two)), nn.Module.eval(made(Other)), [(pairs(4), None)]).max_abs_error > 1e-3


class Other(Two):
    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return super().forward(x, v + 1)


def test_a_search_times_networks_of_ids(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    task = Task(example=ids(2, 9), calibrate=[(ids(4, 0), None)], quiet=True)
    bench = Bench([], [], made(Tokens), task, runtime="onnxruntime", threads=1, batch=2, folder=tmp_path)
    assert bench.x.dtype == np.int64
    ((milliseconds, share),) = bench.times([{}], "a test")
    assert milliseconds > 0
    assert 0.3 < share < 3
