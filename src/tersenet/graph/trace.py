"""Captures a model's forward as a graph, in one place, on torch.export.

`torch.export` gives a flat list of aten operators. What the rest of tersenet wants is a graph whose nodes are the
model's own layers, so the operators of one call of a leaf layer (a torch.nn layer, a brick, a parametrized layer) are
folded back into one `call_module` node. The result is a torch.fx.GraphModule that shares its layers with the model,
keeps their paths, runs, trains and can be exported again; what lies between the layers stays aten operators.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize

from tersenet.bricks.brick import Brick
from tersenet.bricks.evaluating import evaluating
from tersenet.errors import TraceError

aten = torch.ops.aten
Example = Tensor | tuple[Tensor, ...]  # what a model is called with
_TORCH = str(Path(torch.__file__).parent)


def inputs_of(example: Example) -> tuple[Tensor, ...]:
    """The inputs of a model, with a batch of at least 2: torch.export would fix a batch of 1."""
    inputs = example if isinstance(example, tuple) else (example,)
    return tuple(torch.cat([x, x]) if len(x) == 1 else x for x in inputs)


def export(model: nn.Module, example: Example, dynamic_batch: bool = True) -> ExportedProgram:
    """torch.export in evaluation mode, with the batch left open where the model allows it.

    Args:
        model: its modes are put back afterwards.
        example: (N, ...), or a tuple of all inputs, each with the batch in front. A batch of 1 is doubled, unless it
            is to stay fixed.
    Raises:
        TraceError: when the forward cannot be captured; says where.
    """
    plain = example if isinstance(example, tuple) else (example,)
    inputs = inputs_of(example) if dynamic_batch else plain
    shapes = tuple({0: Dim.AUTO} for _ in inputs) if dynamic_batch else None
    try:
        with evaluating(model), torch.no_grad(), _silence(), _attributes_kept(model):
            return torch.export.export(model, inputs, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many kinds; each becomes one sentence
        raise TraceError(_why(model, error)) from error


def trace(model: nn.Module, example: Example) -> fx.GraphModule:
    """The model as a graph of its own layers.

    Every node has `meta["shape"]` (batch as in `example`, at least 2), `meta["dtype"]` and `meta["path"]`, the
    path of the module whose forward made it. Layers and parameters are shared with `model`, not copied.

    Raises:
        TraceError: when the forward cannot be captured; says where.
    """
    program = export(model, example)
    return _Folder(model, program).graph_module()


def said_input(example: Tensor) -> dict[str, Any]:
    """What a plan keeps of a model's input: {"shape", "dtype"}."""
    return {"shape": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}


def trace_with(model: nn.Module, said: Mapping[str, Any]) -> fx.GraphModule:
    """Captures a model with an input as a plan keeps it, on the model's own device."""
    device = next((p.device for p in model.parameters()), None)
    return trace(model, torch.zeros(said["shape"], dtype=getattr(torch, said["dtype"]), device=device))


def has_open_batch(graph: fx.GraphModule) -> bool:
    """Whether a traced graph takes batches of any size; some forwards fix the size that they were captured with."""
    return all(node.meta.get("open", False) for node in graph.graph.nodes if node.op == "placeholder")


class _Folder:
    """Turns one exported program into a graph of layers."""

    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self.model = model
        self.program = program
        self.modules = dict(model.named_modules(remove_duplicate=False))
        signature = program.graph_signature
        self.parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = {
            spec.arg.name: spec.target
            for spec in signature.input_specs
            if spec.kind == torch.export.graph_signature.InputKind.CONSTANT_TENSOR
        }
        self.root: dict[str, Any] = {}
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}

    def graph_module(self) -> fx.GraphModule:
        calls = self._calls()
        last = {members[-1]: (path, feed) for path, members, feed in calls}
        folded = {node for _, members, _ in calls for node in members}
        for node in self.program.graph.nodes:
            if node in last:
                path, feed = last[node]
                self.root[path] = self.modules[path]
                new = self.graph.call_module(path, (self._get(feed),))
            elif node in folded or (node.op == "call_function" and _is_assertion(node)):
                continue
            elif node.op == "placeholder":
                if node.name in self.parameters or node.name in self.constants:
                    continue  # fetched where it is used
                new = self.graph.placeholder(node.name)
            elif node.op == "output":
                outputs = fx.map_arg(node.args[0], self._get)
                self.graph.output(outputs[0] if len(outputs) == 1 else outputs)
                continue
            else:
                new = self._lift(node) or self.graph.call_function(
                    node.target, fx.map_arg(node.args, self._get), fx.map_arg(node.kwargs, self._get)
                )
            self.env[node] = new
            self._describe(new, node)
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        module = fx.GraphModule(self.root, self.graph, class_name="Graph")
        module.training = self.model.training
        spec = self.program.call_spec.out_spec  # the graph itself gives a flat list
        module.meta["outputs"] = torch.utils._pytree.tree_unflatten(range(spec.num_leaves), spec)
        return module

    def _calls(self) -> list[tuple[str, list[fx.Node], fx.Node]]:
        """(path, operators, input) of each call of a leaf layer that has one input and one output."""
        groups: dict[str, tuple[str, list[fx.Node]]] = {}
        for node in self.program.graph.nodes:
            if node.op != "call_function":
                continue
            for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                if path in self.modules and path and is_leaf(self.modules[path]):
                    groups.setdefault(key, (path, []))[1].append(node)
                    break
        found = []
        for path, members in groups.values():
            inside = set(members)
            feeds = {
                arg
                for node in members
                for arg in node.all_input_nodes
                if arg not in inside and arg.name not in self.parameters and arg.name not in self.constants
            }
            # The batch size may be read outside of the layer; it is the input's own, so it is no second input.
            feeds = {feed for feed in feeds if feed.target is not aten.sym_size.int}
            outputs = [node for node in members if any(user not in inside for user in node.users)]
            if len(feeds) == 1 and len(outputs) == 1 and outputs[0] is members[-1]:
                found.append((path, members, feeds.pop()))
        return found

    def _get(self, node: fx.Node) -> Any:
        if node in self.env:
            return self.env[node]
        if node.name in self.constants:
            target = self.constants[node.name]
            value: Any = self.program.constants[target]
            target = "constant_" + target.replace(".", "_")
        else:
            target = self.parameters[node.name]
            value = self.program.state_dict.get(target, self.program.constants.get(target))
            owner, _, leaf = target.rpartition(".")
            value = getattr(self.modules[owner], leaf, value) if owner in self.modules else value
        self.root[target] = value
        new = self.graph.get_attr(target)
        self.env[node] = new
        self._describe(new, node)
        return new

    def _lift(self, node: fx.Node) -> fx.Node | None:
        """A convolution, linear or norm operator on plain parameters becomes the layer that it is."""
        place = 2 if node.target in (aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default) else 1
        weight = node.args[place] if len(node.args) > place else None
        if not isinstance(weight, fx.Node) or weight.name not in self.parameters:
            return None
        path, _, leaf = self.parameters[weight.name].rpartition(".")
        inside = [owner for owner, _ in (node.meta.get("nn_module_stack") or {}).values()]
        own = self.modules.get(path)
        if leaf != "weight" or not path or (own is not None and is_leaf(own) and path in inside):
            return None
        others = [arg for arg in node.args[1:] if isinstance(arg, fx.Node)]
        if any(arg.name not in self.parameters for arg in others):
            return None  # such as a bias that is computed
        layer = _layer_of(node, self._parameter)
        if layer is None or any(
            not self.parameters[arg.name].startswith(path + ".")
            for arg in node.all_input_nodes
            if arg.name in self.parameters
        ):
            return None
        if own is not None and is_leaf(own):  # used by another module's forward, like the last layer of an attention
            alike = isinstance(own, type(layer)) and own.extra_repr() == layer.extra_repr()
            if not alike or parametrize.is_parametrized(own):  # such as its weight without its bias
                return None
            layer = own
        self.root.setdefault(path, layer)
        return self.graph.call_module(path, (self._get(node.args[0]),))  # type: ignore[arg-type]

    def _parameter(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        target = self.parameters[node.name]
        value = self.program.state_dict.get(target, self.program.constants.get(target))
        owner, _, leaf = target.rpartition(".")
        return getattr(self.modules[owner], leaf, value) if owner in self.modules else value

    def _describe(self, new: fx.Node, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            new.meta["shape"] = tuple(_hint(size) for size in value.shape)
            new.meta["dtype"] = value.dtype
            new.meta["open"] = value.dim() > 0 and _is_open(value.shape[0])
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        new.meta["path"] = stack[-1][0] if stack and stack[-1][0] in self.modules else ""
        if node.meta.get("stack_trace"):
            new.meta["line"] = node.meta["stack_trace"].strip().splitlines()[-1].strip()


def is_leaf(module: nn.Module) -> bool:
    """Whether the graph shows this module as one node: childless torch.nn layers, bricks, parametrized layers."""
    if isinstance(module, Brick) or parametrize.is_parametrized(module):
        return True
    if type(module) is nn.Module:  # a bare holder of parameters, as in an exported program
        return False
    return type(module).__module__.startswith("torch.nn.modules") and next(module.children(), None) is None


def _layer_of(node: fx.Node, value: Any) -> nn.Module | None:
    """The torch.nn layer with the same parameters as an aten operator."""
    args: list[Any] = [value(arg) if i else None for i, arg in enumerate(node.args)]
    layer: nn.Module
    if node.target is aten.conv2d.default:
        weight, bias, stride, padding, dilation, groups = (args + [None] * 7)[1:7]
        groups = 1 if groups is None else groups
        with torch.device("meta"):
            layer = nn.Conv2d(
                weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), tuple(stride or (1, 1)),
                tuple(padding or (0, 0)), tuple(dilation or (1, 1)), groups, bias=bias is not None,
            )  # fmt: skip
    elif node.target is aten.linear.default:
        weight, bias = (args + [None] * 3)[1:3]
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    elif node.target is aten.batch_norm.default:
        weight, bias, mean, variance, _, momentum, eps = args[1:8]
        if bias is None or mean is None or len(node.meta["val"].shape) != 4:
            return None
        layer = nn.BatchNorm2d(len(weight), eps=eps, momentum=momentum)
        layer.running_mean, layer.running_var = mean, variance
    elif node.target is aten.layer_norm.default:
        shape, weight, bias, eps = (args + [None] * 5)[1:5]
        layer = nn.LayerNorm(shape, eps=1e-5 if eps is None else eps, bias=bias is not None)
    elif node.target is aten.group_norm.default:
        groups, weight, bias, eps = (args + [None] * 5)[1:5]
        if bias is None:
            return None
        layer = nn.GroupNorm(groups, len(weight), eps=1e-5 if eps is None else eps)
    elif node.target is aten.rms_norm.default:
        shape, weight, eps = (args + [None] * 4)[1:4]
        layer = nn.RMSNorm(shape, eps=eps)
        layer.weight = weight
        return layer.eval()
    else:
        return None
    layer.weight, layer.bias = weight, bias
    return layer.eval()  # an exported program was captured in evaluation mode


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Puts the plain attributes of a model back as they were, and empties dictionaries of tensors meanwhile.

    Some forwards keep what they computed, such as position biases by device. What they compute while they are captured
    is no number to be used later; and what they have kept would be captured as a constant, which no cut reaches.
    """
    own = vars(nn.Module()).keys()
    modules = [(module, {k: v for k, v in vars(module).items() if k not in own}) for module in model.modules()]
    inside = [(v, copy.copy(v)) for _, was in modules for v in was.values() if type(v) in (dict, list)]
    for held, _ in inside:
        if isinstance(held, dict) and all(type(value) is Tensor for value in held.values()):
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


def _is_assertion(node: fx.Node) -> bool:
    name = str(node.target)
    return "_assert" in name or "sym_constrain_range" in name


def _is_open(size: Any) -> bool:
    """Whether a size can be any number; one that a forward turned into an int, as len() does, is fixed."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def _hint(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size.node.hint)


def _why(model: nn.Module, error: Exception) -> str:
    """One sentence on why torch.export failed: the user's own line, and what it said."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH, "<")) and frame.filename != __file__
    ]
    said = str(error).strip().splitlines()
    reason = said[0] if said else type(error).__name__
    if "data-dependent" in str(error).lower() or "GuardOnDataDependent" in type(error).__name__:
        reason = "its control flow depends on the values of a tensor; use torch.where, or move the decision outside"
    where = f" at {frames[-1].filename}, line {frames[-1].lineno} ({frames[-1].line})" if frames else ""
    return f"the forward of {type(model).__name__} cannot be captured{where}: {reason}"
