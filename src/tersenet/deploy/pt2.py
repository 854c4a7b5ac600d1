"""`.pt2` files: a program of torch.export that plain PyTorch loads, without tersenet and without the model's class.

Reading one is another matter: torch.export.load warns that it unpickles, and it also evaluates strings (symbolic sizes,
guards) and looks operators up by name, so a file from a stranger could run code. `read_pt2` looks through the
archive first and refuses every such thing; what is left is tensors, PyTorch's operators and names.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tersenet.atomic import writing
from tersenet.bricks.opened import copied, make_permanent
from tersenet.deploy.runner import Input
from tersenet.errors import FileError, TraceError
from tersenet.graph.capture import Example, export_open
from tersenet.graph.outputs import OUTPUTS, structure_of

_METADATA = "metadata.json"
# The operators of a captured forward. from_file is left out: it touches the disk.
_OPERATOR = re.compile(
    r"torch\.ops\.(aten\.(?!from_file)|prims?\.|quantized_decomposed\.|higher_order\.)\w+(\.\w+)?"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|ge|le|gt|lt|eq|ne|getitem|and_|or_)"
    r"|math\.\w+|torch\.sym_\w+"
)
_NAME = re.compile(r"[\w.,:+*/<>\[\] -]*")  # no quotes, brackets of calls or line ends: names end up in generated code
_SYMBOL = re.compile(
    r"'[a-z]+\d+'|\b(?:[a-z]+\d+|(?!S\b|Lambda\b)[A-Z]\w*|positive|integer|nonnegative|int_oo|oo|\d+)\b"
)
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "builtins.NoneType", "collections.OrderedDict"}
# Types of inputs as torch.export's files number them, and as numpy names them.
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
           12: "bool"}  # fmt: skip
_FREE_TEXT = {"metadata", "guards_code", "torch_version"}  # never evaluated: guards are not built (check_guards=False)


def export_pt2(model: nn.Module, example: Example, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Writes the model as a program that `torch.export.load(path).module()` runs, with an open batch.

    Args:
        model: any module.
        example: (N, ...), or all inputs; only their shapes are used, their values do not get into the file.
        path: ends in .pt2. Written whole or not at all.
        metadata: strings to keep beside the program.
    Raises:
        TraceError: when the forward cannot be captured.
        TersenetError: when the file cannot be written.
    """
    own = copied(model)
    make_permanent(own)
    program, fixed = export_open(own, example)
    if fixed is not None:
        raise TraceError(fixed)
    program.example_inputs = None  # else the example, perhaps somebody's photograph, would ship inside the file
    # Through memory, because the archive takes the name of the file that it is written to.
    buffer = io.BytesIO()
    with _quiet(), _without_lines(program):
        torch.export.save(program, buffer, extra_files={_METADATA: json.dumps(metadata or {})})
    path = Path(path)
    with writing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    return path


@contextlib.contextmanager
def _without_lines(program: ExportedProgram) -> Iterator[None]:
    """While it is open, no operator knows where it comes from: paths and lines of the author's machine, which would be
    most of a small file's bytes."""
    lines = {node: node.meta.pop("stack_trace") for node in program.graph.nodes if "stack_trace" in node.meta}
    try:
        yield
    finally:
        for node, line in lines.items():
            node.meta["stack_trace"] = line


def read_pt2(path: str | Path) -> tuple[nn.Module, tuple[int | None, ...], dict[str, str]]:
    """Opens a `.pt2` file without running code from it.

    Returns:
        the module, the shape (N, ...) of its first input with None for open sizes, and the metadata. The module has
        `inputs`, all of them by order.
    Raises:
        FileError: when the file is missing, damaged, or holds anything but tensors and operators of PyTorch.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror}); check the path") from error
    try:
        graph = _inspect(path, data)
        extra = {_METADATA: ""}
        with _quiet():
            # The bytes that were looked through are the bytes that are loaded, whatever happens to the file meanwhile.
            program = torch.export.load(io.BytesIO(data), extra_files=extra)
            module = program.module(check_guards=False)
    except FileError:
        raise
    except Exception as error:  # a damaged archive raises many kinds; all mean the same
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{path} is not a readable .pt2 file: {said}; write it again") from error
    metadata = json.loads(extra[_METADATA] or "{}")
    module.inputs = inputs = _inputs(path, graph)  # type: ignore[assignment]
    metadata = {str(key): str(value) for key, value in metadata.items()}
    if (structure := structure_of(program)) != 0:
        metadata[OUTPUTS] = json.dumps(structure)
    return module, inputs[0].shape, metadata


def _inspect(path: Path, data: bytes) -> dict[str, Any]:
    """The graph of an archive, after a look at everything in it that torch.export.load would trust."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise FileError(f"{path} is refused: it holds two records of one name")
    inner = {name.partition("/")[2]: name for name in names}
    if "models/model.json" not in inner:
        raise FileError(f"{path} is not a .pt2 program of torch.export.save (it has no models/model.json)")
    for name, record in inner.items():
        folder, _, leaf = name.partition("/")
        if folder in ("models", "extra") or name in ("archive_format", "archive_version", "byteorder", ".data/version"):
            if folder == "models" and leaf != "model.json":
                raise FileError(f"{path} is refused: it holds more than one program ({name})")
        elif name.startswith("data/sample_inputs/"):
            _check_tensors_only(path, archive.read(record))
        elif name.endswith("_config.json"):
            _check_payload(path, json.loads(archive.read(record)))
        elif not re.fullmatch(r"data/weights/weight_\d+|data/constants/tensor_\d+|\.data/serialization_id", name):
            raise FileError(f"{path} is refused: it holds {name}, which could run code when loaded")
    graph = json.loads(archive.read(inner["models/model.json"]))
    _check_graph(path, graph)
    return graph


def _check_tensors_only(path: Path, pickled: bytes) -> None:
    if pickled:
        try:
            torch.load(io.BytesIO(pickled), weights_only=True)
        except Exception:  # noqa: BLE001 - whatever the reason, torch.export.load would go on and unpickle it
            raise FileError(f"{path} is refused: its sample inputs are a pickle that could run code") from None


def _check_payload(path: Path, config: dict[str, Any]) -> None:
    for name, entry in config["config"].items():
        if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
            raise FileError(f"{path} is refused: {name} is pickled and could run code when loaded")


def _check_graph(path: Path, value: Any, key: str = "") -> None:
    """Refuses operators that are not PyTorch's, and strings that are more than names."""
    if isinstance(value, dict):
        if "target" in value and "inputs" in value and not _OPERATOR.fullmatch(str(value["target"])):
            raise FileError(
                f"{path} is refused: it calls {str(value['target'])[:100]!r}, no operator of PyTorch's graphs"
            )
        for name, entry in value.items():
            if name not in _FREE_TEXT:
                _check_graph(path, entry, name)
            if not _NAME.fullmatch(name):
                raise FileError(f"{path} is refused: {name[:100]!r} is not a name")
    elif isinstance(value, list):
        for entry in value:
            _check_graph(path, entry, key)
    elif isinstance(value, str):
        if key in ("in_spec", "out_spec"):
            _check_containers(path, json.loads(value))
        elif key == "expr_str":
            if re.search(r"[^\s(),=+*/<>&|~.-]", _SYMBOL.sub("", value)):
                raise FileError(f"{path} is refused: {value[:100]!r} is not the size of a tensor")
        elif not _NAME.fullmatch(value):
            raise FileError(f"{path} is refused: {value[:100]!r} is not a name")


def _check_containers(path: Path, spec: Any) -> None:
    if isinstance(spec, list):
        for entry in spec:
            _check_containers(path, entry)
    elif isinstance(spec, dict):
        if spec.get("type") not in _CONTAINERS:
            raise FileError(
                f"{path} is refused: its outputs are in a {spec['type']!r}; return tensors, tuples or dicts"
            )
        _check_containers(path, spec.get("children_spec", []))


def _inputs(path: Path, graph: dict[str, Any]) -> tuple[Input, ...]:
    module = graph["graph_module"]
    users = [spec["user_input"]["arg"] for spec in module["signature"]["input_specs"] if "user_input" in spec]
    if not users or any("as_tensor" not in user for user in users):
        raise FileError(f"{path} has inputs that are no tensors; files of tensors can be run here")
    values = module["graph"]["tensor_values"]
    found = []
    for name in (user["as_tensor"]["name"] for user in users):
        sizes = tuple(size.get("as_int") for size in values[name]["sizes"])
        found.append(Input(name, sizes, _DTYPES.get(values[name]["dtype"])))
    return tuple(found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.export's own warnings and logs, which are about its insides."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
