"""Captures a model's forward as a graph, in one place, on torch.export.

`torch.export` gives a flat list of aten operators. What the rest of tersenet wants is a graph whose nodes are the
model's own layers, so the operators of one call of a leaf layer (a torch.nn layer, a brick, a parametrized layer) are
folded back into one `call_module` node. The result is a torch.fx.GraphModule that shares its layers with the model,
keeps their paths, runs, trains and can be exported again; what lies between the layers stays aten operators.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize

from tersenet.bricks.brick import Brick
from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.opened import unwrapped, wrapper
from tersenet.bricks.plain import has_hooks
from tersenet.errors import ModelError, TraceError
from tersenet.graph.agreement import check
from tersenet.graph.functional import functional
from tersenet.graph.lifted import bias_of, is_product, layer_of, weight_of
from tersenet.graph.open_batch import is_open, open_size, sizes_kept, why_fixed
from tersenet.graph.outputs import in_plain_containers, nested

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
    return _export(model, example, dynamic_batch, Calls(model))[0]


def _export(
    model: nn.Module, example: Example, dynamic_batch: bool, calls: Calls
) -> tuple[ExportedProgram, str | None]:
    """The program, and in words where the forward fixes the batch that was to stay open; None when it does not."""
    _refuse_wrapped(model)
    plain = example if isinstance(example, tuple) else (example,)
    inputs = inputs_of(example) if dynamic_batch else plain
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


def export_open(model: nn.Module, example: Example) -> tuple[ExportedProgram, str | None]:
    """A program without contexts and without writes that matter, and in words where the forward fixes the batch."""
    return _functional(model, example, Calls(model))


def _functional(model: nn.Module, example: Example, calls: Calls) -> tuple[ExportedProgram, str | None]:
    program, fixed = _export(model, example, True, calls)
    try:
        with _silence():
            return functional(program), fixed
    except Exception as error:  # torch's decomposition raises many kinds
        raise TraceError(_why(model, error)) from error


def _attempt(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool, calls: Calls) -> ExportedProgram:
    shapes = _open_shapes(model, inputs) if dynamic_batch else None
    try:
        with evaluating(model), torch.no_grad(), _silence(), _attributes_kept(model), calls.watching():
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


def trace(model: nn.Module, example: Example, permanent: bool = False) -> fx.GraphModule:
    """The model as a graph of its own layers, held against the model (graph/agreement.py).

    Every node has `meta["shape"]` (batch as in `example`, at least 2), `meta["dtype"]` and `meta["path"]`, the
    path of the module whose forward made it. Layers and parameters are shared with `model`, not copied. No operator
    writes into a tensor that another one reads.

    Args:
        permanent: weights that the forward computes from parameters alone, such as standardized ones, are computed
            once and become parameters of the graph, which the model does not have.
    Raises:
        TraceError: when the forward cannot be captured, or the graph would compute something else; says where.
    """
    calls = Calls(model)
    program, fixed = _functional(model, example, calls)
    graph = _Folder(model, program, calls, permanent).graph_module()
    graph.meta["fixed"] = fixed
    with _attributes_kept(model):  # the model runs here, too
        check(model, graph, inputs_of(example), fixed is None)
    return graph


def fixed_batch(graph: fx.GraphModule) -> str | None:
    """Why a traced graph takes one size of batch only, in one sentence; None when it takes any."""
    return graph.meta.get("fixed")


def said_input(example: Example) -> Any:
    """What a plan keeps of a model's input: {"shape", "dtype"}; of several inputs a list of these."""
    if isinstance(example, tuple):
        return [said_input(x) for x in example]
    return {"shape": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}


def trace_with(model: nn.Module, said: Any) -> fx.GraphModule:
    """Captures a model with inputs as a plan keeps them (`said_input`), on the model's own device."""
    device = next((p.device for p in model.parameters()), None)
    inputs = tuple(
        torch.zeros(each["shape"], dtype=getattr(torch, each["dtype"]), device=device)
        for each in (said if isinstance(said, list) else [said])
    )
    return trace(model, inputs if isinstance(said, list) else inputs[0])


def has_open_batch(graph: fx.GraphModule) -> bool:
    """Whether a traced graph takes batches of any size; some forwards fix the size that they were captured with."""
    return all(node.meta.get("open", False) for node in graph.graph.nodes if node.op == "placeholder")


class _Folder:
    """Turns one exported program into a graph of layers."""

    def __init__(self, model: nn.Module, program: ExportedProgram, calls: Calls, permanent: bool) -> None:
        self.model = model
        self.program = program
        self.seen = calls
        self.modules = dict(model.named_modules(remove_duplicate=False))
        signature = program.graph_signature
        self.parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = {
            spec.arg.name: spec.target
            for spec in signature.input_specs
            if spec.kind == torch.export.graph_signature.InputKind.CONSTANT_TENSOR
        }
        self.computed: dict[str, nn.Parameter] = {}
        if permanent:
            self._compute_weights()
        self.root: dict[str, Any] = {}
        self.renamed: dict[str, str] = {}
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}

    def graph_module(self) -> fx.GraphModule:
        calls = self._calls()
        last = {members[-1]: (path, feed) for path, members, feed in calls}
        folded = {node for _, members, _ in calls for node in members}
        self.root = {path: self.modules[path] for path, _, _ in calls}
        place = {node: i for i, node in enumerate(self.program.graph.nodes)}
        for node in self.program.graph.nodes:
            if node in last:
                path, feed = last[node]
                if any(place[user] > place[node] for user in feed.users):
                    path = self._not_in_place(path)
                new = self.graph.call_module(path, (self._get(feed),))
            elif node in folded or (node.op == "call_function" and _is_assertion(node)):
                continue
            elif node.op == "placeholder":
                if node.name in self.parameters or node.name in self.constants:
                    continue  # fetched where it is used
                new = self.graph.placeholder(node.name)
            elif node.op == "output":
                flat = fx.map_arg(self._outputs(node), self._get)
                spec = self.program.call_spec.out_spec
                self.graph.output(nested(list(flat), spec, type(self.model).__name__))
                continue
            elif node.op == "get_attr":
                raise TraceError(
                    f"the forward of {type(self.model).__name__} has control flow that depends on the values of a "
                    f"tensor ({_line(node) or node.target}); use torch.where, or move the decision outside"
                )
            else:
                new = self._lift(node) or self.graph.call_function(
                    node.target, fx.map_arg(node.args, self._get), fx.map_arg(node.kwargs, self._get)
                )
            self.env[node] = new
            self._describe(new, node)
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self._refuse_memory()
        self._unnest()
        module = fx.GraphModule(self.root, self.graph, class_name="Graph")
        module.training = self.model.training
        module.meta["renamed"] = self.renamed
        return module

    def _compute_weights(self) -> None:
        """Weights and biases that are made from parameters alone become parameters."""
        kinds = self.program.graph_signature
        fixed = {*kinds.inputs_to_parameters, *kinds.inputs_to_buffers, *self.constants}
        known: dict[fx.Node, str] = {}  # node -> the first parameter that it is made from
        for node in self.program.graph.nodes:
            sources = node.all_input_nodes
            if node.op == "placeholder" and node.name in fixed:
                known[node] = self.parameters.get(node.name, "")
                continue
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            if node.op == "call_function" and sources and not random and all(source in known for source in sources):
                known[node] = next((known[source] for source in sources if known[source]), "")
        for node in self.program.graph.nodes:
            for name, made in (("weight", weight_of(node)), ("bias", bias_of(node))):
                if not is_product(node) or not isinstance(made, fx.Node) or made.op != "call_function":
                    continue
                owner = known.get(made, "").rpartition(".")[0]
                if made in known and owner and made.name not in self.computed:
                    self.computed[made.name] = nn.Parameter(self._value(made).detach().clone())
                    self.parameters[made.name] = f"{owner}.{name}"

    def _value(self, node: Any) -> Any:
        """The number of a node that is made from parameters and constants alone."""
        if node.op == "placeholder":
            if node.name in self.constants:
                return self.program.constants[self.constants[node.name]]
            return self._parameter(node)
        with torch.no_grad():
            return node.target(*fx.map_arg(node.args, self._value), **fx.map_arg(node.kwargs, self._value))

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
        for key, (path, members) in groups.items():
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
            alone = len(feeds) == 1 and len(outputs) == 1 and outputs[0] is members[-1]
            if alone and self.seen.plain(self.modules[path], key):
                found.append((path, members, feeds.pop()))
        return found

    def _outputs(self, node: fx.Node) -> list[Any]:
        """The outputs that the model gives; what it writes into buffers and inputs is left out."""
        kind = torch.export.graph_signature.OutputKind.USER_OUTPUT
        specs = self.program.graph_signature.output_specs
        return [value for spec, value in zip(specs, node.args[0], strict=True) if spec.kind == kind]  # type: ignore[arg-type]

    def _refuse_memory(self) -> None:
        """A buffer that the forward changes may not decide what it gives: a file has no memory of earlier calls."""
        changed = set(self.program.graph_signature.buffers_to_mutate.values())
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target in changed:
                raise TraceError(
                    f"the forward of {type(self.model).__name__} changes its buffer {node.target} and computes with "
                    "it, so that what it gives depends on earlier calls, and a file has no memory of them; change it "
                    "in training only, behind `if self.training`"
                )

    def _not_in_place(self, path: str) -> str:
        """The layer for an input that others read afterwards: it must not write into it."""
        layer = self.modules[path]
        if not getattr(layer, "inplace", False):
            return path
        self.root[path] = copy.copy(layer)
        self.root[path].inplace = False
        return path

    def _unnest(self) -> None:
        """A layer that lies inside of another layer gets a name of its own: each is one node, and holds no other."""
        layers = [path for path, value in self.root.items() if isinstance(value, nn.Module)]
        for outer in sorted(layers, key=len):
            inside = [path for path in self.root if path.startswith(outer + ".") and outer in self.root]
            for path in inside:
                leaf = path[len(outer) + 1 :]
                value, layer = self.root[path], self.root[outer]
                if isinstance(value, Tensor) and {**layer._parameters, **layer._buffers}.get(leaf) is value:
                    continue
                new = self._free(f"{outer}_{leaf.replace('.', '_')}")
                self.root[new] = self.root.pop(path)
                self.renamed[path] = new
                for node in self.graph.nodes:
                    if node.op in ("call_module", "get_attr") and node.target == path:
                        node.target = new

    def _free(self, path: str) -> str:
        """The path, or with a number behind it where it is taken."""
        taken = {*self.root, *self.modules}
        names = (path, *(f"{path}_{i}" for i in range(1, 1 + len(taken) + 1)))
        return next(name for name in names if name not in taken)

    def _get(self, node: fx.Node) -> Any:
        if node in self.env:
            return self.env[node]
        if node.name in self.constants:
            target = self.constants[node.name]
            value: Any = self.program.constants[target]
            target = "constant_" + target.replace(".", "_")
        else:
            target = self.parameters[node.name]
            value = self._parameter(node)
        self.root[target] = value
        new = self.graph.get_attr(target)
        self.env[node] = new
        self._describe(new, node)
        return new

    def _lift(self, node: fx.Node) -> fx.Node | None:
        """A convolution, linear or norm operator on plain parameters becomes the layer that it is."""
        weight = weight_of(node)
        if not isinstance(weight, fx.Node) or weight.name not in self.parameters:
            return None
        path, _, leaf = self.parameters[weight.name].rpartition(".")
        if leaf != "weight" or not path or node.meta["val"].dtype != weight.meta["val"].dtype:
            return None
        others = [arg for arg in node.args[1:] if isinstance(arg, fx.Node)]
        if any(arg.name not in self.parameters for arg in others):
            return None  # such as a bias that is computed
        layer = layer_of(node, self._parameter)
        if layer is None or any(
            not self.parameters[arg.name].startswith(path + ".")
            for arg in node.all_input_nodes
            if arg.name in self.parameters
        ):
            return None
        own = self.modules.get(path)
        computed = any(arg.name in self.computed for arg in node.all_input_nodes)
        if computed and own is not None and is_leaf(own):
            path, own = self._free(path), None  # it is made of another layer's weight
        if own is not None and is_leaf(own):  # used by another module's forward, like the last layer of an attention
            if parametrize.is_parametrized(own):
                return None
            if isinstance(own, type(layer)) and own.extra_repr() == layer.extra_repr():
                layer = own
            elif _parameters_of(own) != _parameters_of(layer):
                return None  # such as its weight without its bias
        known = self.root.get(path)
        if known is not None and known is not layer:
            same = type(known) is type(layer) and known.extra_repr() == layer.extra_repr()
            if same and all(getattr(known, name) is value for name, value in layer.named_parameters()):
                layer = known
            elif not computed:
                return None  # the same weight with other settings, for which the model has no layer
            else:
                path = self._free(path)
        self.root[path] = layer
        return self.graph.call_module(path, (self._get(node.args[0]),))  # type: ignore[arg-type]

    def _parameter(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node.name in self.computed:
            return self.computed[node.name]
        if node.name not in self.parameters:
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
            new.meta["open"] = value.dim() > 0 and open_size(value.shape[0])
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        new.meta["path"] = stack[-1][0] if stack and stack[-1][0] in self.modules else ""
        if _line(node):
            new.meta["line"] = _line(node)


def _line(node: fx.Node) -> str:
    """The line of the forward that made a node; "" when it is not known."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _parameters_of(layer: nn.Module) -> set[str]:
    return {name for name, value in layer._parameters.items() if value is not None}


# Layers that are seen as the operators they are made of, whose channels graph/coupling.py can follow.
_FOLLOWED = (
    nn.GLU, nn.PixelUnshuffle, nn.modules.padding._CircularPadNd, nn.Unfold, nn.Fold, nn.Unflatten, nn.Embedding,
    nn.EmbeddingBag, nn.Bilinear, nn.CosineSimilarity, nn.PairwiseDistance, nn.LocalResponseNorm, nn.Softmax2d,
    nn.modules.pooling._MaxUnpoolNd,
)  # fmt: skip


def is_leaf(module: nn.Module) -> bool:
    """Whether the graph shows this module as one node: childless torch.nn layers, bricks, parametrized layers."""
    if isinstance(module, Brick):
        return True
    if has_hooks(module) or "forward" in vars(module):
        return False  # it computes what they make of it
    if parametrize.is_parametrized(module):
        return True
    if type(module) is nn.Module:  # a bare holder of parameters, as in an exported program
        return False
    if isinstance(module, _FOLLOWED) or (
        isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1
    ):
        return False
    return type(module).__module__.startswith("torch.nn.modules") and next(module.children(), None) is None


def _casts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class Calls:
    """Which calls of a model's layers, while it is captured, had one input and one output, and nothing else.

    Only those can be told again as a call of the layer; another argument, or a context that changes what an operator
    computes, would be lost.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        self.leaves = [module for module in model.modules() if is_leaf(module)]
        self.made: dict[int, list[bool]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.made.clear()
        handles = [leaf.register_forward_hook(self._hook(id(leaf)), with_kwargs=True) for leaf in self.leaves]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, identity: int) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [*args, *kwargs.values()]
            named = all(key in ("input", "x") for key in kwargs)
            one = len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor) and named
            plain = one and not _casts(output.device.type)
            self.made.setdefault(identity, []).append(plain)

        return note

    def plain(self, module: nn.Module, key: str) -> bool:
        """Whether the call of a layer that torch knows by this key ("...@2" is the third) was of that kind."""
        made = self.made.get(id(module), [])
        if self.names[id(module)] != 1:
            return bool(made) and all(made)  # torch counts the calls under each name
        number = int(key.rpartition("@")[2]) if "@" in key else 0
        return number < len(made) and made[number]


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
