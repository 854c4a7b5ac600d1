"""What every module of ours can do: say how it is built, so that a file can rebuild it without the model's class."""

from __future__ import annotations

from typing import Any

from torch import nn


class Brick(nn.Module):
    """A module that a method puts into a model. The graph treats a brick as one node, whatever it does inside."""

    def config(self) -> dict[str, Any]:
        """The arguments that build an empty brick of the same shape: `type(brick)(**brick.config())`. JSON only."""
        raise TypeError(f"{type(self).__name__} does not say its config; every brick must")
