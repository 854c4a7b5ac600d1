"""How many zeros a network's layers read, and what a kernel that skips them could save at most.

A multiply-add whose activation is zero adds nothing. A kernel can leave it out only in the pieces that it works in, so
zeros are counted three ways: single values, runs of 16 channels at one position (a vector of the layout that CPU
kernels work in), and whole channels that are zero in every sample. ONNX Runtime and OpenVINO skip none of them: there
zeros in activations gain nothing. Channels that are always zero can go for good, with `PruneChannels`, and that gains
everywhere. Kernels that do skip: Kurtz et al., ICML 2020.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from tersenet.bricks.evaluating import evaluating
from tersenet.graph.costs import costs
from tersenet.pruning.activation_sites import READERS
from tersenet.task import Task, to_device

RUN = 16
NOTE = (
    "ONNX Runtime and OpenVINO multiply by zeros like by any other number, so these zeros gain nothing there; "
    "'at most' is for a kernel that skips each of them for free."
)


@dataclass(frozen=True)
class LayerZeros:
    """What one convolution or linear layer reads, over all calls and samples.

    Args:
        path: of the layer.
        zeros: share of the values that are zero.
        runs: share of the runs of 16 channels that are zero, over all positions; fewer channels are one run.
        channels: share of the channels that are zero at every position of every sample.
        macs: multiply-adds of the layer for one sample; 0 when the layer is not called.
        skipped: share of these whose activation is a zero. Padding is not counted as one.
        skipped_in_runs: likewise, in whole runs of 16 channels only.
    """

    path: str
    zeros: float
    runs: float
    channels: float
    macs: int
    skipped: float
    skipped_in_runs: float


def activation_zeros(model: nn.Module, task: Task, samples: int = 256) -> list[LayerZeros]:
    """One row per convolution and linear layer, in the model's order, measured on `task.calibration(samples)`.

    Raises:
        DataError: when there is no calibration data.
        TraceError: when the forward cannot be captured, which counting multiply-adds needs.
    """
    macs: dict[str, int] = {}
    for row in costs(model, task.example):
        macs[row.path] = macs.get(row.path, 0) + row.macs
    tallies = {path: _Tally(layer) for path, layer in model.named_modules() if isinstance(layer, READERS)}
    hooks = [model.get_submodule(path).register_forward_pre_hook(tally.see) for path, tally in tallies.items()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with evaluating(model), torch.no_grad():
            for batch in task.calibration(samples):
                task.run(model, to_device(batch, device))
    finally:
        for handle in hooks:
            handle.remove()
    return [tally.row(path, macs.get(path, 0)) for path, tally in tallies.items() if tally.values]


class _Tally:
    """Sums over the calls of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.values = self.zeros = self.runs = self.zero_runs = 0
        self.work = self.skipped = self.skipped_runs = 0.0
        self.ever: Tensor | None = None

    def see(self, layer: nn.Module, args: tuple[Tensor]) -> None:
        zero = (args[0] == 0).movedim(1, -1) if isinstance(layer, nn.modules.conv._ConvNd) else args[0] == 0  # (..., C)
        used = taps(layer, args[0]).to(zero.device)[..., None]
        padded = F.pad(zero, (0, -zero.shape[-1] % RUN), value=True)
        whole = padded.unflatten(-1, (-1, RUN)).all(dim=-1)  # (..., runs)
        sizes = torch.full((whole.shape[-1],), RUN, device=zero.device)
        sizes[-1] -= padded.shape[-1] - zero.shape[-1]
        self.values += zero.numel()
        self.zeros += int(zero.sum())
        self.runs += whole.numel()
        self.zero_runs += int(whole.sum())
        self.work += float((torch.ones_like(zero, dtype=torch.float32) * used).sum(dtype=torch.float64))
        self.skipped += float((zero * used).sum(dtype=torch.float64))
        self.skipped_runs += float((whole * sizes * used).sum(dtype=torch.float64))
        ever = ~zero.flatten(0, -2).all(dim=0)
        self.ever = ever if self.ever is None else self.ever | ever

    def row(self, path: str, macs: int) -> LayerZeros:
        assert self.ever is not None
        return LayerZeros(
            path,
            zeros=self.zeros / self.values,
            runs=self.zero_runs / self.runs,
            channels=float((~self.ever).double().mean()),
            macs=macs,
            skipped=self.skipped / self.work if self.work else 0.0,
            skipped_in_runs=self.skipped_runs / self.work if self.work else 0.0,
        )


def taps(layer: Any, x: Tensor) -> Tensor:
    """How many output positions use each position of an input, the same for all its channels.

    Args:
        x: (N, C, H, W) for a convolution.
    Returns:
        (H, W), or () where every position is used alike (linear layers) or is taken to be (convolutions of other
        ranks, transposed ones, padding given by name).
    """
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str) or x.dim() != 4:
        return torch.ones(())
    places = torch.ones(1, 1, *x.shape[2:])
    kernel = torch.ones(1, 1, *layer.kernel_size)
    how: Any = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    outputs = F.conv2d(places, kernel, **how)
    return conv2d_input(places.shape, kernel, torch.ones_like(outputs), **how)[0, 0]


def zero_rows(before: Iterable[LayerZeros], after: Iterable[LayerZeros]) -> list[dict[str, Any]]:
    """Plain rows for a table: every layer before and after, then "all layers", which is weighted by multiply-adds.

    Returns:
        layer, macs; zeros_before, zeros_after, runs_after, channels_after (shares); skippable_macs (those whose
        activation is zero now); at_most, how many times faster the layer could be if each of them were skipped for
        free, and at_most_in_runs, if runs of 16 channels were. None where nothing is left to do.
    """
    was = {row.path: row for row in before}
    rows = [(was.get(row.path, row), row) for row in after]
    found = [_plain(row.path, [(old, row)]) for old, row in rows]
    return [*found, _plain("all layers", rows)] if rows else []


def _plain(name: str, rows: list[tuple[LayerZeros, LayerZeros]]) -> dict[str, Any]:
    weights = [new.macs for _, new in rows]
    macs = sum(weights)
    if not macs:  # layers that are not in the graph weigh alike
        weights = [1] * len(rows)
    shares = {
        key: sum(w * asdict(row)[field] for w, row in zip(weights, column, strict=True)) / sum(weights)
        for key, field, column in (
            ("zeros_before", "zeros", [old for old, _ in rows]),
            ("zeros_after", "zeros", [new for _, new in rows]),
            ("runs_after", "runs", [new for _, new in rows]),
            ("channels_after", "channels", [new for _, new in rows]),
            ("skipped", "skipped", [new for _, new in rows]),
            ("in_runs", "skipped_in_runs", [new for _, new in rows]),
        )
    }
    skipped, in_runs = shares.pop("skipped"), shares.pop("in_runs")
    return {
        "layer": name,
        "macs": macs,
        **shares,
        "skippable_macs": round(skipped * macs),
        "at_most": 1 / (1 - skipped) if skipped < 1 else None,
        "at_most_in_runs": 1 / (1 - in_runs) if in_runs < 1 else None,
    }
