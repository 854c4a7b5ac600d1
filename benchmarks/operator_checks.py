"""One operator in a small network, and what is checked there; `operators.py` says what each check is.

As a program it is the process in which operators.py runs rows, so that an operator that ends the interpreter ends
only this one. It reads one JSON object a line: first what is known of other graphs, then rows to be done. It answers
with one line per check.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import linecache
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from masked_twin import Zeroed, difference, half
from operator_list import Setting, table
from torch import Tensor, fx, nn

from tersenet.bricks.settle import settle
from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.deploy.checked import checked
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.pt2 import export_pt2, read_pt2
from tersenet.deploy.reference import Reference
from tersenet.deploy.runtimes import open_file
from tersenet.errors import TersenetError
from tersenet.graph.coupling import coupling
from tersenet.graph.recut import recut
from tersenet.graph.trace import fixed_batch, trace
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

RUNTIMES = ("onnxruntime", "openvino")
FLOAT_TOLERANCE = 1e-4  # as a share of the largest output: sums in another order
INT8_TOLERANCE = 4 / 255  # of the range of the outputs: ties in rounding, which a step here and there moves
SOURCES = {"image": (3, 8, 8), "sequence": (3, 8), "volume": (3, 6, 6, 6), "tokens": (6, 3), "rows": (3,)}
_LARGEST = 240  # letters of a sentence in the log


class NoNetwork(ValueError):
    """An operator that gives nothing which a network could go on with."""


class Net(nn.Module):
    """A layer that makes channels, the operator, and a head for what it gives."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        size = SOURCES[setting.source]
        self.before, self.beside = (_source(setting.source) for _ in range(2))
        self.rank = len(size) + 1
        self.call = _expression(setting)
        self.operator = None
        if setting.layer is not None:
            self.operator = eval(f"f({setting.layer})", {"f": setting.function, "torch": torch})
        self.heads = nn.ModuleList()
        self.free = nn.ParameterDict()
        outputs = self.middle(torch.randn(2, *size))
        if any(output.dim() == 0 or output.shape[0] != 2 for output in outputs):
            raise NoNetwork("its output is no batch")
        self.heads.extend(_head(output) for output in outputs)

    def middle(self, x: Tensor) -> list[Tensor]:
        """What the operator gives, as real numbers."""
        channels, beside = self.before(x), self.beside(x)
        known = {"x": channels, "y": beside, "u": channels.sigmoid(), "p": self.parameter}
        result = self.call(known if self.operator is None else {**known, "f": self.operator})
        parts = [part for part in torch.utils._pytree.tree_leaves(result) if isinstance(part, Tensor)]
        if not parts:
            raise NoNetwork("gives no tensor")
        if any(part.is_complex() for part in parts):
            raise NoNetwork("gives complex numbers")
        return [part if part.dtype == torch.float32 else part.float() for part in parts]

    def parameter(self, name: str, *shape: int) -> Tensor:
        if name not in self.free:
            self.free[name] = nn.Parameter(torch.randn(shape) * 0.3)
        return self.free[name]

    def forward(self, x: Tensor) -> Tensor:
        parts = [head(part) for head, part in zip(self.heads, self.middle(x), strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def _expression(setting: Setting) -> Callable[[dict[str, Any]], Any]:
    """The expression as a function of its variables, known to tracebacks, so that sentences about it show it."""
    linecache.cache[setting.name] = (len(setting.call), None, [setting.call + "\n"], setting.name)
    code = compile(setting.call, setting.name, "eval")

    def call(known: dict[str, Any]) -> Any:
        return eval(code, {"torch": torch, "F": F, "f": setting.function}, known)

    return call


def _source(kind: str) -> nn.Module:
    if kind in ("tokens", "rows"):
        return nn.Linear(3, 8)
    conv = {"image": nn.Conv2d, "sequence": nn.Conv1d, "volume": nn.Conv3d}[kind]
    return conv(3, 8, 3)


def _head(output: Tensor) -> nn.Module:
    """(N, ...) -> (N, 5)."""
    if output.dim() == 4:
        middle: list[nn.Module] = [nn.Conv2d(output.shape[1], 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*middle, nn.Linear(6, 5))
    return nn.Sequential(nn.Flatten(), nn.Linear(output[0].numel(), 5))


@torch.no_grad()
def build(setting: Setting) -> tuple[Net, Tensor]:
    """The network in evaluation mode with random numbers, and three inputs.

    Raises:
        NoNetwork: when what the operator gives is no batch of real numbers, or is another one each time.
    """
    torch.manual_seed(0)
    model = Net(setting)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.eval()
    x = torch.randn(3, *SOURCES[setting.source])
    if not torch.equal(model(x).nan_to_num(), model(x).nan_to_num()):
        raise NoNetwork("is random: two runs differ, so nothing can be compared")
    return model, x


# --- the checks ------------------------------------------------------------------------------------------------------


def captured(model: Net, x: Tensor, folder: Path) -> str:
    return _of_graph(trace(model, x[:2]), model, x)


def _of_graph(graph: fx.GraphModule, model: Net, x: Tensor) -> str:
    """Of a graph that takes one size of batch, its own sentence."""
    why = fixed_batch(graph)
    said = _same(graph(x[:2]), model(x[:2])) if why else _same(graph(x), model(x))
    return f"refused: {_short(why)}" if why and said == "ok" else said


def cut(model: Net, x: Tensor, folder: Path) -> str:
    """ok, or why what is before the operator stays."""
    known = coupling(model, x[:2])
    removed = half(known)
    free = {path for bundle in known.bundles for path, role in bundle.members if role == "out"}
    why = known.frozen.get("before", "")
    if len(removed):
        small = recut(copy.deepcopy(model), known.plan(model, removed)).eval()
        said = _same(small(x[:2]), Zeroed(known, removed).run(x[:2]))
        if said != "ok":
            return said
    return "ok" if "before" in free and not why else f"left alone: {_short(why or 'no channels of its own')}"


def terse(model: Net, x: Tensor, folder: Path) -> str:
    save_terse(model, x[:2], folder / "a.terse")
    return _same(load_terse(folder / "a.terse")(x), model(x))


def pt2(model: Net, x: Tensor, folder: Path) -> str:
    path = export_pt2(model, x[:2], folder / "a.pt2")
    return _same(read_pt2(path)[0](x), model(x))


def onnx(model: Net, x: Tensor, folder: Path) -> dict[str, str]:
    path = export_onnx(model, x[:2], folder / "a.onnx")
    return {runtime: _in_runtime(path, runtime, model, x, FLOAT_TOLERANCE) for runtime in RUNTIMES}


def int8(model: Net, x: Tensor, folder: Path) -> dict[str, str]:
    task = Task(example=x[:2], calibrate=[x], quiet=True)
    simulated = settle(Quantize(samples=16).run(model, task)[0])
    path = export_onnx(simulated, x[:2], folder / "q.onnx")
    return {runtime: _in_runtime(path, runtime, simulated, x, INT8_TOLERANCE) for runtime in RUNTIMES}


def _in_runtime(path: Path, runtime: str, model: nn.Module, x: Tensor, tolerance: float) -> str:
    """ok where the outputs are equal; else what the program itself says to this file when it ships."""
    try:
        said = _same(torch.from_numpy(open_file(path, runtime).run(x.numpy())), model(x), tolerance)
    except TersenetError as error:
        return f"refused: {_short(error)}"
    if said == "ok":
        return said
    own = path.with_stem(f"{path.stem}_{runtime}")
    rewrite = functools.partial(_with_floats, model, x, own)
    rewrite(())
    try:
        rewritten = rewrite if path.stem == "q" else None
        agreement = checked(own, [runtime], Reference(model, x[:2], [x]), rewritten)[runtime]
    except TersenetError as error:
        return f"refused: {_short(error)}"
    if agreement.in_float:
        return f"ok: {', '.join(agreement.in_float)} left in float"
    return f"ok: {said.removeprefix('WRONG: ')}, which rounding to the other side allows" if path.stem == "q" else said


def _with_floats(model: nn.Module, x: Tensor, path: Path, floats: Any) -> None:
    export_onnx(model, x[:2], path, floats=floats)


def _same(found: Tensor, expected: Tensor, tolerance: float = FLOAT_TOLERANCE) -> str:
    if found.shape != expected.shape:
        return f"WRONG: shape {tuple(found.shape)} in place of {tuple(expected.shape)}"
    if bool((found.isnan() != expected.isnan()).any()):
        return "WRONG: other places are NaN"
    off = difference(found.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0))
    return "ok" if off <= tolerance else f"WRONG: off by {off:.2g}"


def _short(error: object) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    said = re.sub(r" \(parts = .*?strict=True\)\]\)|0x[0-9a-f]+|(?<![\w<])/\S*/", "", said)
    return re.sub(r" \(in parts = .*?strict=True\)\]\)", "", said)[:_LARGEST]


RUN: dict[str, Callable[[Net, Tensor, Path], Any]] = {
    "captured": captured, "cut": cut, "terse": terse, "pt2": pt2, "onnx": onnx, "int8": int8,
}  # fmt: skip
Memory = dict[str, dict[str, Any]]  # graph -> what is known of it


def row(setting: Setting, checks: list[str], memory: Memory, tell: Callable[[str, Any], None]) -> None:
    """Tells the results of one setting as they come; of settings that become the same graph, one is run."""
    try:
        model, x = build(setting)
    except Exception as error:  # noqa: BLE001 - whatever an operator says to a call that does not suit it
        said = str(error) if isinstance(error, NoNetwork) else f"{type(error).__name__}: {_short(error)}"
        tell("left_out", said)
        return
    graph = captured_graph(model, x)
    name = digest(graph, setting)
    if name:
        tell("graph", name)
    known = memory.setdefault(name, {}) if name else {}
    for check in checks:
        if check == "captured" and graph is not None:
            with torch.no_grad():
                known[check] = _of_graph(graph, model, x)
        elif check == "int8" and isinstance(known.get("onnx"), str):
            known[check] = known["onnx"]  # no file of it can be written
        elif check not in known:
            with tempfile.TemporaryDirectory() as folder:
                known[check] = _tried(RUN[check], model, x, Path(folder))
        tell(check, known[check])


@torch.no_grad()
def _tried(check: Callable[[Net, Tensor, Path], Any], model: Net, x: Tensor, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return check(model, x, folder)
        except TersenetError as error:
            return f"refused: {_short(error)}"
        except Exception as error:  # noqa: BLE001 - no sentence of ours, which is wrong too
            return f"WRONG: {type(error).__name__}: {_short(error)}"


def captured_graph(model: Net, x: Tensor) -> fx.GraphModule | None:
    try:
        return trace(model, x[:2])
    except TersenetError:
        return None


def digest(graph: fx.GraphModule | None, setting: Setting) -> str:
    """Of what a network becomes when it is captured; empty where it cannot be."""
    if graph is None:
        return ""
    layers = [f"{path} {module}" for path, module in graph.named_modules() if path]
    numbers = [f"{node.target} {_fixed(graph, node)}" for node in graph.graph.nodes if node.op == "get_attr"]
    said = "\n".join([str(graph.graph), setting.source, *layers, *numbers])
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _fixed(graph: fx.GraphModule, node: fx.Node) -> str:
    value = functools.reduce(getattr, str(node.target).split("."), graph)
    assert isinstance(value, Tensor)
    return str(tuple(value.shape)) if isinstance(value, nn.Parameter) else str(value.tolist())


def reuse_tables() -> None:
    """The exporter makes its tables of operators again for each file, which takes a third of the time of a row."""
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = functools.cache(_registration.ONNXRegistry.from_torchlib)
    _registration.ONNXRegistry.from_torchlib = staticmethod(registry)  # type: ignore[method-assign]
    decompositions = _decomp.create_onnx_friendly_decomposition_table
    made: dict[frozenset[Any], Any] = {}

    def known(registered: Any) -> Any:
        key = frozenset(registered)
        if key not in made:
            made[key] = dict(decompositions(registered).items())
        return dict(made[key])

    _decomp.create_onnx_friendly_decomposition_table = known  # type: ignore[assignment]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what C++ prints is no answer
    torch.set_num_threads(1)
    reuse_tables()
    settings = {one.key: one for one in table()[1]}
    memory: Memory = json.loads(sys.stdin.readline())

    def tell(what: str, value: Any) -> None:
        print(json.dumps([what, value]), file=answers, flush=True)

    for line in sys.stdin:
        asked = json.loads(line)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row(settings[asked["key"]], asked["checks"], memory, tell)
        tell("done", None)


if __name__ == "__main__":
    main()
