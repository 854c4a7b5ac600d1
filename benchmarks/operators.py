"""The operator table: every layer, function and tensor method of torch that can stand in a network, in a small one.

The list is torch's own: the classes of torch.nn, the functions of torch.nn.functional, and what torch.overrides says
can be overridden. What is tried with each is in operator_settings.py, and so are the reasons of what is left out. Each
setting stands between a convolution and a small head, and then:

    captured    the graph computes what the network does, at another batch size
    cut         half of the channels before it go: equal to the uncut graph with zeros in their places, or why not
    .terse .pt2 written and read again: equal, or the sentence that refuses it
    ONNX        the file in ONNX Runtime and OpenVINO: equal, or the sentence
    int8        the file in both: equal to its simulation, or the sentence

    python benchmarks/operators.py                    what is missing in benchmarks/results/operators.json
    python benchmarks/operators.py --only '*pad*'     these again
    python benchmarks/operators.py --checks captured,cut

Writes docs/operators.md from all results, old and new.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import functools
import inspect
import io
import json
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from masked_twin import Zeroed, difference, half
from operator_settings import FUNCTIONS, LAYERS, LEFT_OUT
from operators_page import page
from torch import Tensor, nn
from torch.overrides import get_ignored_functions, get_overridable_functions

from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.deploy.machine import machine
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.pt2 import export_pt2, read_pt2
from tersenet.deploy.runtimes import open_file
from tersenet.errors import TersenetError
from tersenet.graph.coupling import coupling
from tersenet.graph.recut import recut
from tersenet.graph.trace import trace
from tersenet.quantize.quantize import Quantize
from tersenet.task import Task

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "operators.json"
CHECKS = ("captured", "cut", "terse", "pt2", "onnx", "int8")
RUNTIMES = ("onnxruntime", "openvino")
FLOAT_TOLERANCE = 1e-4  # as a share of the largest output: sums in another order
INT8_TOLERANCE = 4 / 255  # of the range of the outputs: ties in rounding, which a step here and there moves
SOURCES = {"image": (3, 8, 8), "sequence": (3, 8), "volume": (3, 6, 6, 6), "tokens": (6, 3), "rows": (3,)}
_LARGEST = 200  # letters of a sentence in the log


@dataclass(frozen=True)
class Setting:
    """One operator with one setting: `call` is the expression, `layer` what the constructor takes."""

    name: str  # "nn.Conv2d", "F.pad", "torch.add", "Tensor.add_"
    said: str
    source: str
    call: str
    layer: str | None = None
    function: Any = field(default=None, compare=False)

    @property
    def key(self) -> str:
        return f"{self.name}({self.said}) @{self.source}"


# --- the list --------------------------------------------------------------------------------------------------------


def names() -> dict[str, Any]:
    """Everything that torch lists, "nn.Conv2d" -> what it is. Methods that are the same function are one."""
    found: dict[str, Any] = {
        f"nn.{name}": kind
        for name, kind in sorted(vars(nn).items())
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    for name, value in sorted(vars(F).items()):
        if inspect.isroutine(value) and not name.startswith("_") and torch.is_tensor is not value:
            found[f"F.{name}"] = value
    own = {"torch.nn.functional", "torch.functional", "torch.Tensor"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = get_overridable_functions()
    for space, functions in listed.items():
        prefix = getattr(space, "__name__", "Tensor")
        prefix = "Tensor" if space is Tensor else "torch" if prefix in own else prefix
        if space is F or not (inspect.ismodule(space) or space is Tensor):
            continue
        for function in functions:
            name = getattr(function, "__name__", "")
            if name and name not in ("__get__", "__set__", "__delete__"):
                short = re.sub(r"^(linalg|special|fft)_", "", name) if prefix.count(".") else name
                found[f"{prefix}.{short}"] = function
    for name in ("T", "mT", "H", "mH", "real", "imag", "shape", "dtype", "device"):
        found[f"Tensor.{name}"] = functools.partial(lambda x, attribute: getattr(x, attribute), attribute=name)
    ignored = get_ignored_functions()
    for name, value in sorted(vars(torch).items()):
        if not name.startswith("_") and inspect.isbuiltin(value) and value in ignored:
            found.setdefault(f"torch.{name}", value)
    return found


def base(name: str) -> str:
    """The name that settings go by: `Tensor.add_`, `torch.add` and `Tensor.__add__` are `add`."""
    space, _, short = name.rpartition(".")
    if re.fullmatch(r"__(bool|float|int|long|index|array|contains|deepcopy)__", short):
        return short
    prefix = {"torch.linalg": "linalg_", "torch.special": "special_", "torch.fft": "fft_"}.get(space, "")
    return prefix + short.strip("_")


def left_out(name: str) -> str | None:
    """Why an operator does not stand in a network."""
    short = base(name)
    known = parsed(LAYERS) if name.startswith("nn.") else parsed(FUNCTIONS)
    if short in known or name in known:
        return None
    for pattern, why in LEFT_OUT.items():
        if re.fullmatch(pattern, short):
            return why
    return None


@functools.cache
def parsed(table: str) -> dict[str, list[tuple[str, str]]]:
    """name -> (source, setting)s."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in table.strip().splitlines():
        head, _, said = line.partition(": ")
        words = head.rstrip(":").split()
        source = next((word[1:] for word in words if word.startswith("@")), "")
        for name in [word for word in words if not word.startswith("@")]:
            found.setdefault(name, []).extend((source, one.strip()) for one in said.split(" | "))
    return found


def settings(name: str, function: Any) -> list[Setting]:
    """What is tried with one operator."""
    short = base(name)
    digit = {"1": "sequence", "3": "volume"}
    guess = next((digit[d] for d in re.findall(r"(\d)d", short) if d in digit), "image")
    table = parsed(LAYERS) if name.startswith("nn.") else parsed(FUNCTIONS)
    plain = name.rpartition(".")[2]
    given = table.get(plain) or table.get(short) or table.get(short.removeprefix("special_")) or [("", "")]
    found = []
    for source, said in given:
        if name.startswith("nn."):
            layer, _, call = said.partition("=>")
            found.append(Setting(name, said, source or guess, call.strip() or "f(x)", layer.strip(), function))
        else:
            call = said[1:] if said.startswith("=") else f"f(x, {said})" if said else "f(x)"
            found.append(Setting(name, said, source or guess, call, None, function))
    return found


# --- the network -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A layer that makes channels, the operator, and a head for what it gives."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        size = SOURCES[setting.source]
        self.before, self.beside = (_source(setting.source) for _ in range(2))
        self.rank = len(size) + 1
        self.code: CodeType = compile(setting.call, "<the operator>", "eval")
        self.function = setting.function
        self.operator = None
        if setting.layer is not None:
            self.operator = eval(f"f({setting.layer})", {"f": setting.function, "torch": torch})
        self.heads = nn.ModuleList()
        self.free = nn.ParameterDict()
        outputs = self.middle(torch.randn(2, *size))
        if any(output.dim() == 0 or output.shape[0] != 2 for output in outputs):
            raise ValueError(f"its output is no batch: {[tuple(output.shape) for output in outputs]}")
        self.heads.extend(_head(output) for output in outputs)

    def middle(self, x: Tensor) -> list[Tensor]:
        """What the operator gives, as real numbers."""
        channels, beside = self.before(x), self.beside(x)
        function = self.function if self.operator is None else self.operator
        known = {"f": function, "x": channels, "y": beside, "u": channels.sigmoid(), "p": self.parameter}
        result = eval(self.code, {"torch": torch, "F": F}, known)
        parts = [part for part in torch.utils._pytree.tree_leaves(result) if isinstance(part, Tensor)]
        if not parts:
            raise ValueError("gives no tensor")
        if any(part.is_complex() for part in parts):
            raise ValueError("gives complex numbers")
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


def build(setting: Setting) -> tuple[Net, Tensor]:
    """The network in evaluation mode with random numbers, and three inputs."""
    torch.manual_seed(0)
    model = Net(setting)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval(), torch.randn(3, *SOURCES[setting.source])


# --- the checks ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def captured(model: Net, x: Tensor, folder: Path) -> str:
    return _same(trace(model, x[:2])(x), model(x))


@torch.no_grad()
def cut(model: Net, x: Tensor, folder: Path) -> str:
    """ok, "partly" with the reason where something before it stays, or why everything stays."""
    known = coupling(model, x[:2])
    removed = half(known)
    free = {path for bundle in known.bundles for path, role in bundle.members if role == "out"}
    why = known.frozen.get("before", "")
    if len(removed):
        small = recut(copy.deepcopy(model), known.plan(model, removed)).eval()
        said = _same(small(x[:2]), Zeroed(known, removed).run(x[:2]))
        if said != "ok":
            return said
    return "ok" if "before" in free and not why else f"left alone: {why or 'no class of its own'}"


def terse(model: Net, x: Tensor, folder: Path) -> str:
    save_terse(model, x[:2], folder / "a.terse")
    return _same(load_terse(folder / "a.terse")(x), model(x))


def pt2(model: Net, x: Tensor, folder: Path) -> str:
    export_pt2(model, x[:2], folder / "a.pt2")
    return _same(read_pt2(folder / "a.pt2")[0](x), model(x))


def onnx(model: Net, x: Tensor, folder: Path) -> dict[str, str]:
    path = export_onnx(model, x[:2], folder / "a.onnx")
    return _in_runtimes(path, x, model(x), FLOAT_TOLERANCE)


def int8(model: Net, x: Tensor, folder: Path) -> dict[str, str]:
    simulated, _ = Quantize(samples=16).run(copy.deepcopy(model), Task(example=x[:2], calibrate=[x], quiet=True))
    path = export_onnx(simulated, x[:2], folder / "q.onnx")
    return _in_runtimes(path, x, simulated(x), INT8_TOLERANCE)


def _in_runtimes(path: Path, x: Tensor, expected: Tensor, tolerance: float) -> dict[str, str]:
    found = {}
    for runtime in RUNTIMES:
        try:
            got = torch.from_numpy(open_file(path, runtime).run(x.numpy()))
        except TersenetError as error:
            found[runtime] = f"refused: {_short(error)}"
            continue
        found[runtime] = _same(got, expected, tolerance)
    return found


def _same(found: Tensor, expected: Tensor, tolerance: float = FLOAT_TOLERANCE) -> str:
    if found.shape != expected.shape:
        return f"WRONG: shape {tuple(found.shape)} in place of {tuple(expected.shape)}"
    if bool((found.isnan() != expected.isnan()).any()):
        return "WRONG: other places are NaN"
    off = difference(found.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0))
    return "ok" if off <= tolerance else f"WRONG: off by {off:.2g}"


def _short(error: BaseException) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"0x[0-9a-f]+|/\S*/", "", said)[:_LARGEST]


RUN: dict[str, Callable[[Net, Tensor, Path], Any]] = {
    "captured": captured, "cut": cut, "terse": terse, "pt2": pt2, "onnx": onnx, "int8": int8,
}  # fmt: skip


def row(setting: Setting, checks: tuple[str, ...], old: dict[str, Any], memory: dict[str, Any]) -> dict[str, Any]:
    """Results of one setting; of those that become the same graph, one is run."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            model, x = build(setting)
            with torch.no_grad():
                model(x)
        except Exception as error:  # noqa: BLE001 - whatever an operator says to a call that does not suit it
            return {"left_out": f"{_short(error)}"}
        graph = _graph(model, x, setting)
        found = dict(old)
        for check in checks:
            if found.get(check) is not None:
                continue
            if (graph, check) in memory:
                found[check] = memory[graph, check]
                continue
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                found[check] = _tried(RUN[check], model, x, Path(folder))
            if graph:
                memory[graph, check] = found[check]
        return found


def _tried(check: Callable[[Net, Tensor, Path], Any], model: Net, x: Tensor, folder: Path) -> Any:
    try:
        return check(model, x, folder)
    except TersenetError as error:
        return f"refused: {_short(error)}"
    except Exception as error:  # noqa: BLE001 - no sentence of ours, which is wrong too
        return f"WRONG: {type(error).__name__}: {_short(error)}"


def _graph(model: Net, x: Tensor, setting: Setting) -> str:
    """What a network becomes when it is captured; empty where it cannot be."""
    try:
        graph = trace(model, x[:2])
    except TersenetError:
        return ""
    layers = [f"{path} {module}" for path, module in graph.named_modules() if path]
    return "\n".join([str(graph.graph), setting.source, *layers])


def table() -> tuple[dict[str, str], list[Setting]]:
    """(what is left out and why, what is tried)."""
    everything = names()
    out = {name: why for name in everything if (why := left_out(name)) is not None}
    return out, [one for name, value in everything.items() if name not in out for one in settings(name, value)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="settings whose name matches this pattern, also those that are there already")
    parser.add_argument("--wrong", action="store_true", help="those that are wrong, again")
    parser.add_argument("--checks", default=",".join(CHECKS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "operators.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log: dict[str, Any] = {"rows": {}}
    if arguments.results.exists():
        log = json.loads(arguments.results.read_text())
    checks = tuple(arguments.checks.split(","))
    out, tried = table()
    log.update(machine=machine(), threads=1, torch=torch.__version__, left_out=out)
    keys = {one.key for one in tried}
    log["rows"] = {key: value for key, value in log["rows"].items() if key in keys}
    memory: dict[str, Any] = {}
    saved = time.monotonic()
    for one in tried:
        old = log["rows"].get(one.key, {})
        chosen = arguments.only and fnmatch.fnmatch(one.key, arguments.only)
        if chosen or (arguments.wrong and "WRONG" in json.dumps(old)) or "left_out" in old:
            old = {check: value for check, value in old.items() if check not in (*checks, "left_out")}
        if (arguments.only and not chosen) or all(check in old for check in checks):
            continue
        log["rows"][one.key] = row(one, checks, old, memory)
        print(one.key, json.dumps(log["rows"][one.key]), flush=True)
        if time.monotonic() - saved > 20:
            arguments.results.write_text(json.dumps(log, indent=1) + "\n")
            saved = time.monotonic()
    arguments.results.write_text(json.dumps(log, indent=1) + "\n")
    arguments.out.write_text(page(log))


if __name__ == "__main__":
    main()
