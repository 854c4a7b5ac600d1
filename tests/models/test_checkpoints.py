"""Checkpoints as training scripts leave them: which weights are taken, what is said, what is refused."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tersenet import models
from tersenet.errors import FileError, InputWarning, ModelError
from tersenet.models.sources import open_model
from tersenet.models.weights import load_weights


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def numbers(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + seed
        for key, value in small().state_dict().items()
    }


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def assert_loads(path: str | Path, expected: dict[str, Tensor], model: nn.Module | None = None) -> None:
    model = small() if model is None else model
    load_weights(model, path)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key].to(value.dtype), rtol=0, atol=0)


LIGHTNING = {
    "epoch": 3,
    "pytorch-lightning_version": "2.5.0",
    "loops": {"fit_loop": {"state_dict": {}}},
    "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9), "dirpath": "/runs"}},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2, 1, 3, 3)}}, "param_groups": [{"lr": 0.1}]}],
    "lr_schedulers": [],
    "hparams_name": "kwargs",
    "hyper_parameters": {"lr": 0.1, "args": argparse.Namespace(width=2), "root": pathlib.PurePosixPath("/data")},
}


@pytest.mark.parametrize("ending", [".ckpt", ".pth.tar", ".bin", ".pt", ".pth"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {**LIGHTNING, "state_dict": under("model.", state)},
        lambda state: {"arch": "x", "best_acc1": np.float64(0.9), "state_dict": under("module.", state)},
        lambda state: {"network": {"weights": under("_forward_module.", state)}, "opt": {"optimizer": state}},
        lambda state: {"params": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"trained": under("net._orig_mod.module.", state)},
        lambda state: {"n_averaged": torch.tensor(5), **under("module.", state)},
        lambda state: {**state, "total_ops": torch.tensor([1.0]), "0.total_params": torch.tensor([1.0])},
        lambda state: {"model": collections.defaultdict(int, state), "step": collections.Counter("ab")},
        lambda state: {
            "model": {key: nn.Parameter(value) if value.is_floating_point() else value for key, value in state.items()}
        },
    ],
    ids=[
        "lightning",
        "imagenet example",
        "nested",
        "params",
        "unknown",
        "averaged",
        "thop",
        "defaultdict",
        "parameters",
    ],
)
def test_weights_are_found_wherever_scripts_put_them(tmp_path: Path, ending: str, wrap: Any) -> None:
    state = numbers()
    content = wrap(state)
    if ending in (".bin", ".pth") and "state_dict" not in content:
        pytest.skip("endings are tried with some of the forms")
    assert_loads(saved(tmp_path / f"w{ending}", content), state)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("ema", lambda ema: {"ema": ema}),
        ("model_ema", lambda ema: {"model_ema": under("module.", ema)}),
        ("ema_state_dict", lambda ema: {"ema_state_dict": ema}),
        ("state_dict_ema", lambda ema: {"state_dict_ema": ema}),
        ("params_ema", lambda ema: {"params_ema": ema}),
        ("ema", lambda ema: {"ema": {"module": ema, "decay": 0.99}}),
    ],
)
def test_averaged_weights_are_taken_and_said(tmp_path: Path, name: str, wrap: Any) -> None:
    plain, ema = numbers(1), numbers(2)
    path = saved(tmp_path / "w.pth", {"model": plain, **wrap(ema)})
    with pytest.warns(InputWarning, match=rf"averaged ones \({name}.*\) were taken, not model; .*w\.pth#model"):
        assert_loads(path, ema)
    assert_loads(f"{path}#model", plain)
    assert_loads(f"{path}#{name}", ema)
    with pytest.raises(ModelError, match="no weights called 'best'; it holds model, "):
        load_weights(small(), f"{path}#best")


def test_averages_in_one_state_dict_with_the_weights(tmp_path: Path) -> None:
    plain, ema = numbers(1), numbers(2)
    path = saved(tmp_path / "w.ckpt", {"state_dict": {**under("model.", plain), **under("model_ema.", ema)}})
    with pytest.warns(InputWarning, match=r"state_dict\.model_ema\) were taken, not state_dict\.model;"):
        assert_loads(path, ema)
    assert_loads(f"{path}#state_dict.model", plain)


def test_averages_of_parameters_alone_are_not_taken_and_said(tmp_path: Path) -> None:
    plain = numbers(1)
    ema = {key: value for key, value in numbers(2).items() if "running" not in key}
    path = saved(tmp_path / "w.pth", {"model": plain, "ema": ema})
    with pytest.warns(InputWarning, match=r"\(ema\) too, which lack 1\.running_mean, 1\.running_var"):
        assert_loads(path, plain)


def test_teacher_and_student_must_be_chosen(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"teacher": numbers(1), "student": numbers(2)})
    with pytest.raises(ModelError, match=r"several sets .* \(teacher, student\); say which: .*#teacher or .*#student"):
        load_weights(small(), path)
    assert_loads(f"{path}#student", numbers(2))
    same = saved(tmp_path / "same.pth", {"model": numbers(1), "best": numbers(1)})
    assert_loads(same, numbers(1))


def test_a_model_that_wraps_the_saved_one(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

    assert_loads(saved(tmp_path / "w.pt", numbers()), under("net.", numbers()), Wrapped())


def test_tensors_beside_the_weights_are_said(tmp_path: Path) -> None:
    state = {**under("model.", numbers()), "loss.weight": torch.ones(3)}
    with pytest.warns(InputWarning, match=r"1 tensors in .* were left out \(loss\.weight\)"):
        assert_loads(saved(tmp_path / "w.ckpt", {"state_dict": state}), numbers())
    # Without a prefix it is a name that the model ought to have.
    with pytest.raises(ModelError, match=r"unexpected aux\.3\.weight;"):
        load_weights(small(), saved(tmp_path / "w.pt", {**numbers(), "aux.3.weight": torch.ones(3, 2)}))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_converted_and_said(tmp_path: Path, kind: torch.dtype) -> None:
    state = {key: value.to(kind) if value.is_floating_point() else value for key, value in numbers().items()}
    name = str(kind).removeprefix("torch.")
    with pytest.warns(InputWarning, match=f"are {name} and were converted to float32"):
        assert_loads(saved(tmp_path / "w.pt", state), state)


def test_another_number_of_classes_is_said_so(tmp_path: Path) -> None:
    state = {**numbers(), "3.weight": torch.zeros(100, 2), "3.bias": torch.zeros(100)}
    with pytest.raises(ModelError, match=r"has 100 classes and the model has 3 \(3\.weight .*all else fits; build"):
        load_weights(small(), saved(tmp_path / "w.pt", state))


def test_a_named_model_is_built_with_the_classes_of_its_weights(tmp_path: Path) -> None:
    made = models.build("resnet20", num_classes=100)
    path = saved(tmp_path / "w.pt", made.state_dict())
    with pytest.warns(InputWarning, match="of 100 classes, so resnet20 is built with 100"):
        model, preparation = open_model("resnet20", path)
    assert preparation.labels == ()  # not those of CIFAR-10
    assert torch.equal(model.linear.weight, made.linear.weight)


def test_near_names_are_told(tmp_path: Path) -> None:
    state = {key.replace("3.", "head."): value for key, value in numbers().items()}
    with pytest.raises(ModelError, match=r"missing 3\.weight, 3\.bias; unexpected head\.weight, head\.bias"):
        load_weights(small(), saved(tmp_path / "w.pt", state))


class Net(nn.Module):
    """As TorchScript compiles it: a buffer that no state dict has, layers in a list, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)])
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale + self.hidden[:, None, None]


# TorchScript is deprecated, and people have files of it.
deprecated = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@deprecated
def test_torchscript_gives_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    made = Net()
    made.layers[1](torch.randn(4, 2, 5, 5))  # other running statistics than the first ones
    path = tmp_path / "w.pt"
    torch.jit.save(torch.jit.trace(made.eval(), torch.zeros(1, 1, 8, 8)), path)
    monkeypatch.setattr(torch.jit, "load", None)  # it is never compiled
    assert_loads(path, made.state_dict(), Net())
    with pytest.raises(ModelError, match=r"name the model and give the file with --weights"):
        open_model(str(path))


@deprecated
def test_scripted_programs_too(tmp_path: Path) -> None:
    made = Net()
    torch.jit.save(torch.jit.script(made), tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", made.state_dict(), Net())


def test_several_files_and_their_index(tmp_path: Path) -> None:
    state = numbers()
    parts = {"a.safetensors": list(state)[:3], "b.safetensors": list(state)[3:]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, keys in parts.items() for key in keys}}))
    assert_loads(index, state)
    index.write_text(json.dumps({"weight_map": {"0.weight": "../a.safetensors"}}))
    with pytest.raises(FileError, match="every file must lie beside the index"):
        load_weights(small(), index)
    index.write_text(json.dumps({"weight_map": {"other": "a.safetensors"}}))
    with pytest.raises(FileError, match=r"names other, which is not in a\.safetensors"):
        load_weights(small(), index)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("w.onnx", "ONNX file, whose weights have no names"),
        ("w.pt2", "give it in place of the model's name"),
        ("w.terse", "give it in place of the model's name"),
        ("w.pt", "0 bytes"),
    ],
)
def test_files_of_other_kinds_are_told_what_they_are(tmp_path: Path, name: str, match: str) -> None:
    (tmp_path / name).write_bytes(b"" if name == "w.pt" else b"something")
    with pytest.raises(FileError, match=match):
        load_weights(small(), tmp_path / name)


def test_classes_of_hyperparameters_are_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of the package `omegaconf`, which is not there when the file is read."""
    package = types.ModuleType("omegaconf")

    class DictConfig(dict):
        pass

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf", "DictConfig"
    package.DictConfig = DictConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", package)
    content = {"state_dict": numbers(), "hyper_parameters": DictConfig(lr=0.1)}
    path = saved(tmp_path / "w.ckpt", content)
    monkeypatch.delitem(sys.modules, "omegaconf")
    assert_loads(path, numbers())
    assert "omegaconf" not in sys.modules


def test_a_whole_model_that_was_pickled_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", {"model": small(), "epoch": 3})
    with pytest.raises(FileError, match=r"calls torch\.nn\.modules\.container\.Sequential.*model\.state_dict\(\)"):
        load_weights(small(), path)
