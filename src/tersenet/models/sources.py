"""Opens a model that is named by one string: ours, timm's, torchvision's, or made by the user's own code.

Files (.pt2, .terse) are opened by `tersenet.open_model`, which calls this for everything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tersenet import models
from tersenet.errors import InputWarning, MissingExtra, ModelError
from tersenet.models import published
from tersenet.models.weights import OtherClasses, load_weights
from tersenet.task import Preparation

FORMS = (
    "a name such as resnet56, timm:NAME, torchvision:NAME, package.module:factory, FILE.pt2, FILE.terse or FILE.onnx"
)
_NETWORK = "check the name; the weights of a tag are downloaded, so for those check the network too"
# Endings of files that people keep weights in.
WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar", ".safetensors", ".safetensors.index.json", ".bin.index.json")
_log = logging.getLogger(__name__)
# Declared operators live as long as this does.
_DECLARED: list[torch.library.Library] = []


def open_model(spec: str, weights: str | os.PathLike[str] | None = None) -> tuple[nn.Module, Preparation]:
    """Builds the model that `spec` names, and says how its inputs are prepared.

    Args:
        spec: a name of `tersenet.models.names()`; "timm:NAME" or "torchvision:NAME"; or "package.module:factory", a
            callable without arguments (or a module) in the user's own code, which is imported, with the current
            folder on the path. The name of timm or torchvision may end in ".TAG" ("timm:resnet18.a1_in1k",
            "torchvision:resnet18.DEFAULT"): then the published weights of this tag are downloaded; without a tag, and
            for our own names, the numbers are random until `weights` are given.
        weights: a file for `load_weights`.
    Raises:
        ModelError: when there is no such model, or it cannot be built, or the weights do not fit it.
        FileError: when the weights cannot be read.
        MissingExtra: when timm or torchvision is needed and not installed.
    """
    classes = None
    if weights is not None:
        try:
            model, preparation = _built(spec, False)
            load_weights(model, weights)
            return model, published.beside(Path(weights)) or preparation
        except OtherClasses as error:
            if not _is_named(spec):
                raise
            classes = error.classes
            warnings.warn(
                f"the weights in {weights} are of {classes} classes, so {spec} is built with {classes}",
                InputWarning,
                stacklevel=3,
            )
    model, preparation = _built(spec, weights is None, classes)
    if weights is not None:
        load_weights(model, weights)
        preparation = published.beside(Path(weights)) or preparation
    if classes is not None and len(preparation.labels) != classes:
        preparation = dataclasses.replace(preparation, labels=())
    return model, preparation


def _is_named(spec: str) -> bool:
    """Whether the model is built here, and so can be built with another number of classes."""
    return spec in models.REFERENCES or spec.startswith(("timm:", "torchvision:"))


def _built(spec: str, may_download: bool, classes: int | None = None) -> tuple[nn.Module, Preparation]:
    """The model that `spec` names; `classes` is for named ones, None leaves their default."""
    family, colon, name = spec.partition(":")
    other: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if spec in models.REFERENCES:
        own = models.reference(spec).preparation
        return models.build(spec, **other), dataclasses.replace(own, source=f"the reference of {spec}")
    if family == "timm" and colon:
        return _from_timm(name, "." in name and may_download, other)
    if family == "torchvision" and colon:
        return _from_torchvision(name, "." in name and may_download, other)
    if Path(spec).suffix and (os.sep in spec or Path(spec).exists() or not colon):
        if Path(spec).name.endswith(WEIGHTS):
            raise ModelError(
                f"{spec} holds weights (or TorchScript) and not a model that can be changed; name the model and give "
                f"the file with --weights {spec}"
            )
        raise ModelError(f"{spec} is not a kind of file that a model can be read from; a model is {FORMS}")
    if family and name:
        return _from_user(family, name)
    near = difflib.get_close_matches(spec, models.REFERENCES, n=3)
    names = f"near names are {', '.join(near)}" if near else f"the known names are {', '.join(models.REFERENCES)}"
    raise ModelError(f"there is no model {spec!r}; a model is {FORMS}; {names}")


def _from_timm(name: str, pretrained: bool, other: dict[str, Any]) -> tuple[nn.Module, Preparation]:
    timm = _optional("timm")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise ModelError(f"timm has no model {architecture!r}{_near(architecture, timm.list_models())}")
    model = _attempt(lambda: timm.create_model(name, pretrained=pretrained, **other), f"timm:{name}", _NETWORK)
    return model, published.of_timm(timm.data.resolve_model_data_config(model))


def _from_torchvision(name: str, pretrained: bool, other: dict[str, Any]) -> tuple[nn.Module, Preparation]:
    torchvision = _optional("torchvision")
    architecture, _, tag = name.partition(".")
    known = torchvision.models.list_models()
    if architecture not in known:
        raise ModelError(f"torchvision has no model {architecture!r}{_near(architecture, known)}")
    sets = torchvision.models.get_model_weights(architecture)
    tags = ["DEFAULT", *(member.name for member in sets)]
    if tag and tag not in tags:
        raise ModelError(f"torchvision's {architecture} has no weights {tag!r}; its tags are {', '.join(tags)}")
    chosen = sets[tag] if pretrained else None
    model = _attempt(
        lambda: torchvision.models.get_model(architecture, weights=chosen, **other), f"torchvision:{name}", _NETWORK
    )
    preset = sets.DEFAULT.transforms() if chosen is None else chosen.transforms()
    crop = getattr(preset, "crop_size", None)
    fixed = getattr(model, "image_size", None)  # a vision transformer takes no other, whatever its best weights took
    if isinstance(fixed, int):
        crop = (fixed,)
    if crop is None or not hasattr(preset, "mean"):  # of detection and segmentation
        return model, models.IMAGENET
    labels = chosen.meta.get("categories", ()) if chosen is not None else ()
    return model, published.of_torchvision(preset, (crop[0], crop[-1]), labels)  # one number means a square


def _from_user(module: str, factory: str) -> tuple[nn.Module, Preparation]:
    """Runs the user's code. The model may say its own `preparation`; else it is Preparation's default."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    _log.warning("importing and running your own code: %s:%s", module, factory)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = _import(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and (module + ".").startswith(error.name + "."):
            raise ModelError(
                f"there is no Python module {error.name!r} in {os.getcwd()} or among the installed packages; "
                f"a model is {FORMS}"
            ) from error
        raise ModelError(f"importing {module} failed with {_said(error)}; mend it, then try again") from error
    made = getattr(found, factory, None)
    if made is None:
        callables = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"{module} has no {factory!r}{_near(factory, callables)}")
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ModelError(f"{module}:{factory} is of type {type(made).__name__}; give a callable without arguments")
        made = _attempt(made, f"{module}:{factory}", "it must build without arguments")
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"{module}:{factory} returned an object of type {type(made).__name__}; it must return a torch.nn.Module"
        )
    kinds = {str(value.dtype) for value in made.parameters() if value.is_floating_point()} - {"torch.float32"}
    if kinds:
        made = made.float()
        warnings.warn(
            f"{module}:{factory} computes in {', '.join(sorted(kinds))} and was converted to torch.float32",
            InputWarning,
            stacklevel=5,
        )
    own = getattr(made, "preparation", None)
    if isinstance(own, Preparation):
        return made, dataclasses.replace(own, source="the model's own preparation")
    timms = getattr(made, "pretrained_cfg", None)
    if isinstance(timms, dict) and {"input_size", "mean", "std"} <= timms.keys():
        return made, published.of_timm(timms)
    return made, _assumed(made)


def _assumed(model: nn.Module) -> Preparation:
    """Preparation's default, with the channels that the first convolution takes, where the model runs with them."""
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    default = Preparation.unknown()
    if first is None or first.in_channels == default.channels:
        return default
    channels = first.in_channels
    was_training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(2, default.channels, *default.size))
    except Exception:  # noqa: BLE001 - the user's code raises what it likes on inputs that it does not take
        return Preparation.unknown(channels=channels)
    finally:
        model.train(was_training)
    return default


def _attempt(factory: Callable[[], Any], name: str, hint: str) -> Any:
    """Calls other people's code; whatever it raises becomes one sentence."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            return factory()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name} could not be built: {_said(error)}; {hint}") from error


def _optional(package: str) -> ModuleType:
    """An optional package that no extra of ours holds, because only its models are used."""
    try:
        return _import(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtra(f"{package} is needed to open its models; install it with: pip install {package}") from None


def _import(name: str) -> ModuleType:
    """Imports a module that may need torchvision, also where torchvision's compiled operators do not load.

    There torchvision fails to import, because it gives a shape rule to an operator that nobody declared. Classifiers
    never call it, so it and its quantized twin are declared here, without code, and the import is done again.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if _DECLARED or "operator torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
    for loaded in list(sys.modules):
        if loaded.split(".")[0] in ("torchvision", name.split(".")[0]):
            del sys.modules[loaded]  # what the failed import left behind lacks its parent
    return importlib.import_module(name)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:5]
    return f"; near ones are {', '.join(near)}" if near else ""


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
