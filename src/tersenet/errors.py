"""Every error that tersenet raises on purpose, and its warnings.

TersenetError
├── SettingsError     a setting outside what is allowed
├── RecipeError       a recipe that cannot be read: unknown step, unknown field, wrong shape
├── DataError         data that is missing, empty, corrupt or out of range
├── ModelError        a model or its weights that cannot be used
│   └── TraceError    a forward that cannot be captured as a graph
├── SurgeryError      a cut that would break the model; the model is as it was
├── FileError         a file of ours that is damaged, truncated or hostile
├── RunError          a run folder that cannot be continued
├── ExportError       a file that could not be written, or does not agree with the model
└── MissingExtra      an optional package that is not installed

A message says, in this order: what was wrong, the value, what is allowed, what to do; in one sentence, because the
command line prints it as it is.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class TersenetError(Exception):
    """Base of every error that tersenet raises on purpose."""


class SettingsError(TersenetError, ValueError):
    """A setting has a value that is not allowed."""


class RecipeError(TersenetError, ValueError):
    """A recipe cannot be read."""


class DataError(TersenetError, ValueError):
    """Data is missing, empty, corrupt or out of range."""


class ModelError(TersenetError, ValueError):
    """A model, or the weights for it, cannot be used."""


class TraceError(ModelError):
    """A model's forward cannot be captured as a graph."""


class SurgeryError(TersenetError):
    """A cut would break the model, so it was not made."""


class FileError(TersenetError):
    """A file of ours is damaged, truncated or not what it says it is."""


class RunError(TersenetError):
    """A run folder cannot be continued."""


class ExportError(TersenetError):
    """A file for a runtime could not be written, or does not agree with the model."""


class MissingExtra(TersenetError, ImportError):
    """An optional package is needed and not installed."""


class MadePermanent(UserWarning):
    """What was computed before each call of a layer is computed once, and stays."""


class NoEffect(UserWarning):
    """A step matched nothing and left the model as it was."""


class InputWarning(UserWarning):
    """A model, weights or data are used in a way that the user should know of."""


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Imports an optional package, or says how to install it.

    Args:
        package: the module to import, such as "onnxruntime".
        extra: the extra of tersenet that holds it, such as "onnx".
        purpose: what it is needed for, as the end of "X is needed to ...".
    Raises:
        MissingExtra: when the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != package.split(".")[0]:
            raise
        raise MissingExtra(
            f'{package} is needed to {purpose}; install it with: pip install "tersenet[{extra}]"'
        ) from None
