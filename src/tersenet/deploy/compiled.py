"""A module through `torch.compile` (Inductor), as the runtime "pytorch-compiled".

Compiling happens at the first call with a new batch and takes seconds to minutes, so it shows in the time of the first
call and not in that of loading. It needs a C++ compiler.

An int8 model from a .terse file is rewritten in PyTorch's operators of quantization, for which Inductor has integer
kernels (oneDNN's) on x86 CPUs. A .pt2 file is plain arithmetic by then, so there it is the simulation that is compiled:
equal outputs, and no faster for being quantized.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config

from tersenet.compiler import need_compiler
from tersenet.deploy.decomposed import INDUCTOR, decomposed, rounds_activations
from tersenet.deploy.made_inputs import made_example


def compiled(path: Path, model: Any) -> Any:
    """The module, compiled at its first call for its input's shape.

    Raises:
        SettingsError: where there is no C++ compiler.
    """
    need_compiler(f"pytorch-compiled cannot run {path.name}")
    model.requires_grad_(False)
    if not hasattr(model, "inputs") or not rounds_activations(model):
        return torch.compile(model, dynamic=False)
    graph = decomposed(model, made_example(model, path.name), INDUCTOR).requires_grad_(False)
    return _Frozen(torch.compile(graph, dynamic=False))


class _Frozen(nn.Module):
    """Compiles with weights as constants, without which Inductor takes no integer kernels.

    Inductor's `options` for one model do not reach the part that makes constants, so its global setting is on while a
    new shape is compiled.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.seen = model, set[tuple[torch.Size, ...]]()

    def forward(self, *inputs: Tensor) -> Any:
        shapes = tuple(x.shape for x in inputs)
        if shapes in self.seen:
            return self.model(*inputs)
        with config.patch(freezing=True):
            y = self.model(*inputs)
        self.seen.add(shapes)
        return y
