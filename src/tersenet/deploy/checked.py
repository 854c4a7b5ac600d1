"""Files that are written and held to the model that they were made from, in every runtime asked for, or removed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import fx

from tersenet.bricks.quantized import Int8Conv2d, Int8Layer
from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.apart import Entry, Worker, cores_for
from tersenet.deploy.locate import before_quantizer, first_that_differs, named
from tersenet.deploy.reference import Reference
from tersenet.deploy.verify import Agreement, check, compare_file
from tersenet.errors import ExportError, FileError, TersenetError

# Metadata of an ONNX file: the runtimes in which it was held to its model, with commas.
CHECKED = "tersenet.checked"
Rewrite = Callable[[Sequence[str]], object]
# Operators of an int8 file that are left in float one after another; what is wrong at more places is wrong as a whole.
_ROUNDS = 4
# Convolutions that are tried in float, all at once and then fewer, where it is not known what is wrong.
_SUSPECTS = 8


def checked(
    path: Path, runtimes: Sequence[str], reference: Reference, rewrite: Rewrite | None = None
) -> dict[str, Agreement]:
    """As `held`, of a file that was just written: what is wrong and cannot be worked around is removed."""
    try:
        return held(path, runtimes, reference, rewrite)
    except (ExportError, FileError) as error:  # a FileError: just written, and the runtime refuses it
        _remove(path)
        raise ExportError(str(error)) from error


def held(
    path: Path, runtimes: Sequence[str], reference: Reference, rewrite: Rewrite | None = None
) -> dict[str, Agreement]:
    """Holds a file to its model. What is wrong in a runtime is worked around where it can be, else said.

    Where an operator of an int8 file is computed wrong in integers, the file is written again with that operator in
    float between the same roundings, so that it still computes what the simulation does.

    Args:
        runtimes: that read the file.
        rewrite: writes an int8 ONNX file again, with the operators of these nodes of the captured graph in float.
    Returns:
        runtime -> how far the file is from the model there, and which operators were left in float because of it.
    Raises:
        ExportError: when it is wrong, with the figures and the first operator that differs.
        FileError: when it does not open.
    """
    agreements, wrong = _compared(path, runtimes, reference)
    if wrong is not None and rewrite is not None:
        # A file with operators in float that a runtime does not open works around nothing: the first finding stands.
        with contextlib.suppress(FileError):
            agreements, wrong = _worked_around(path, runtimes, agreements[wrong], wrong, reference, rewrite)
    if wrong is not None:
        try:
            check(agreements[wrong], f"{path} in {wrong}")
        except ExportError as error:
            raise ExportError(f"{error}{_where(agreements[wrong], reference, path, wrong)}") from None
    return agreements


def _open_apart(path: Path, runtime: str) -> None:
    """Raises FileError where a runtime ends the process that opens a file, as OpenVINO does at some int8 graphs."""
    with Worker(Entry(path.name, path, runtime), cores_for(1)) as worker:
        worker.ask("open", path=str(path), runtime=runtime, threads=1)


def _worked_around(
    path: Path, runtimes: Sequence[str], missed: Agreement, wrong: str, reference: Reference, rewrite: Rewrite
) -> tuple[dict[str, Agreement], str | None]:
    """As `_compared`, of the file as it was written last, with more and more operators in float.

    Args:
        missed: how far the file is from the model in `wrong`.
    """
    floats: list[str] = []
    blamed: set[str] = set()
    found = {wrong: missed}

    def again(more: Sequence[str]) -> tuple[dict[str, Agreement], str | None]:
        """The runtime in which it was wrong comes first: the others are asked when it is right there."""
        rewrite(more)
        first_asked = sorted(runtimes, key=lambda runtime: runtime != wrong)
        agreements, then = _compared(path, first_asked, reference)
        return {runtime: agreements[runtime] for runtime in runtimes if runtime in agreements}, then

    for _ in range(_ROUNDS):
        culprits = _culprits(found[wrong], reference)
        if not culprits or set(culprits) <= set(floats):
            break
        floats += _alike(reference.graph, culprits, floats)
        blamed.add(wrong)
        found, then = again(floats)
        if then is None:
            return _named(found, floats, blamed, reference.graph), None
        wrong = then
    suspects = _suspects(reference.graph) if wrong == "openvino" else []
    if suspects and again([*floats, *suspects])[1] is None:
        fewest = _narrowed(suspects, lambda some: again([*floats, *some])[1] is None)
        tried, then = again([*floats, *fewest])
        if then is not None:  # it takes several
            fewest = suspects
            tried, then = again([*floats, *fewest])
        return _named(tried, [*floats, *fewest], {*blamed, wrong}, reference.graph), then
    return found, wrong


def _alike(graph: fx.GraphModule, culprits: Sequence[str], before: Sequence[str]) -> list[str]:
    """The culprits, and where one has the shapes of a layer that was wrong before it, all layers of these shapes: then
    it is the runtime's kernel for them that is wrong."""
    nodes = {node.name: node for node in graph.graph.nodes}
    again = {_shapes(graph, nodes[name]) for name in culprits} & {_shapes(graph, nodes[name]) for name in before}
    more = [name for name, node in nodes.items() if _shapes(graph, node) in again - {None}]
    return list(dict.fromkeys([*culprits, *(name for name in more if name not in before)]))


def _shapes(graph: fx.GraphModule, node: fx.Node) -> str | None:
    """What a runtime chooses a kernel of an int8 layer by; None of anything else."""
    layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(layer, Int8Layer):
        return None
    return f"{layer} {node.meta.get('shape')}"


def _narrowed(suspects: list[str], is_right: Callable[[list[str]], bool]) -> list[str]:
    """The one of them that suffices, where one does, found by halves."""
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        suspects = half if is_right(half) else suspects[len(half) :]
    return suspects


def _named(
    agreements: Mapping[str, Agreement], floats: Sequence[str], blamed: Collection[str], graph: fx.GraphModule
) -> dict[str, Agreement]:
    """With the operators that were left in float, in the model's own names, beside the runtimes that needed it."""
    operators = tuple(named(graph, node) for node in graph.graph.nodes if node.name in floats)
    return {
        runtime: replace(each, in_float=operators if runtime in blamed else ()) for runtime, each in agreements.items()
    }


def _compared(path: Path, runtimes: Sequence[str], reference: Reference) -> tuple[dict[str, Agreement], str | None]:
    """(runtime -> how far the file is from the model there, the first in which it is wrong, after which no other is
    asked)."""
    if "openvino" in runtimes and reference.rounds:
        _open_apart(path, "openvino")
    agreements: dict[str, Agreement] = {}
    for runtime in runtimes:
        agreements[runtime] = compare_file(path, runtime, reference)
        if not agreements[runtime].agrees:
            return agreements, runtime
    return agreements, None


def _suspects(graph: fx.GraphModule) -> list[str]:
    """Int8 convolutions that something else than a layer reads, behind their quantizers: OpenVINO merges some of them
    wrong, and no longer where their integers are shown, so that the culprit is not known."""

    def is_kind(node: fx.Node, kind: type) -> bool:
        return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), kind)

    def readers(node: fx.Node) -> list[fx.Node]:
        return [each for user in node.users for each in (readers(user) if is_kind(user, Quantizer) else [user])]

    convolutions = [node for node in graph.graph.nodes if is_kind(node, Int8Conv2d)]
    found = [n.name for n in convolutions if any(not is_kind(user, Int8Layer) for user in readers(n))]
    return found[:_SUSPECTS]


def _culprits(agreement: Agreement, reference: Reference) -> list[str]:
    """The nodes between the first quantizer that is wrong and those before it."""
    steps = agreement.steps
    if steps is None or steps.node in ("", "output"):
        return []
    return [node.name for node in before_quantizer(reference.graph, steps.node)]


def _where(agreement: Agreement, reference: Reference, path: Path, runtime: str) -> str:
    """The first operator that differs, as the end of a sentence; nothing where it is not known."""
    graph = reference.graph
    if culprits := _culprits(agreement, reference):
        nodes = [node for node in graph.graph.nodes if node.name in culprits]
        return "; it differs first at " + ", ".join(named(graph, node) for node in nodes)
    if reference.rounds or path.suffix != ".onnx":
        return ""
    try:
        node = first_that_differs(reference, runtime)
    except (TersenetError, RuntimeError):  # the search itself may fail on what is wrong; the finding stands
        return ""
    if node is None:
        return "; written again with all values as outputs it agrees, so the file was changed or operators merged wrong"
    return f"; it differs first at {named(graph, node)}"


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    if path.suffix == ".xml":
        path.with_suffix(".bin").unlink(missing_ok=True)
