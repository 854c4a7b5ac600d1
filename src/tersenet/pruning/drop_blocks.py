"""Leaves whole residual blocks out: depth where width is already at the runtime's grain.

That a residual network bears it: Veit et al., arXiv:1605.06431. Which go: those that change what passes through them
the least, as in ShortGPT (Men et al., arXiv:2403.03853), with a relative distance in place of a cosine. Departure:
the layers that are left make up for the lost blocks by least squares, in pruning/repair.py. A ResNet-56 without 8 of
its blocks scored 45.9 % of 2,048 CIFAR-10 test images, 81.1 % with its norms measured anew, and 90.1 % so repaired
(92.8 % before).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersenet.bricks.evaluating import evaluating
from tersenet.errors import SettingsError
from tersenet.findings import tell
from tersenet.graph.blocks import Blocks, drop, paths_within
from tersenet.graph.calls import is_leaf
from tersenet.graph.surgery import Cut
from tersenet.graph.taken_apart import opened
from tersenet.graph.trace import trace
from tersenet.left_alone import LEFT_OUT, LeftAlone, gathered, weights_of
from tersenet.numerics.divergence import divergence
from tersenet.numerics.samples import Inputs, side_by_side
from tersenet.progress import progressing
from tersenet.pruning.known import known_blocks
from tersenet.pruning.repair import repair
from tersenet.pruning.sound import NOTHING_TO_RECONSTRUCT_ON, UNDONE
from tersenet.step import Plan, Step, replace
from tersenet.task import Task, to_device

# Images on which the change that a block makes is measured.
_MEASURED_ON = 256


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Step):
    """Replaces residual blocks by what their shortcut does.

    A block serves when it is a module x -> act(x + f(x)) whose shortcut keeps the shape; so the first block of a stage
    usually does not. Graphs without modules, such as a loaded .pt2 file, have no blocks.

    Args:
        blocks: paths of the blocks to drop.
        count: in place of `blocks`, how many to drop, the least important first. Importance is the relative size of
            what a block adds, ||block(x) - shortcut(x)|| / ||x|| on 256 calibration images; without data, the size of
            the block's norm scales, or of its weights where it has no norms.
        refit: repair the layers that are left by least squares, and their norms, on up to 512 calibration images.
        only: drop only blocks that match: paths or types of blocks, such as "layer3.*" or "Bottleneck".
        skip: drop no block that matches.
    """

    family: ClassVar[str] = "prune"
    summary: ClassVar[str] = "leaves out whole residual blocks, the least important first"
    serves: ClassVar[tuple[str, ...]] = ("residual block",)
    several_inputs: ClassVar[bool] = True
    naming: ClassVar[tuple[str, ...]] = ("only", "skip", "blocks")

    blocks: tuple[str, ...] = ()
    count: int = 0
    refit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.blocks, str):
            raise SettingsError(f"blocks must be a list of paths, got {self.blocks!r}; write blocks: [{self.blocks}]")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.count < 0:
            raise SettingsError(f"count must be at least 0, got {self.count}; it is the number of blocks to drop")
        if self.blocks and self.count:
            raise SettingsError(f"blocks names {len(self.blocks)} and count is {self.count}; give one of the two")

    def can_name(self, module: nn.Module) -> bool:
        return True  # blocks hold layers

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """{"dropped": [paths], "activations": {path: what stays of it}}; see graph/blocks.py.

        Raises:
            SettingsError: on a block that cannot be dropped, or more blocks than there are.
        """
        if not self.blocks and not self.count:
            return {}
        known = known_blocks(model, task.example)
        allowed = [path for path in known.found if self.matches(path, model.get_submodule(path))]
        if self.blocks:
            for path in self.blocks:
                if path not in known.found:
                    raise SettingsError(_refusal(path, known))
            dropped = [path for path in allowed if path in self.blocks]
        else:
            if allowed and self.count > len(allowed):
                raise SettingsError(
                    f"count is {self.count}, but only {len(allowed)} blocks can be dropped: {_listed(allowed)}"
                )
            scores = importance(model, {path: known.found[path] for path in allowed}, task)
            least = sorted(allowed, key=lambda path: scores[path])[: self.count]
            dropped = [path for path in allowed if path in least]
        stays = {path: known.found[path] for path in dropped if known.found[path] is not None}
        return {"dropped": dropped, "activations": stays} if dropped else {}

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        """What lies in no block that can be dropped, by the block or the layer that it is."""
        if not self.blocks and not self.count:
            return None
        known = known_blocks(model, task.example)
        sizes: dict[str, int] = {}
        found: dict[str, str] = {}
        for path, size in weights_of(model).items():
            parts = path.split(".")
            around = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
            block = next((outer for outer in around if outer in known.found), None)
            at = block or (around[0] if around else path)
            sizes[at] = sizes.get(at, 0) + size
            if block is not None and not self.matches(block, model.get_submodule(block)):
                found[at] = LEFT_OUT
            elif block is None:
                found[at] = (
                    f"are no such blocks: {known.refused[at]}" if around and at in known.refused else "are in no block"
                )
        return gathered(sizes, found)

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Raises SurgeryError when the plan is another model's; the model is then as it was."""
        return drop(model, {path: plan["activations"].get(path) for path in plan["dropped"]}) if plan else model

    def fit(self, model: nn.Module, task: Task) -> None:
        """Repairs a model that has just lost blocks; without calibration data nothing happens.

        Least squares need the model as it was, which is `task.original` in `run`. Where the original is another one, or
        the model was changed since, only the norms behind the lost blocks are measured; without original, all norms.
        """
        if not self.refit or not (self.blocks or self.count):
            return
        if not task.has_inputs:
            tell([NOTHING_TO_RECONSTRUCT_ON], task.quiet)
            return
        kept: Cut = {}
        if task.original is not None:
            behind = _first_behind(task.original, model, task.example)
            if behind is None:
                return
            kept = {behind: {"in": []}}  # nothing of it was cut, but from there on inputs are others
        images = task.inputs_like(model, 512)
        if task.original is not None and _same_numbers(model, task.original):
            if not repair(model, images, task.original, {}):
                tell([UNDONE], task.quiet)
        else:
            repair(model, images, None, kept)

    def run(self, model: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
        """plan, apply and fit, where `fit` compares with the model as it comes in."""
        model = opened(model, task.example)
        return super().run(model, dataclasses.replace(task, original=copy.deepcopy(model)))

    def choices(self, model: nn.Module, task: Task) -> dict[str, list[Any]]:
        """Block path -> "keep" or "drop"."""
        known = known_blocks(model, task.example)
        return {path: ["keep", "drop"] for path in known.found if self.matches(path, model.get_submodule(path))}

    def sensitivities(self, model: nn.Module, task: Task, images: Inputs) -> dict[str, dict[Any, float]]:
        """path -> {"keep": 0, "drop": divergence of the outputs without the block}; every norm takes the statistics of
        these images, which stands for the repair of what comes behind."""
        known = known_blocks(model, task.example).found
        twin = copy.deepcopy(model).eval()
        for norm in (m for m in twin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.training, norm.momentum = True, 0.0  # its own statistics are used, and not kept
        with torch.no_grad():
            wanted = model(*side_by_side(images))
            found = {}
            paths = self.choices(model, task)
            with progressing(f"sensitivities of {self.name}", len(paths), not task.quiet) as advance:
                for path in paths:
                    block = twin.get_submodule(path)
                    drop(twin, {path: known[path]})
                    found[path] = {"keep": 0.0, "drop": divergence(wanted, twin(*side_by_side(images)))}
                    replace(twin, {path: block})
                    advance(1)
        return found

    def chosen(self, picked: Mapping[str, Any]) -> Step | None:
        """Raises SettingsError on a choice that there is not."""
        for path, choice in picked.items():
            if choice not in ("keep", "drop"):
                raise SettingsError(f"the choice for block {path} is {choice!r}; allowed: keep, drop")
        dropped = tuple(path for path, choice in picked.items() if choice == "drop")
        return dataclasses.replace(self, blocks=dropped, count=0) if dropped else None


def importance(model: nn.Module, blocks: Mapping[str, Any], task: Task) -> dict[str, float]:
    """path -> how much a block changes what passes through it; see `DropBlocks.count`.

    Args:
        blocks: as in `Blocks.found`.
    """
    if not task.has_inputs:
        return {path: _weight_size(model.get_submodule(path)) for path in blocks}
    twin = drop(copy.deepcopy(model), blocks)
    shortcuts = {path: twin.get_submodule(path) for path in blocks}
    sums = {path: torch.zeros(2, dtype=torch.float64) for path in blocks}
    inputs: dict[str, Tensor] = {}

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            inputs[path] = args[0].clone()  # a block may add to its input in place

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            value = inputs.pop(path)
            added = (output - shortcuts[path](value)).square().sum()
            sums[path] += torch.stack([added, value.square().sum()]).double().cpu()

        return hook

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    hooks = []
    try:
        for path in blocks:
            hooks.append(model.get_submodule(path).register_forward_pre_hook(before(path)))
            hooks.append(model.get_submodule(path).register_forward_hook(after(path)))
        with evaluating(model), evaluating(twin), torch.no_grad():
            for batch in task.calibration(_MEASURED_ON):
                task.run(model, to_device(batch, device))
    finally:
        for handle in hooks:
            handle.remove()
    return {path: float((added / value.clamp(min=1e-30)) ** 0.5) for path, (added, value) in sums.items()}


def _weight_size(block: nn.Module) -> float:
    """Root mean square of the scales of a block's norms and layers, else of all its weights.

    In front of a norm the size of a convolution's weights says nothing, the norm's scale does.
    """
    scales = [p for name, p in block.named_parameters() if p.dim() == 1 and not name.endswith("bias")]
    chosen = scales or list(block.parameters())
    return float(torch.cat([p.detach().flatten() for p in chosen]).double().square().mean().sqrt())


def _first_behind(original: nn.Module, model: nn.Module, example: Inputs) -> str | None:
    """The first layer that is called behind a block which the model lost; None where there is no such layer."""
    now = dict(model.named_modules())
    lost = [
        path for path, module in original.named_modules() if not is_leaf(module) and path in now and is_leaf(now[path])
    ]
    seen = False
    for node in trace(original, example).graph.nodes:
        within = bool(paths_within([str(node.target)], lost))
        if seen and node.op == "call_module" and not within:
            return str(node.target)
        seen = seen or within
    return None


def _same_numbers(model: nn.Module, original: nn.Module) -> bool:
    """Whether all that is left of the original has the numbers that it had."""
    was = original.state_dict()
    return all(
        key not in was or (value.shape == was[key].shape and torch.equal(value, was[key].to(value.device)))
        for key, value in model.state_dict().items()
    )


def _refusal(path: str, known: Blocks) -> str:
    reason = known.refused.get(path, "there is no such module")
    return f"block {path!r} cannot be dropped: {reason}; blocks that can: {_listed(known.found)}"


def _listed(paths: Iterable[str]) -> str:
    paths = list(paths)
    more = f" and {len(paths) - 30} more" if len(paths) > 30 else ""
    return (", ".join(paths[:30]) or "none") + more
