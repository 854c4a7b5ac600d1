"""The training loop, on Lightning Fabric: CPU, one GPU or several processes by the same lines."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from tersenet.errors import DataError, ModelError, SettingsError, TersenetError
from tersenet.findings import tell
from tersenet.task import Task, batch_target, default_loss, to_device
from tersenet.train.batches import channels_last, check_labels, count_batches, samples_of, split, training_data
from tersenet.train.better import Standing, is_worse, said, standing
from tersenet.train.chance import chance_kept, reseed, seeded_batches
from tersenet.train.checkpoint import Checkpoint, fingerprint, numbers_of, put_numbers
from tersenet.train.compiled import while_compiled
from tersenet.train.depthwise import faster_depthwise
from tersenet.train.estimate import Estimate
from tersenet.train.loggers import make_loggers
from tersenet.train.precision import FLOAT, Chosen, faster, for_device, unsaid
from tersenet.train.progress import Display, Meter
from tersenet.train.schedule import learning_rate, make_optimizer

if TYPE_CHECKING:
    from tersenet.train.train import Train

# How many batches a GPU may run ahead before their losses are fetched and looked at.
_AHEAD = 16
# Batches between two rows in the log.
_LOG_EVERY = 50


def train(settings: Train, model: nn.Module, task: Task) -> None:
    """See `Train.fit`."""
    settings = dataclasses.replace(settings, companions=tuple(each.opened(task) for each in settings.companions))
    data = training_data(settings, task)
    batches = count_batches(data)
    folder = None if task.folder is None else Path(task.folder)
    checkpoint = None if folder is None else Checkpoint(folder, fingerprint(settings, model, task, batches))
    state = None if checkpoint is None else checkpoint.read()
    chosen = _precision(settings, model, task, data, batches, state)
    with unsaid():
        fabric = Fabric(
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy=settings.strategy,
            precision=chosen.precision,
            loggers=make_loggers(settings.logger, folder),
        )
    fabric.launch()
    judged = settings.keep == "better" and not any(companion.trades for companion in settings.companions)
    before = (
        standing(model, task, settings.label_weight > 0) if judged and (state is None or "position" in state) else None
    )
    started_with = None if before is None else copy.deepcopy(numbers_of(model))
    if state is not None:
        put_numbers(model, state)
        if "position" not in state:
            model.eval()
            return
    fabric.barrier()  # nobody writes before everybody has read
    with chance_kept(fabric.device), _chosen(settings, model), _placed(settings, model):
        settings = dataclasses.replace(settings, companions=tuple(each.placed(task) for each in settings.companions))
        training = _Training(settings, model, task, fabric, batches, checkpoint)
        training.announce(chosen)
        if state is not None:
            training.load(state)
        status = "failed"
        try:
            with while_compiled(model, settings.compile):
                training.run(data)
            status = "success"
        finally:
            for logger in fabric.loggers:
                logger.finalize(status)
        if before is not None and started_with is not None:
            _keep_better(settings, model, task, before, started_with, fabric.is_global_zero)
        if checkpoint is not None and fabric.is_global_zero:
            checkpoint.write(numbers_of(model), finished=True)
        fabric.barrier()


def _keep_better(
    settings: Train,
    model: nn.Module,
    task: Task,
    before: Standing,
    started_with: dict[str, Any],
    is_first_process: bool,
) -> None:
    """Puts the numbers before the training back where it ended below its start."""
    after = standing(model, task, settings.label_weight > 0)
    if after is None or not is_worse(after, before):
        return
    put_numbers(model, started_with)
    if is_first_process:
        tell([said(after, before)], task.quiet)


def _precision(
    settings: Train, model: nn.Module, task: Task, data: Iterable[Any], batches: int, state: dict[str, Any] | None
) -> Chosen:
    """The precision to train in: the setting, what an unfinished training chose, or what is faster here."""
    if settings.precision != "auto":
        return Chosen(settings.precision)
    if state is not None:  # a finished training has nothing left to choose
        return Chosen(state.get("chosen_precision", FLOAT))
    with unsaid():
        fabric = Fabric(accelerator=settings.accelerator, devices=settings.devices, strategy=settings.strategy)
    found = for_device(fabric.device, settings.devices)
    return found if found is not None else _try(settings, model, task, data, batches)


def _try(settings: Train, model: nn.Module, task: Task, data: Iterable[Any], batches: int) -> Chosen:
    """Trains copies on the first batches, in fp32 and in bf16. The model and all random states stay as they are."""
    cpu = torch.device("cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(chance_kept(cpu))
        stack.enter_context(_generators_kept(data))
        samples = [batch for _, batch in itertools.islice(seeded_batches(data, 0, 0, task.seed, cpu), 2)]
        trainings: dict[str, _Training] = {}

        def once(precision: str) -> None:
            if precision not in trainings:
                twin = copy.deepcopy(model)
                stack.enter_context(_chosen(settings, twin))
                stack.enter_context(_placed(settings, twin))
                with unsaid():
                    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
                trainings[precision] = _Training(settings, twin, task, fabric, batches, None)
            # A batch of its own, because a teacher remembers what it said to the last one.
            trainings[precision].batch(0, 0, copy.deepcopy(next(turns)))

        turns = itertools.cycle(samples)
        return faster(once)


@contextlib.contextmanager
def _generators_kept(data: Any) -> Iterator[None]:
    """Puts the state of a loader's own random generators back."""
    owners = (data, getattr(data, "sampler", None))
    found = [each for owner in owners if isinstance(each := getattr(owner, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in found]
    try:
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)


class _Training:
    """What lives as long as one training."""

    def __init__(
        self, settings: Train, model: nn.Module, task: Task, fabric: Fabric, batches: int, checkpoint: Checkpoint | None
    ) -> None:
        self.settings, self.model, self.task, self.fabric = settings, model, task, fabric
        self.batches, self.checkpoint = batches, checkpoint
        self.total = settings.epochs * batches
        self.optimizer = make_optimizer(settings, (p for p in model.parameters() if p.requires_grad))
        self.wrapped, self.wrapped_optimizer = fabric.setup(model, self.optimizer)
        self.meter = Meter()
        self.start = (0, 0)
        self.chosen = Chosen(settings.precision)
        self.pending: list[tuple[int, int, Tensor, Tensor | None, int]] = []
        self.ahead = 1 if fabric.device.type == "cpu" else _AHEAD
        self.saved_at = time.monotonic()
        self.check = True
        # What the task's own loss means is known only where it is the usual one.
        self.classifies = settings.label_weight > 0 and task.loss is default_loss

    def announce(self, chosen: Chosen) -> None:
        """Says and logs which precision was chosen, where it was left open."""
        self.chosen = chosen
        if self.settings.precision != "auto" or not self.fabric.is_global_zero:
            return
        if not self.task.quiet:
            print(chosen.said(), file=sys.stderr, flush=True)
        if self.fabric.loggers and chosen.gain is not None:
            self.fabric.log_dict({"bf16_speedup": chosen.gain}, step=0)

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.meter.load(state["meter"])
        self.start = tuple(state["position"])

    def save(self, epoch: int, index: int) -> None:
        """Keeps the state before batch `index` of an epoch."""
        self._flush()
        if self.checkpoint is not None and self.fabric.is_global_zero:
            self.checkpoint.write(
                {
                    **numbers_of(self.model),
                    "optimizer": self.optimizer.state_dict(),
                    "precision": self.fabric.strategy.precision.state_dict(),
                    "meter": self.meter.state(),
                    "chosen_precision": self.chosen.precision,
                    "position": [epoch, index],
                }
            )
        self.saved_at = time.monotonic()

    def run(self, data: Iterable[Any]) -> None:
        settings, task, device = self.settings, self.task, self.fabric.device
        first, skip = self.start
        left = (settings.epochs - first) * self.batches - skip
        estimate = Estimate(left, self.batches, settings.max_hours, task.quiet or not self.fabric.is_global_zero)
        with Display(settings.epochs, self.batches, task.quiet, self.fabric.is_global_zero) as display:
            for epoch in range(first, settings.epochs):
                index = skip - 1
                for index, batch in seeded_batches(data, epoch, skip, task.seed, device):
                    self.batch(epoch, index, batch)
                    display.batch(epoch, index, self.meter)
                    estimate.batch()
                    if self.checkpoint is not None and time.monotonic() - self.saved_at >= settings.save_every_s:
                        self.save(epoch, index + 1)
                if index < 0:
                    raise DataError(
                        f"the training data gave no batch in epoch {epoch + 1}; it must be readable again and again"
                    )
                self._flush()
                self._log(self._done(epoch, self.batches - 1))
                display.epoch(epoch, self.meter)
                self.meter, skip = Meter(), 0
                if epoch + 1 < settings.epochs:
                    self.save(epoch + 1, 0)
        self._agree()

    def batch(self, epoch: int, index: int, batch: Any) -> None:
        """One step of the optimizer."""
        done, fabric = self._done(epoch, index), self.fabric
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, done, self.total)
        for companion in self.settings.companions:
            companion.tick(self.model, done / self.total)
        reseed(fabric.device, self.task.seed, epoch, index, fabric.global_rank)
        share = 1.0
        samples = samples_of(batch)
        if fabric.world_size > 1:
            batch, share = split(batch, samples, fabric.global_rank, fabric.world_size)
        # To look at labels on a GPU is to wait for it, and those of the first epoch are those of all others.
        self.check = fabric.device.type == "cpu" or epoch == self.start[0]
        batch = to_device(batch, fabric.device)
        if self.settings.channels_last:
            batch = channels_last(batch)
        self.wrapped_optimizer.zero_grad(set_to_none=True)
        outputs = self.task.forward(self.wrapped, batch)
        loss = self._loss(outputs, batch)
        fabric.backward(loss * share if share != 1.0 else loss)
        if self.settings.clip is not None:
            fabric.clip_gradients(self.wrapped, self.wrapped_optimizer, max_norm=self.settings.clip)
        self.wrapped_optimizer.step()
        self.pending.append((epoch, index, loss.detach(), self._hits(outputs, batch), samples_of(batch)))
        if len(self.pending) >= self.ahead:
            self._flush()
        if (done + 1) % _LOG_EVERY == 0:
            self._flush()
            self._log(done)

    def _done(self, epoch: int, index: int) -> int:
        # Data may give more batches than its length says; progress must still stay below 1.
        return epoch * self.batches + min(index, self.batches - 1)

    def _loss(self, outputs: Any, batch: Any) -> Tensor:
        task = self.task
        terms: list[Tensor | float] = []
        with self.fabric.autocast():
            if self.settings.label_weight > 0:
                if self.classifies and self.check:
                    check_labels(outputs, batch)
                terms.append(self.settings.label_weight * task.loss(outputs, batch))
            terms += [companion.loss(self.model, task, batch, outputs) for companion in self.settings.companions]
        loss = sum(terms)
        if not isinstance(loss, Tensor):
            names = ", ".join(companion.name for companion in self.settings.companions)
            raise SettingsError(
                f"label_weight is 0 and the companions ({names}) add no loss; add soft_targets, or raise it"
            )
        return loss

    def _hits(self, outputs: Any, batch: Any) -> Tensor | None:
        """How many samples of the batch were classified rightly; None when that has no meaning here."""
        if not self.classifies or self.task.metric is not None or not isinstance(outputs, Tensor) or outputs.ndim != 2:
            return None
        target = batch_target(batch)
        if target.is_floating_point() or target.ndim != 1:
            return None
        return (outputs.detach().argmax(1) == target).sum()

    def _flush(self) -> None:
        """Fetches the losses since the last time. Raises TersenetError at the first that is no number."""
        for epoch, index, loss, hits, samples in self.pending:
            value = float(loss)
            if not math.isfinite(value):
                if self.checkpoint is not None and self.fabric.is_global_zero:
                    self.checkpoint.remove()  # going on from it could only end here again
                raise TersenetError(
                    f"the loss became {value} in epoch {epoch + 1}, batch {index + 1} (learning_rate "
                    f"{self.settings.learning_rate}); lower learning_rate, set clip: 1.0 or warmup: 0.1, and look for "
                    "inputs that are not finite"
                )
            self.meter.add(value, None if hits is None else float(hits), samples)
        self.pending.clear()

    def _log(self, done: int) -> None:
        if self.fabric.loggers and self.fabric.is_global_zero:
            row = {**self.meter.values(), "learning_rate": self.optimizer.param_groups[0]["lr"]}
            self.fabric.log_dict(row, step=done)

    def _agree(self) -> None:
        """Gives all processes the first one's buffers: statistics of norms are gathered by each on its own samples."""
        if self.fabric.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)


@contextlib.contextmanager
def _chosen(settings: Train, model: nn.Module) -> Iterator[None]:
    """Training mode, with all that does not match `only` and `skip` standing still; evaluation mode afterwards.

    Raises:
        ModelError: when no parameter is left to train.
    """
    stilled = []
    for path, module in model.named_modules():
        # A parametrized layer keeps its weight in a child: conv1.parametrizations.weight.
        owner = path.split(".parametrizations")[0] if not path.startswith("parametrizations") else ""
        if not settings.matches(owner, model.get_submodule(owner)):
            stilled += [p for p in module.parameters(recurse=False) if p.requires_grad]
    for parameter in stilled:
        parameter.requires_grad_(False)
    try:
        if not any(p.requires_grad for p in model.parameters()):
            raise ModelError(
                "the model has no parameter to train: all are frozen (requires_grad=False), left out by only and skip,"
                " or settled to whole numbers; train in front of settle"
            )
        # The graph of an exported program refuses to change its mode, and has nothing to switch.
        with contextlib.suppress(NotImplementedError):
            model.train()
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                module.training = False  # a frozen norm keeps its statistics
        yield
    finally:
        for parameter in stilled:
            parameter.requires_grad_(True)
        for parameter in model.parameters():
            parameter.grad = None
        with contextlib.suppress(NotImplementedError):
            model.eval()


@contextlib.contextmanager
def _placed(settings: Train, model: nn.Module) -> Iterator[None]:
    """The memory layout for training, and the faster gradients; afterwards all is as it was, on its own device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with faster_depthwise(model):
            yield
    finally:
        model.to(device)
        if settings.channels_last:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
