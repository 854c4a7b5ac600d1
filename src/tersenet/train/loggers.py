"""Where the curves of a training go: Fabric's CSV and TensorBoard loggers; MLflow and Weights & Biases in its form."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_fabric.loggers import CSVLogger, TensorBoardLogger
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.utilities.rank_zero import rank_zero_only

from tersenet.errors import MissingExtra

_PACKAGE = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}


def make_loggers(kind: str, folder: Path | None) -> list[Logger]:
    """The logger of a setting, in a list that is empty for "none" and for files without a folder to put them.

    Args:
        kind: csv, tensorboard, mlflow, wandb or none.
        folder: the task's folder; files go to `logs` in it, a new version each time the training is taken up.
    Raises:
        MissingExtra: when the package is not installed.
    """
    if kind == "mlflow":
        return [MlflowLogger(_package(kind, "MLflow"))]
    if kind == "wandb":
        return [WandbLogger(_package(kind, "Weights & Biases"), folder)]
    if kind == "none" or folder is None:
        return []
    if kind == "tensorboard":
        _package(kind, "TensorBoard")
        return [TensorBoardLogger(folder, name="logs")]
    return [CSVLogger(folder, name="logs")]


class MlflowLogger(Logger):
    """Metrics to the MLflow run that is active, else to a new one (MLFLOW_TRACKING_URI says where)."""

    def __init__(self, mlflow: ModuleType) -> None:
        super().__init__()
        self._mlflow, self._opened = mlflow, False

    @property
    def name(self) -> str:
        return "tersenet"

    @property
    def version(self) -> str | None:
        run = self._mlflow.active_run()
        return run.info.run_id if run is not None else None

    def _open(self) -> None:
        if self._mlflow.active_run() is None:
            self._mlflow.start_run()
            self._opened = True

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._open()
        self._mlflow.log_metrics({key: float(value) for key, value in metrics.items()}, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._open()
        self._mlflow.log_params(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._opened:
            self._mlflow.end_run("FINISHED" if status == "success" else "FAILED")
            self._opened = False


class WandbLogger(Logger):
    """Metrics to the Weights & Biases run that is active, else to a new one in the project "tersenet"."""

    def __init__(self, wandb: ModuleType, folder: Path | None) -> None:
        super().__init__()
        self._wandb, self._folder, self._opened = wandb, folder, False

    @property
    def name(self) -> str:
        return "tersenet"

    @property
    def version(self) -> str | None:
        return self._wandb.run.id if self._wandb.run is not None else None

    def _open(self) -> Any:
        if self._wandb.run is None:
            self._wandb.init(project="tersenet", dir=None if self._folder is None else str(self._folder))
            self._opened = True
        return self._wandb.run

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._open().log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._open().config.update(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._opened:
            self._wandb.finish(exit_code=0 if status == "success" else 1)
            self._opened = False


def _package(kind: str, spoken: str) -> ModuleType:
    try:
        return importlib.import_module(_PACKAGE[kind])
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{_PACKAGE[kind]} is needed to log to {spoken}; install it with: pip install {_PACKAGE[kind]}, "
            "or set logger: csv"
        ) from error
