"""Puts a repair back that took the outputs further away than what it was to repair.

Least squares on calibration inputs can blow up what they did not see, as in a network whose norms do not fit what they
read: norms that saw hardly any variance enlarge what is new to them. So the outputs are compared on a few of the inputs
and on noise of their range.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tersenet.numerics.samples import Inputs, first

# Said where nothing was changed in the end.
UNDONE = (
    "the repair took the outputs further away than the cut did, as in a network whose norms do not fit what they read; "
    "it was undone, so train afterwards"
)
# Said where the settings leave it to the data, and there are none.
NOTHING_TO_RECONSTRUCT_ON = (
    "there are no calibration inputs to reconstruct the layers on, so what stays is as it was; give some, which need "
    "no labels, or refit: false"
)
# A repair that leaves an error so many times that of the cut, and of giving nothing but zeros, has blown up.
_BLOWN_UP, _LOOKED_AT = 100.0, 8


class Soundness:
    """What a model gave before it was cut, for telling whether a repair blew up.

    Args:
        before: the model before the cut, in evaluation mode; None trusts a repair that ends.
        images: (N, ...), or a tuple of all inputs.
    """

    def __init__(self, before: nn.Module | None, images: Inputs) -> None:
        self.inputs = tuple(torch.cat([x, _noise_like(x)]) for x in first(images, _LOOKED_AT))
        self.wanted = None if before is None else _outputs_of(before, self.inputs)

    def kept(self, model: nn.Module, repair: Callable[[], object]) -> bool:
        """Repairs a cut model in evaluation mode, or leaves it as it is: whether the repair was kept."""
        state = {name: value.clone() for name, value in model.state_dict().items()}
        cut = None if self.wanted is None else _outputs_of(model, self.inputs)
        try:
            repair()
            blown = self.wanted is not None and cut is not None and self._blew_up(model, self.wanted, cut)
        except torch.linalg.LinAlgError:  # of values that are not finite any more
            blown = True
        if blown:
            model.load_state_dict(state)
        return not blown

    def _blew_up(self, model: nn.Module, wanted: Tensor, cut: Tensor) -> bool:
        """Whether the outputs of the repaired model are far worse than those of the cut one, or no numbers."""
        error = (_outputs_of(model, self.inputs) - wanted).square().mean()
        least = torch.maximum((cut - wanted).square().mean(), wanted.square().mean())
        return not bool(error <= _BLOWN_UP * least) and bool(least.isfinite())


def _noise_like(x: Tensor) -> Tensor:
    """Noise between the lowest and the highest value; of integers the samples in another order."""
    if not x.is_floating_point():
        return x.flip(0)
    low, high = x.amin(), x.amax()
    return low + (high - low) * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def _outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """All outputs that are floats, flat."""
    found = torch.utils._pytree.tree_leaves(model(*inputs))
    return torch.cat(
        [torch.zeros(0), *(x.float().cpu().flatten() for x in found if isinstance(x, Tensor) and x.is_floating_point())]
    )
