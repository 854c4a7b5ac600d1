"""What a step could not touch, as a share and with the reasons, in the model's own names.

Whoever runs steps listens, and hears it from every step that runs inside; what a step only tries is not said. Without a
listener it goes to the log "tersenet", at the level of information.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from tersenet.named import holds_layers, type_of

LOG = logging.getLogger("tersenet")
LEFT_OUT = "are left out by only or skip"
REASONS = 3  # lines of reasons in a terminal
WIDTH = 74  # of such a line; commands indent it
SHOWN = 5  # layers that are named where all of them would be too many
SILENT = ()  # nobody hears of a step, and the log neither
HEARD: ContextVar[list[tuple[str, LeftAlone]] | tuple[()] | None] = ContextVar("heard of steps", default=None)


@dataclass(frozen=True)
class Reason:
    """Why some layers were left alone.

    Args:
        why: as it ends "these layers were left alone: they ...".
        layers: their paths, in the model's order.
        share: what they are of everything that is counted, 0 to 1.
    """

    why: str
    layers: tuple[str, ...]
    share: float

    def to_json(self) -> dict[str, Any]:
        return {"why": self.why, "layers": list(self.layers), "share": self.share}


@dataclass(frozen=True)
class LeftAlone:
    """What one step left alone.

    Args:
        of: what is counted, such as "weights".
        share: of all reasons together, 0 to 1.
        reasons: the largest share first.
        advice: what would touch more; empty where nothing would.
    """

    of: str
    share: float
    reasons: tuple[Reason, ...]
    advice: str = ""

    def to_json(self, step: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "step": step, "of": self.of, "share": self.share, "reasons": [each.to_json() for each in self.reasons]
        }  # fmt: skip
        return {**found, "advice": self.advice} if self.advice else found

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> LeftAlone:
        """The inverse of `to_json`."""
        reasons = [Reason(each["why"], tuple(each["layers"]), each["share"]) for each in data["reasons"]]
        return cls(data["of"], data["share"], tuple(reasons), data.get("advice", ""))


def gathered(
    sizes: Mapping[str, int],
    why: Mapping[str, str | Sequence[tuple[str, float]]],
    of: str = "weights",
    advice: str = "",
) -> LeftAlone | None:
    """What was left alone, by reason; None where nothing was.

    Args:
        sizes: path -> how much of what is counted a layer has.
        why: path -> the reason, or (reason, share of the layer) for each part of it.
    """
    total = sum(sizes.values())
    parts: dict[str, dict[str, float]] = {}
    for path in (path for path in sizes if path in why):
        found = why[path]
        for reason, share in ((found, 1.0),) if isinstance(found, str) else found:
            parts.setdefault(reason, {})[path] = share * sizes[path] / max(total, 1)
    reasons = [Reason(reason, tuple(here), sum(here.values())) for reason, here in parts.items()]
    if not reasons:
        return None
    reasons.sort(key=lambda each: -each.share)
    return LeftAlone(of, min(1.0, sum(each.share for each in reasons)), tuple(reasons), advice)


def weights_of(model: nn.Module) -> dict[str, int]:
    """Path of a layer -> how many weights it has: numbers of matrices and kernels, not biases and scales. A parameter
    of a module that holds layers stands for itself; what several layers share counts at the first."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        owner = re.sub(r"(^|\.)parametrizations\..*$", "", path)
        integers = [(name, value) for name, value in module.named_buffers(recurse=False) if name == "weight"]
        for name, value in (*module.named_parameters(recurse=False), *integers):
            if value.dim() < 2 or id(value) in seen:
                continue
            seen.add(id(value))
            key = ".".join(filter(None, (path, name))) if owner == path and holds_layers(module) else owner
            found[key] = found.get(key, 0) + value.numel()
    return found


def by_layer(model: nn.Module, why: Callable[[str, nn.Module], str | None], advice: str = "") -> LeftAlone | None:
    """What was left alone of the layers with weights.

    Args:
        why: (path, layer) -> the reason, or None for a layer that was touched.
    """
    modules, sizes = dict(model.named_modules()), weights_of(model)
    found: dict[str, str] = {}
    for path in sizes:
        module = modules.get(path)
        plain = type(module) in (type(None), nn.Module)  # an nn.Module is what an import hangs its constants on
        reason = "are parameters outside of layers" if plain else why(path, modules[path])
        if reason is not None:
            found[path] = reason
    return gathered(sizes, found, advice=advice)


def another_kind(module: nn.Module) -> str:
    """The reason of a step that serves convolutions and linear layers."""
    return f"are no convolutions or linear layers, but {type_of(module)}"


def lines(of: LeftAlone) -> list[str]:
    """A headline, then the largest reasons and the advice, a line each."""
    head = f"left alone: {share_text(of.share)} of the {of.of}"
    shown = [_fitting(f"  {share_text(each.share)} {each.why}: ", each.layers) for each in of.reasons[:REASONS]]
    more = len(of.reasons) - REASONS
    rest = [f"  and {more} more reason{'s' if more > 1 else ''}"] if more > 0 else []
    return [head, *shown, *rest, *([f"  {of.advice}"] if of.advice else [])]


def _fitting(text: str, layers: Sequence[str]) -> str:
    """With as many layers as a line has room for, at least one."""
    found = [text + some(layers, count) for count in range(SHOWN, 0, -1)]
    return next((line for line in found if len(line) <= WIDTH), found[-1])


def share_text(share: float) -> str:
    """
    >>> share_text(0.125), share_text(0.0004), share_text(1.0), share_text(0.0)
    ('12.5 %', 'under 0.1 %', '100 %', '0 %')
    """
    if 0 < share < 0.001:
        return "under 0.1 %"
    return f"{100 * share:.0f} %" if share == 0 or share > 0.9995 else f"{100 * share:.1f} %"


def some(layers: Sequence[str], count: int = SHOWN) -> str:
    """
    >>> some(["a", "b", "c"], 2)
    'a, b + 1 more'
    """
    more = f" + {len(layers) - count} more" if len(layers) > count else ""
    return ", ".join(path or "the model" for path in layers[:count]) + more


@contextlib.contextmanager
def listening() -> Iterator[list[tuple[str, LeftAlone]]]:
    """(name of a step, what it left alone) of all that run while it is open, in order."""
    found: list[tuple[str, LeftAlone]] = []
    token = HEARD.set(found)
    try:
        yield found
    finally:
        HEARD.reset(token)


@contextlib.contextmanager
def trying() -> Iterator[None]:
    """Nobody hears of what runs while it is open."""
    token = HEARD.set(SILENT)
    try:
        yield
    finally:
        HEARD.reset(token)


def tell(step: str, of: LeftAlone) -> None:
    """Says what a step left alone to whoever listens, else to the log."""
    heard = HEARD.get()
    if isinstance(heard, list):
        heard.append((step, of))
    elif heard is None:
        LOG.info("%s %s", step, "\n".join(lines(of)))
