"""A file in place of its model: called with tensors, it gives what the model gives, in the same tuples and dicts."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from tersenet.deploy.runner import Runner, as_array
from tersenet.errors import DataError, FileError
from tersenet.graph.outputs import OUTPUTS, assemble


class StandIn:
    """What a task's forward may call as it calls the model.

    The structure of the outputs is what the file says (metadata tersenet.outputs); of other files several outputs are a
    tuple, and a single one stands alone.
    """

    training = False

    def __init__(self, runner: Runner) -> None:
        said = runner.metadata.get(OUTPUTS)
        try:
            self.structure = None if said is None else json.loads(said)
        except ValueError as error:
            raise FileError(f"{runner.name} is damaged: its {OUTPUTS} is no JSON; export it again") from error
        self.runner = runner

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Raises DataError on inputs that do not fit the file."""
        names = [each.name for each in self.runner.inputs[len(args) :]]
        if kwargs and set(kwargs) != set(names):
            raise DataError(
                f"{self.runner.name} takes {', '.join(names) or 'no input by name'}, got {', '.join(kwargs)}; "
                "call the model with the names of its forward"
            )
        tensors = [*args, *(kwargs[name] for name in names if kwargs)]
        outputs = [torch.from_numpy(each) for each in self.runner.outputs([as_array(x) for x in tensors])]
        if self.structure is None:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        try:
            return assemble(self.structure, outputs)
        except ValueError as error:
            raise FileError(f"{self.runner.name} is damaged: {error}; export it again") from error

    def eval(self) -> StandIn:
        """Itself: a file has no other mode."""
        return self
