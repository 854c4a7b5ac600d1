"""Weights load whole or not at all, and nothing in a file is executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tersenet import models
from tersenet.errors import FileError, InputWarning, ModelError, TersenetError
from tersenet.models.weights import load_weights, save_weights

WEIGHTS = Path(__file__).parents[2].parent / "shared" / "data" / "weights"


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def numbers(seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = small().state_dict()
    return {key: torch.randn(value.shape) if value.is_floating_point() else value + 4 for key, value in state.items()}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def assert_loads(path: Path, expected: dict[str, Tensor]) -> None:
    model = small()
    load_weights(model, path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def assert_refused(path: Path, error: type[TersenetError], match: str, model: nn.Module | None = None) -> str:
    """Refused in one sentence, and the model is as it was."""
    model = small() if model is None else model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=match) as caught:
        load_weights(model, path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} was changed by weights that were refused"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".PT"])
def test_plain_state_dicts(tmp_path: Path, suffix: str) -> None:
    state = numbers()
    assert_loads(write(tmp_path / f"w{suffix}", state), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "name": "x"},
        lambda state: {"model": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"module." + key: value for key, value in state.items()},
        lambda state: {"state_dict": {"module._orig_mod." + key: value for key, value in state.items()}},
        lambda state: {"_orig_mod.module." + key: value for key, value in state.items()},
    ],
)
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrap: Any) -> None:
    state = numbers()
    assert_loads(write(tmp_path / "w.pt", wrap(state)), state)


def test_a_layer_called_module_keeps_its_name(tmp_path: Path) -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    state = {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}
    load_weights(model, write(tmp_path / "w.pt", state))
    assert torch.equal(model.module.weight, torch.ones(2, 2))


def test_a_missing_count_of_batches_is_no_matter(tmp_path: Path) -> None:
    state = numbers()
    del state["1.num_batches_tracked"]
    model = small()
    load_weights(model, write(tmp_path / "w.safetensors", state))
    assert torch.equal(model[3].weight, state["3.weight"])  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_weights_have_our_names(depth: int) -> None:
    path = WEIGHTS / f"cifar10_resnet{depth}.safetensors"
    if not path.exists():
        pytest.skip("the reference weights are not beside the project")
    model = models.build(f"resnet{depth}")
    load_weights(model, path)
    published = load_file(path)
    ours = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[key], published[key]) for key in ours)


class Evil:
    """Unpickled by plain pickle, this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["torch.save", "protocol 0", "protocol 2", "protocol 4", "protocol 5"])
@pytest.mark.parametrize("inside", [True, False])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path: Path, form: str, inside: bool) -> None:
    target, path = tmp_path / "executed", tmp_path / "w.pt"
    content = {"state_dict": {**numbers(), "x": Evil(target)}} if inside else Evil(target)
    if form == "torch.save":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    said = assert_refused(path, FileError, "refused and nothing in it was executed")
    assert "safetensors" in said
    assert not target.exists()
    # The file is a real danger: without our refusal it does make the file.
    if form != "torch.save":
        pickle.loads(path.read_bytes())
        assert target.exists()


def test_a_pickled_model_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pt", models.build("digits"))
    assert_refused(path, FileError, r"calls tersenet\.models\.digits\.DigitsNet")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 1, 7, 100, -1])
def test_a_cut_file_is_damaged(tmp_path: Path, suffix: str, keep: int) -> None:
    path = write(tmp_path / f"w{suffix}", numbers())
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(path, FileError, "is damaged or no ")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content", [b"garbage, not weights", b"\x00" * 64, b"\x80\x04garbage", b"PK\x03\x04 not really"]
)
def test_another_kind_of_content_is_damaged(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    assert_refused(path, FileError, "is damaged or no ")


def test_missing_files_folders_and_other_kinds(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.safetensors", FileError, "there is no weights file .*none.safetensors")
    (tmp_path / "folder.pt").mkdir()
    assert_refused(tmp_path / "folder.pt", FileError, "there is no weights file")
    assert_refused(tmp_path / "w.npz", FileError, r"give a file of weights \(\.safetensors, \.pt, \.pth")


def test_wrong_names_say_the_first_few_and_count_the_rest(tmp_path: Path) -> None:
    state = {f"net{key}": value for key, value in numbers().items()}
    said = assert_refused(write(tmp_path / "w.safetensors", state), ModelError, "are not this model's")
    assert "missing 0.weight, 0.bias, 1.weight and 5 more;" in said
    assert "unexpected " in said
    assert "net0.bias" in said
    assert "and 6 more (" in said  # of nine in the file


def test_one_missing_and_one_unexpected_name(tmp_path: Path) -> None:
    state = numbers()
    state["4.weight"] = state.pop("3.weight")
    assert_refused(write(tmp_path / "w.pt", state), ModelError, r"missing 3\.weight; unexpected 4\.weight .*; give")
    assert_refused(write(tmp_path / "empty.pt", {}), ModelError, r"missing 0\.weight, 0\.bias")


def test_wrong_shapes_say_both(tmp_path: Path) -> None:
    state = numbers()
    state["3.weight"], state["3.bias"] = torch.zeros(5, 4), torch.zeros(5)
    said = assert_refused(
        write(tmp_path / "w.pt", state), ModelError, r"3\.weight has shape \(5, 4\) in .* but \(3, 2\)"
    )
    assert "and 1 more differ" in said


@pytest.mark.parametrize(
    ("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
def test_nan_and_infinite_weights_name_the_tensor(tmp_path: Path, bad: float, word: str) -> None:
    state = numbers()
    state["1.running_var"][1] = bad
    assert_refused(write(tmp_path / "w.safetensors", state), ModelError, rf"1\.running_var in .* has {word} values")


def test_numbers_too_large_for_the_model_are_refused(tmp_path: Path) -> None:
    state = numbers()
    state["3.bias"] = torch.full((3,), 1e300, dtype=torch.float64)
    assert_refused(write(tmp_path / "w.pt", state), ModelError, r"3\.bias .* infinite values in a strided float32")


def test_float16_weights_fill_a_float32_model(tmp_path: Path) -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in numbers().items()}
    model = small()
    with pytest.warns(InputWarning, match="float16 and were converted"):
        load_weights(model, write(tmp_path / "w.safetensors", state))
    assert model[3].weight.dtype == torch.float32
    assert torch.equal(model[3].weight, state["3.weight"].float())  # type: ignore[arg-type]


def test_integers_are_no_float_weights(tmp_path: Path) -> None:
    state = numbers()
    state["3.weight"] = torch.ones(3, 2, dtype=torch.int8)
    assert_refused(write(tmp_path / "w.pt", state), ModelError, r"3\.weight is a strided int8 tensor in ")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds of type list and no state dict"),
        (torch.zeros(3), "and no state dict"),
        ({"weights": "none", "epoch": 1}, "is no state dict: its entry 'weights' is of type str"),
        ({**numbers(), "3.bias": [1.0, 2.0, 3.0]}, r"is no state dict: its entry '3\.bias' is of type list"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, content: Any, match: str) -> None:
    assert_refused(write(tmp_path / "w.pt", content), ModelError, match)


def test_saved_weights_come_back(tmp_path: Path) -> None:
    model = small()
    state = numbers()
    model.load_state_dict(state)
    path = tmp_path / "deeper" / "w.safetensors"
    save_weights(model, path)
    assert_loads(path, state)
    assert [entry.name for entry in path.parent.iterdir()] == ["w.safetensors"]
    fresh = small()
    fresh.load_state_dict(load_file(path))  # strict, by plain safetensors


class Tied(nn.Module):
    """Two layers with one weight, and two buffers that are views of one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        memory = torch.arange(6.0)
        self.register_buffer("low", memory[:4])
        self.register_buffer("high", memory[2:])
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)


def test_shared_tensors_are_written_once_and_come_back(tmp_path: Path) -> None:
    model, path = Tied(), tmp_path / "w.safetensors"
    save_weights(model, path)
    with safe_open(path, framework="pt") as file:
        assert "second.weight" not in file.keys()  # noqa: SIM118 - not a mapping
        assert json.loads(file.metadata()["shared"]) == {"second.weight": "first.weight"}
    fresh = Tied()
    load_weights(fresh, path)
    assert fresh.second.weight is fresh.first.weight
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    untied = Tied()
    untied.second.weight = nn.Parameter(torch.zeros(3, 3))
    load_weights(untied, path)
    assert torch.equal(untied.second.weight, model.first.weight)


def test_saving_the_same_numbers_gives_the_same_bytes(tmp_path: Path) -> None:
    model = Tied()
    save_weights(model, tmp_path / "a.safetensors")
    save_weights(model, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(small(), path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TersenetError, match="the disk is full"):
        save_weights(small(), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = small()
    with pytest.raises(ModelError, match=r"0\.weight cannot be stored: it is a strided float32 tensor without numbers"):
        save_weights(model, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_numpy_scalars_beside_the_weights_are_read_over(tmp_path: Path) -> None:
    assert_loads(write(tmp_path / "w.pt", {"state_dict": numbers(), "best": np.float64(0.9)}), numbers())
