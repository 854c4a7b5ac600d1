"""Models named by one string: ours, other libraries', the user's own code; and every way to name none."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersenet import models
from tersenet.errors import FileError, MissingExtra, ModelError
from tersenet.models.sources import open_model
from tersenet.models.weights import save_weights
from tersenet.task import Preparation

OWN = """
import sys
from torch import nn
from tersenet.task import Preparation

print("the user's own words")

def net():
    print("more of them")
    return nn.Linear(2, 3)

def prepared():
    model = nn.Linear(2, 3)
    model.preparation = Preparation((3, 5))
    return model

ready = nn.Linear(4, 4)
number = 5

def gives_none(): pass
def needs_more(width): return nn.Linear(width, width)
def fails(): raise ValueError("no luck\\nat all")
def leaves(): sys.exit(3)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current folder; its name."""
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "broken_models.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "crooked_models.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("own_models", "broken_models", "crooked_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_models"


def test_our_own_names_with_weights(tmp_path: Path) -> None:
    trained = models.build("digits")
    save_weights(trained, tmp_path / "w.safetensors")
    model, preparation = open_model("digits", tmp_path / "w.safetensors")
    assert torch.equal(model.conv2.weight, trained.conv2.weight)  # type: ignore[union-attr,arg-type]
    assert preparation == models.reference("digits").preparation
    with pytest.raises(FileError, match="there is no weights file"):
        open_model("digits", tmp_path / "none.safetensors")


def test_the_users_own_code_is_run_and_said(
    own: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, preparation = open_model(f"{own}:net")
    assert isinstance(model, nn.Linear)
    assert preparation == Preparation()
    assert "running your own code: own_models:net" in caplog.text
    # Standard output is for results, so what the user's code prints goes to standard error.
    out, err = capsys.readouterr()
    assert out == ""
    assert "the user's own words" in err
    assert "more of them" in err


def test_the_users_code_may_say_its_preparation(own: str) -> None:
    assert open_model(f"{own}:prepared")[1] == Preparation((3, 5))


def test_a_module_that_is_ready(own: str) -> None:
    assert open_model(f"{own}:ready")[0] is sys.modules[own].ready


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("own_models:nett", "own_models has no 'nett'; near ones are net"),
        ("own_models:number", "own_models:number is of type int; give a callable"),
        ("own_models:gives_none", "returned an object of type NoneType; it must return a torch.nn.Module"),
        ("own_models:needs_more", "could not be built: TypeError: .*width.*; it must build without arguments"),
        ("own_models:fails", "own_models:fails could not be built: ValueError: no luck;"),
        ("own_models:leaves", "own_models:leaves could not be built: SystemExit: 3;"),
        ("broken_models:net", "importing broken_models failed with ModuleNotFoundError: .*a_package_that_is_not_there"),
        ("crooked_models:net", "importing crooked_models failed with SyntaxError"),
        ("not_there_models:net", "there is no Python module 'not_there_models' in .* a model is a name"),
        ("own_models.deeper:net", "there is no Python module 'own_models.deeper'"),
    ],
)
def test_errors_of_the_users_code(own: str, spec: str, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        open_model(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["resnet57", "xyzzy", "", ":", "module:", ":factory"])
def test_unknown_names_say_the_forms(spec: str) -> None:
    with pytest.raises(ModelError, match=f"there is no model '{spec}'; a model is a name such as resnet56, timm:NAME"):
        open_model(spec)


def test_a_near_name_is_offered() -> None:
    with pytest.raises(ModelError, match="near names are resnet56, "):
        open_model("resnet57")


@pytest.mark.parametrize("spec", ["model.onnx", "folder/model.zip", "model.keras"])
def test_unknown_kinds_of_file(spec: str) -> None:
    with pytest.raises(ModelError, match=r"is not a kind of file .* FILE\.pt2, FILE\.terse or FILE\.onnx"):
        open_model(spec)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_package_that_is_not_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to make an import fail
    with pytest.raises(MissingExtra, match=f"{package} is needed to open its models; install it with: pip install"):
        open_model(f"{package}:resnet18")


def fake_timm(calls: list[tuple[str, bool]]) -> Any:
    """What we use of timm, so that the rules about tags are tested without it and without a network."""

    def create_model(name: str, pretrained: bool) -> nn.Module:
        calls.append((name, pretrained))
        if name.endswith("gone"):
            raise OSError("the network is down")
        return nn.Linear(2, 2)

    timm: Any = types.ModuleType("timm")
    timm.is_model = lambda name: name == "net"
    timm.list_models = lambda: ["net", "other"]
    timm.create_model = create_model
    config = {"input_size": (3, 160, 176), "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}
    timm.data = types.SimpleNamespace(resolve_model_data_config=lambda model: config)
    return timm


def test_timm_tags_say_whether_weights_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, bool]] = []
    monkeypatch.setitem(sys.modules, "timm", fake_timm(calls))
    save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    assert open_model("timm:net")[1] == Preparation((160, 176), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    open_model("timm:net.tag")
    open_model("timm:net.tag", tmp_path / "w.safetensors")
    assert calls == [("net", False), ("net.tag", True), ("net.tag", False)]
    with pytest.raises(ModelError, match="timm has no model 'nett'; near ones are net"):
        open_model("timm:nett")
    with pytest.raises(
        ModelError, match=r"timm:net\.gone could not be built: OSError: the network is down; .* network"
    ):
        open_model("timm:net.gone")


def test_timm_itself() -> None:
    model, preparation = open_model("timm:mobilenetv2_050")
    assert sum(p.numel() for p in model.parameters()) == 1_968_680
    assert preparation.size == (224, 224)


def test_torchvision_itself() -> None:
    model, preparation = open_model("torchvision:resnet18")
    assert len(model.state_dict()) == 122
    assert preparation == models.IMAGENET
    assert open_model("torchvision:efficientnet_b1")[1].size == (240, 240)
    with pytest.raises(ModelError, match="torchvision has no model 'resnet19'; near ones are resnet18"):
        open_model("torchvision:resnet19")
    with pytest.raises(ModelError, match="resnet18 has no weights 'V9'; its tags are DEFAULT, IMAGENET1K_V1"):
        open_model("torchvision:resnet18.V9")


TORCHVISION_LIKE = """
import torch
torch.library.register_fake("{library}::nms")(lambda dets, scores, threshold: dets)
VALUE = 7
"""


def test_operators_that_nobody_declared_are_declared(tmp_path: Path) -> None:
    """As in torchvision where its compiled part does not load: the import works, and the model is built."""
    (tmp_path / "needy_models.py").write_text(
        TORCHVISION_LIKE.format(library="torchvision") + "from torch import nn\ndef net(): return nn.Linear(VALUE, 1)\n"
    )
    # In a process of its own: what is declared once stays declared.
    code = "from tersenet.models.sources import open_model; print(open_model('needy_models:net')[0].in_features)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["7"], done.stderr
