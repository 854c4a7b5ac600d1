"""Captures a model's forward with torch.export, once for all models of the same structure.

A compression looks at the same forward many times: for what it costs, for what a step may change, for each file that is
written. A capture takes seconds and depends on what the model is, not on the numbers in it, so the last captures are
kept by structure (graph/structure.py) and without any parameter; the next model of that structure gets its own.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import sysconfig
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.opened import unwrapped, wrapper
from tersenet.errors import ModelError, TraceError
from tersenet.graph.agreement import still_right
from tersenet.graph.calls import Calls
from tersenet.graph.functional import functional
from tersenet.graph.open_batch import is_open, sizes_kept, why_fixed
from tersenet.graph.outputs import in_plain_containers
from tersenet.graph.structure import structure

Example = Tensor | tuple[Tensor, ...]  # what a model is called with
_STANDARD, _INSTALLED = sysconfig.get_path("stdlib"), (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
_TORCH, _OWN = str(Path(torch.__file__).parent), str(Path(__file__).parent)


def inputs_of(example: Example) -> tuple[Tensor, ...]:
    """The inputs of a model, with a batch of at least 2: torch.export would fix a batch of 1."""
    return tuple(torch.cat([x, x]) if len(x) == 1 else x for x in _apart(example))


def _apart(example: Example) -> tuple[Tensor, ...]:
    """All inputs, each a tensor of its own: one that stands there twice would be taken for a single input."""
    found: list[Tensor] = []
    for x in example if isinstance(example, tuple) else (example,):
        found.append(x.clone() if any(x is other for other in found) else x)
    return tuple(found)


def export(model: nn.Module, example: Example, dynamic_batch: bool = True) -> ExportedProgram:
    """torch.export in evaluation mode, with the batch left open where the model allows it.

    Args:
        model: its modes are put back afterwards.
        example: (N, ...), or a tuple of all inputs, each with the batch in front. A batch of 1 is doubled, unless it
            is to stay fixed.
    Raises:
        TraceError: when the forward cannot be captured; says where.
    """
    return _export(model, example, dynamic_batch, Calls(model))[0]


def _export(
    model: nn.Module, example: Example, dynamic_batch: bool, calls: Calls
) -> tuple[ExportedProgram, str | None]:
    """The program, and in words where the forward fixes the batch that was to stay open; None when it does not."""
    _refuse_wrapped(model)
    _refuse_other_inputs(model, _apart(example))
    inputs = inputs_of(example) if dynamic_batch else _apart(example)
    program = _attempt(model, inputs, dynamic_batch, calls)
    if not dynamic_batch or is_open(program):
        return program, None
    with contextlib.suppress(TraceError), sizes_kept(model):
        again = _attempt(model, inputs, dynamic_batch, calls)
        if is_open(again):
            return again, None
    where = why_fixed(program)
    return program, (
        f"the forward of {type(model).__name__} fixes the batch at {len(inputs[0])}{where}; use x.shape[0] for the "
        "size of the batch, and no range(), comparison or loop over it"
    )


@dataclass(frozen=True)
class Captured:
    """A program without contexts and without writes that matter.

    Args:
        calls: which calls of layers it saw.
        fixed: in words where the forward fixes the batch; None where it is open.
        again: whether it was made of another model, of the same structure, whose parameters it does not hold.
    """

    program: ExportedProgram
    calls: Calls
    fixed: str | None
    again: bool = False


_MOST_OPERATORS = 10_000  # of all captures that are kept; with what torch notes about each, some 100 MB
_known: OrderedDict[str, Captured] = OrderedDict()


def capture(model: nn.Module, example: Example, anew: bool = False) -> Captured:
    """What a model computes, kept from an earlier capture of the same structure unless asked for `anew`.

    Raises:
        TraceError: when the forward cannot be captured.
    """
    key = structure(model, inputs_of(example))
    if not anew and (known := _known.get(key)) is not None:
        _known.move_to_end(key)
        return known
    captured = _captured(model, example)
    _known[key] = replace(captured, program=_without_numbers(captured.program), again=True)
    while len(_known) > 1 and sum(len(kept.program.graph.nodes) for kept in _known.values()) > _MOST_OPERATORS:
        _known.popitem(last=False)
    return captured


def export_open(model: nn.Module, example: Example) -> tuple[ExportedProgram, str | None]:
    """A program without contexts and without writes that matter, and in words where the forward fixes the batch.

    Its operators may be shared with other programs: they are not to be changed.
    """
    captured = capture(model, example)
    if captured.again:
        program = _with_numbers(captured.program, model)
        with attributes_kept(model, captured.calls.refills):  # the model runs here, too
            if still_right(model, program.module(check_guards=False), inputs_of(example)):
                return program, captured.fixed
        captured = capture(model, example, anew=True)
    return captured.program, captured.fixed


def _captured(model: nn.Module, example: Example) -> Captured:
    calls = Calls(model)
    program, fixed = _export(model, example, True, calls)
    try:
        with _silence():
            return Captured(functional(program), calls, fixed)
    except Exception as error:  # torch's decomposition raises many kinds
        raise TraceError(_why(model, error)) from error


def _without_numbers(program: ExportedProgram) -> ExportedProgram:
    """The same graph without parameters, buffers and example, which would keep a model in memory."""
    program = copy.copy(program)
    own = set(program.graph_signature.inputs_to_buffers.values())
    program._state_dict = {}
    program._constants = {name: value for name, value in program.constants.items() if name not in own}
    program._example_inputs = None
    return program


def _with_numbers(program: ExportedProgram, model: nn.Module) -> ExportedProgram:
    """The same graph with the parameters and buffers of this model."""
    program = copy.copy(program)
    signature = program.graph_signature
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    apart = set(signature.non_persistent_buffers)
    used = {*signature.inputs_to_parameters.values(), *signature.inputs_to_buffers.values()}
    program._state_dict = {name: tensors[name] for name in tensors if name in used - apart}
    program._constants = {**program.constants, **{name: tensors[name] for name in apart}}
    return program


def _attempt(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool, calls: Calls) -> ExportedProgram:
    shapes = _open_shapes(model, inputs) if dynamic_batch else None

    calls.refills = _refills(model, inputs)
    kept = attributes_kept(model, calls.refills)
    try:
        with evaluating(model), torch.no_grad(), _silence(), kept, calls.watching(model):
            program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many kinds; each becomes one sentence
        raise TraceError(_why(model, error)) from error
    return in_plain_containers(program)


def _open_shapes(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Which sizes are open, by input; inputs that a forward takes as *args are one argument."""
    sizes: tuple[Any, ...] = tuple({0: Dim.AUTO} for _ in inputs)
    names = [] if isinstance(model, fx.GraphModule) else list(inspect.signature(model.forward).parameters.values())
    plain = [one for one in names if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if any(one.kind is one.VAR_POSITIONAL for one in names):
        return (*sizes[: len(plain)], sizes[len(plain) :])
    return sizes


def _refuse_wrapped(model: nn.Module) -> None:
    """Raises for what only wraps a model: the paths of its layers would not be those of the graph."""
    if (name := wrapper(model)) is not None:
        raise TraceError(f"the model is wrapped in {type(model).__name__}; give what it wraps, model.{name}")
    try:
        unwrapped(model)
    except ModelError as error:
        raise TraceError(str(error)) from None


def _refuse_other_inputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raises where a forward cannot be called with so many inputs."""
    try:
        asked = inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled code may not say
        return
    try:
        asked.bind(*inputs)
    except TypeError as error:
        given = f"{len(inputs)} input{'s' if len(inputs) > 1 else ''}"
        raise TraceError(
            f"the forward of {type(model).__name__} takes ({', '.join(asked.parameters)}) and is given {given}: {error}"
            "; give all its inputs by order, several as a tuple"
        ) from None


def _refills(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a forward makes again what it keeps in dictionaries of tensors; one that it only reads stays empty."""
    if not _caches(model):
        return True
    twin = copy.deepcopy(model)  # whose buffers may count calls
    caches = _caches(twin)
    for cache in caches:
        cache.clear()
    with evaluating(twin), torch.no_grad():
        try:
            twin(*inputs)
        except Exception:  # noqa: BLE001 - whatever a forward says to a dictionary that lacks something
            return False
    return all(caches)


def _caches(model: nn.Module) -> list[dict[Any, Tensor]]:
    own = vars(nn.Module()).keys()
    plain = [value for module in model.modules() for key, value in vars(module).items() if key not in own]
    return [value for value in plain if type(value) is dict and value and _keeps_tensors(value)]


def _keeps_tensors(held: dict[Any, Any]) -> bool:
    return all(type(value) is Tensor for value in held.values())


@contextlib.contextmanager
def attributes_kept(model: nn.Module, refills: bool) -> Iterator[None]:
    """Puts the plain attributes of a model back as they were, and empties dictionaries of tensors meanwhile where the
    forward `refills` them.

    Some forwards keep what they computed, such as position biases by device. What they compute while they are captured
    is no number to be used later; and what they have kept would be captured as a constant, which no cut reaches.
    """
    own = vars(nn.Module()).keys()
    modules = [(module, {k: v for k, v in vars(module).items() if k not in own}) for module in model.modules()]
    inside = [(v, copy.copy(v)) for _, was in modules for v in was.values() if type(v) in (dict, list)]
    for held, _ in inside:
        if refills and isinstance(held, dict) and _keeps_tensors(held):
            held.clear()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export", UserWarning)
            yield
    finally:
        for module, was in modules:
            now = vars(module)
            for key in [key for key in now if key not in own and key not in was]:
                del now[key]
            now.update(was)
        for held, copied in inside:
            if isinstance(held, dict):
                held.clear()
                held.update(copied)
            else:
                held[:] = copied


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Where a forward cannot be captured, torch prints the whole graph; what it says is in the error too."""
    was = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(was)


def _is_standard(file: str) -> bool:
    """Whether a file is of Python's own library, whose lines say nothing about a model; packages may lie inside."""
    return file.startswith(_STANDARD) and not file.startswith(_INSTALLED)


def _why(model: nn.Module, error: Exception) -> str:
    """One sentence on why torch.export failed: the user's own line, and what it said."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH, _OWN, "<")) and not _is_standard(frame.filename)
    ]
    said = str(error).strip().splitlines()
    reason = said[0] if said else type(error).__name__
    if "data-dependent" in str(error).lower() or "GuardOnDataDependent" in type(error).__name__:
        reason = "its control flow depends on the values of a tensor; use torch.where, or move the decision outside"
    where = f" at {frames[-1].filename}, line {frames[-1].lineno} ({frames[-1].line})" if frames else ""
    return f"the forward of {type(model).__name__} cannot be captured{where}: {reason}"
