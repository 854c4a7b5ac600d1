"""Opens a model that is named by one string: ours, timm's, torchvision's, or made by the user's own code.

Files (.pt2, .terse) are opened by `tersenet.open_model`, which calls this for everything else.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tersenet import models
from tersenet.errors import MissingExtra, ModelError
from tersenet.models.weights import load_weights
from tersenet.task import Preparation

FORMS = "a name such as resnet56, timm:NAME, torchvision:NAME, package.module:factory, FILE.pt2 or FILE.terse"
_NETWORK = "check the name; the weights of a tag are downloaded, so for those check the network too"
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
    family, colon, name = spec.partition(":")
    if spec in models.REFERENCES:
        model, preparation = models.build(spec), models.reference(spec).preparation
    elif family == "timm" and colon:
        model, preparation = _from_timm(name, pretrained="." in name and weights is None)
    elif family == "torchvision" and colon:
        model, preparation = _from_torchvision(name, pretrained="." in name and weights is None)
    elif Path(spec).suffix and (os.sep in spec or Path(spec).exists() or not colon):
        raise ModelError(f"{spec} is not a kind of file that a model can be read from; a model is {FORMS}")
    elif family and name:
        model, preparation = _from_user(family, name)
    else:
        near = difflib.get_close_matches(spec, models.REFERENCES, n=3)
        names = f"near names are {', '.join(near)}" if near else f"the known names are {', '.join(models.REFERENCES)}"
        raise ModelError(f"there is no model {spec!r}; a model is {FORMS}; {names}")
    if weights is not None:
        load_weights(model, weights)
    return model, preparation


def _from_timm(name: str, pretrained: bool) -> tuple[nn.Module, Preparation]:
    timm = _optional("timm")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise ModelError(f"timm has no model {architecture!r}{_near(architecture, timm.list_models())}")
    model = _attempt(lambda: timm.create_model(name, pretrained=pretrained), f"timm:{name}", _NETWORK)
    config = timm.data.resolve_model_data_config(model)
    size: Any = tuple(config["input_size"][1:])
    return model, Preparation(size, tuple(config["mean"]), tuple(config["std"]))


def _from_torchvision(name: str, pretrained: bool) -> tuple[nn.Module, Preparation]:
    torchvision = _optional("torchvision")
    architecture, _, tag = name.partition(".")
    known = torchvision.models.list_models()
    if architecture not in known:
        raise ModelError(f"torchvision has no model {architecture!r}{_near(architecture, known)}")
    published = torchvision.models.get_model_weights(architecture)
    tags = ["DEFAULT", *(member.name for member in published)]
    if tag and tag not in tags:
        raise ModelError(f"torchvision's {architecture} has no weights {tag!r}; its tags are {', '.join(tags)}")
    chosen = published[tag] if pretrained else None
    model = _attempt(
        lambda: torchvision.models.get_model(architecture, weights=chosen), f"torchvision:{name}", _NETWORK
    )
    preset = published.DEFAULT.transforms() if chosen is None else chosen.transforms()
    crop = getattr(preset, "crop_size", None) or models.IMAGENET.size
    fixed = getattr(model, "image_size", None)  # a vision transformer takes no other, whatever its best weights took
    if isinstance(fixed, int):
        crop = (fixed,)
    return model, Preparation(
        (crop[0], crop[-1]),  # one number means a square
        tuple(getattr(preset, "mean", models.IMAGENET.mean)),
        tuple(getattr(preset, "std", models.IMAGENET.std)),
        tuple(chosen.meta.get("categories", ())) if chosen is not None else (),
    )


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
    own = getattr(made, "preparation", None)
    return made, own if isinstance(own, Preparation) else Preparation()


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
