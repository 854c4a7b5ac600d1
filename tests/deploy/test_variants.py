"""Files of thinner and shallower networks, held against real exports of the network really cut."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from residual_net import residual_net, residual_task
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.variants import Variants
from tersenet.errors import ExportError
from tersenet.graph.costs import totals
from tersenet.pruning.drop_blocks import DropBlocks
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.quantization.quantize import Quantize
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.search.weigh import count_macs
from tersenet.step import Chain, Step

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.minutes

WIDTHS = {"first.conv1": 8, "down.conv1": 20, "last.conv1": 12, "last.conv2": 4}
CHANGES = {
    "thinner": ((), WIDTHS),
    "one block gone": (("first",), {}),
    "a bottleneck gone": (("last",), {}),
    "both": (("first", "last"), {}),
    "thinner without a block": (("first",), {"down.conv1": 8, "last.conv2": 8}),
}
# Quantizing folds the norms.
ROUNDINGS: dict[str, tuple[Step, ...]] = {"float": (FoldBatchNorm(),), "int8": (Quantize(),)}


def exported(steps: tuple[Step, ...], path: Path) -> tuple[Path, nn.Module]:
    model = residual_net()
    task = residual_task(model)
    made, _ = Chain(steps=steps).run(model, task)
    return export_onnx(made.eval(), task.example, path), made.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variants]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: Variants(exported(steps, folder / f"{name}.onnx")[0]) for name, steps in ROUNDINGS.items()}


def changed(blocks: tuple[str, ...], widths: dict[str, int]) -> tuple[Step, ...]:
    steps: list[Step] = [DropBlocks(blocks=blocks, refit=False)] if blocks else []
    return (*steps, *([PruneChannels(widths=widths, refit=False)] if widths else []))


def made(base: Variants, blocks: tuple[str, ...], widths: dict[str, int]) -> bytes:
    model = residual_net()
    step = PruneChannels(widths=widths)
    return base.make(step.plan(model, residual_task(model)).get("kept", {}) if widths else {}, blocks)


def operators(file: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(file).graph.node)


def optimised(file: bytes, folder: Path) -> Any:
    """The graph that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns that such a file is for this machine only
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


def outputs(file: bytes, count: int = 3) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((count, 3, 8, 8), dtype=np.float32)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_variant_is_what_the_exporter_would_write(
    bases: dict[str, Variants], rounding: str, change: str, tmp_path: Path
) -> None:
    blocks, widths = CHANGES[change]
    file = made(bases[rounding], blocks, widths)
    path, model = exported((*changed(blocks, widths), *ROUNDINGS[rounding]), tmp_path / "real.onnx")
    real = path.read_bytes()
    onnx.checker.check_model(onnx.load_from_string(file), full_check=True)
    assert operators(file) == operators(real)
    # The runtime fuses both alike: in int8 an integer bias of another scale would leave a float convolution.
    graph, wanted = (optimised(each, tmp_path) for each in (file, real))
    assert Counter(node.op_type for node in graph.node) == Counter(node.op_type for node in wanted.node)
    if rounding == "int8":
        assert not {node.op_type for node in graph.node} & {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "MatMul"}
        assert sum(node.op_type == "QLinearConv" for node in graph.node) >= 3
    shapes = [sorted(tuple(each.dims) for each in found.initializer if each.dims) for found in (graph, wanted)]
    assert shapes[0] == shapes[1]
    assert outputs(file).shape == outputs(real).shape == (3, 6)
    assert np.isfinite(outputs(file)).all()
    # Sizes agree up to names and to constants that happen to be equal.
    assert len(file) == pytest.approx(len(real), rel=0.1)
    macs = totals(model, torch.zeros(2, 3, 8, 8)).macs
    assert count_macs(file, (1, 3, 8, 8)) == count_macs(real, (1, 3, 8, 8)) == macs


def test_the_first_layer_left_in_float(bases: dict[str, Variants], tmp_path: Path) -> None:
    """Nothing is rounded in front of it; the runtime is left with the operators of the real export."""
    file = bases["int8"].make({}, (), ("conv",))
    real, _ = exported((Quantize(skip=("conv",)),), tmp_path / "real.onnx")
    graph, wanted = (optimised(each, tmp_path) for each in (file, real.read_bytes()))
    assert Counter(node.op_type for node in graph.node) == Counter(node.op_type for node in wanted.node)
    assert Counter(node.op_type for node in graph.node) != Counter(
        node.op_type for node in optimised(bases["int8"].make({}), tmp_path).node
    )
    assert outputs(file).shape == (3, 6)


def test_float_variants_give_the_networks_outputs(bases: dict[str, Variants], tmp_path: Path) -> None:
    """Nothing asks for the numbers, but sliced and bypassed float tensors are those of the cut network, so that every
    slice is seen to be the right one."""
    for index, (blocks, widths) in enumerate(CHANGES.values()):
        path, model = exported((*changed(blocks, widths), FoldBatchNorm()), tmp_path / f"{index}.onnx")
        found = outputs(made(bases["float"], blocks, widths))
        np.testing.assert_allclose(found, outputs(path.read_bytes()), atol=1e-4)
        x = np.random.default_rng(0).standard_normal((3, 3, 8, 8), dtype=np.float32)
        with torch.no_grad():
            np.testing.assert_allclose(found, model(torch.from_numpy(x)).numpy(), atol=1e-4)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nothing_changed_is_the_file(bases: dict[str, Variants], rounding: str) -> None:
    base = bases[rounding]
    before = base.model.SerializeToString()
    np.testing.assert_array_equal(outputs(base.make({})), outputs(before))
    made(base, ("first",), WIDTHS | {"first.conv1": 16})
    assert base.model.SerializeToString() == before  # variants do not change what they are made from


def test_integer_biases_fit_their_inputs(bases: dict[str, Variants]) -> None:
    """The scale of an integer bias is input scale x weight scale, behind a bypass too; or runtimes do not fuse."""
    graph = onnx.load_from_string(made(bases["int8"], ("first", "last"), {})).graph
    maker = {name: node for node in graph.node for name in node.output}
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    seen = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        scales = [values[maker[name].input[1]] for name in node.input]
        np.testing.assert_allclose(scales[2], scales[0] * scales[1], rtol=1e-6)
        seen += 1
    assert seen == 5


def test_what_the_file_does_not_have(bases: dict[str, Variants]) -> None:
    base = bases["float"]
    assert operators(base.make({"no.such.layer": {"out": [0]}})) == operators(base.make({}))  # a norm, folded
    with pytest.raises(ExportError, match=r"'middle' has no layer in the file"):
        base.make({}, ["middle"])
    with pytest.raises(ExportError, match=r"'linear' adds is read in 0 places"):
        base.make({}, ["linear"])


class Depthwise(nn.Module):
    """(N, 3, 8, 8) -> (N, 6), with a depthwise convolution and a linear layer behind a flattened map."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 16, 1)
        self.depth = nn.Conv2d(16, 16 * times, 3, padding=1, groups=16)
        self.narrow = nn.Conv2d(16 * times, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.one = nn.Linear(32, 16)
        self.two = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.narrow(torch.relu(self.depth(torch.relu(self.wide(x)))))
        return self.two(torch.relu(self.one(torch.relu(self.pool(x)).flatten(1))))


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        yield


@pytest.mark.parametrize(("rounding", "times"), [("float", 1), ("float", 2), ("int8", 1)])
def test_depthwise_and_linear_layers(rounding: str, times: int, tmp_path: Path) -> None:
    with seeded():
        model = Depthwise(times).eval()
    task = residual_task(model)
    steps: tuple[Step, ...] = (Quantize(),) if rounding == "int8" else ()
    base = Variants(
        export_onnx(Chain(steps=steps).run(copy.deepcopy(model), task)[0], task.example, tmp_path / "b.onnx")
    )
    cut = PruneChannels(widths={"wide": 8, "narrow": 4, "one": 12}, refit=False)
    file = base.make(cut.plan(model, task)["kept"])
    thin = Chain(steps=(cut, *steps)).run(copy.deepcopy(model), task)[0].eval()
    real = export_onnx(thin, task.example, tmp_path / "real.onnx").read_bytes()
    assert operators(file) == operators(real)
    assert count_macs(file, (2, 3, 8, 8)) == count_macs(real, (2, 3, 8, 8)) == totals(thin, task.example).macs
    fused = [Counter(node.op_type for node in optimised(each, tmp_path).node) for each in (file, real)]
    assert fused[0] == fused[1]
    if rounding == "float":
        np.testing.assert_allclose(outputs(file), outputs(real), atol=1e-5)
