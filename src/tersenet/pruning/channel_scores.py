"""Importances of channels by name: each scores the channels of every bundle, from weights, activations or gradients.

| name | what a channel counts as | data | compared between layers |
|---|---|---|---|
| l1, l2 | size of its weights in all layers it lives in | | relative to the layer's mean |
| lamp | l2 over the sum of those that are not smaller | | as it is |
| fpgm | distance of its filter from all others | | relative |
| batch_norm | size of the norm's scale | | as it is |
| activation | mean size of what other layers read | inputs | relative |
| zeros | share of what they read that is not zero (1 - APoZ) | inputs | as it is |
| weighted, product | incoming weights and activations, each relative | inputs | as it is |
| gradient | mean size of the gradients of its weights | loss | relative |
| taylor | mean size of the first-order change of the loss | loss | as it is |
| fisher | second-order change of the loss, diagonal Fisher | loss | as it is |
| obd | the same, weight by weight | loss | as it is |
| obs | second-order change once the layer's other channels make up for it | loss | as it is |
| thinet | what it adds to the layers that read it, greedily | inputs | relative |
| lasso | strength of the LASSO that lets it in | inputs | relative |
| reconstruction | what those layers lose once they make up for it | inputs | relative |
| random | nothing, the control | | relative |

The papers are named where the formulas are: numerics/saliency.py, channel_saliency.py, lasso.py, elimination.py. Where
an importance says nothing about a bundle (no norm, no layer that reads it alone), l2 serves, scaled to the mean of the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tersenet.numerics import channel_saliency as channels
from tersenet.pruning import by_data, by_weights
from tersenet.pruning.subject import Ranked, Subject

SCORES: dict[str, Callable[[Subject], Sequence[Any]]] = {
    "l1": lambda subject: by_weights.sizes(subject, 1),
    "l2": lambda subject: by_weights.sizes(subject, 2),
    "lamp": by_weights.lamp,
    "fpgm": by_weights.fpgm,
    "batch_norm": by_weights.batch_norm,
    "activation": by_data.activation,
    "zeros": by_data.zeros,
    "weighted": by_data.weighted,
    "product": by_data.product,
    "gradient": by_data.gradient,
    "taylor": by_data.taylor,
    "fisher": by_data.fisher,
    "obd": by_data.obd,
    "obs": by_data.obs,
    "thinet": by_data.thinet,
    "lasso": by_data.lasso,
    "reconstruction": by_data.reconstruction,
    "random": by_weights.random,
}
FROM_WEIGHTS = ("l1", "l2", "lamp", "fpgm", "batch_norm", "random")
RELATIVE = ("l1", "l2", "fpgm", "activation", "gradient", "thinet", "lasso", "reconstruction", "random")


def ranked(subject: Subject, importance: str) -> list[Ranked]:
    """Order and scores of the channels of each bundle.

    Raises:
        DataError: without the data that the importance needs.
    """
    found = SCORES[importance](subject)
    if any(entry is None for entry in found):
        means = [float(entry[1].mean()) for entry in found if entry is not None]
        scale = float(np.mean(means)) if means and importance not in RELATIVE else 1.0
        stand_in = [(order, channels.relative(scores) * scale) for order, scores in by_weights.sizes(subject, 2)]
        found = [other if entry is None else entry for entry, other in zip(found, stand_in, strict=True)]
    return [
        (order, channels.relative(scores) if importance in RELATIVE else scores)
        for order, scores in (entry for entry in found if entry is not None)
    ]
