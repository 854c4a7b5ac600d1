"""Turns a captured program into a graph whose nodes are the model's own layers.

The operators of one call of a leaf layer are folded back into one `call_module` node; operators on a layer's own
parameters become the layer that they are; what lies between stays aten operators.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from tersenet.bricks.brick import Brick
from tersenet.errors import TraceError
from tersenet.graph.calls import Calls, is_leaf
from tersenet.graph.lifted import bias_of, is_product, layer_of, weight_of
from tersenet.graph.open_batch import open_size
from tersenet.graph.outputs import nested

aten = torch.ops.aten


class Folder:
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
            layer = self.modules[path]
            alone = len(feeds) == 1 and len(outputs) == 1 and outputs[0] is members[-1]
            if alone and self.seen.plain(path, key):
                numbers = next(itertools.chain(layer.parameters(), layer.buffers()), None) is not None
                # Under one name, so that a layer with numbers that several modules hold is seen to be one.
                found.append((self.seen.first[path] if numbers else path, members, feeds.pop()))
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
        value = node.meta.get("val")
        if leaf != "weight" or not path or not isinstance(value, Tensor):  # such as a norm that gives its statistics
            return None
        if value.dtype != weight.meta["val"].dtype:
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
            if parametrize.is_parametrized(own) or isinstance(own, Brick):
                return None  # the operator computes with the numbers themselves, and not as the layer does
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
            new.meta["shape"] = tuple(self._hint(size, node) for size in value.shape)
            new.meta["dtype"] = value.dtype
            new.meta["open"] = value.dim() > 0 and open_size(value.shape[0])
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        new.meta["path"] = stack[-1][0] if stack and stack[-1][0] in self.modules else ""
        if _line(node):
            new.meta["line"] = _line(node)

    def _hint(self, size: Any, node: fx.Node) -> int:
        known = size if isinstance(size, int) else size.node.hint
        if known is None:
            raise TraceError(
                f"the forward of {type(self.model).__name__} makes a tensor whose size depends on values"
                f" ({_line(node) or node.target}); multiply by a mask, or use torch.where, so that sizes stay"
            )
        return int(known)


def _line(node: fx.Node) -> str:
    """The line of the forward that made a node; "" when it is not known."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _parameters_of(layer: nn.Module) -> set[str]:
    return {name for name, value in layer._parameters.items() if value is not None}


def _is_assertion(node: fx.Node) -> bool:
    name = str(node.target)
    return "_assert" in name or "sym_constrain_range" in name
