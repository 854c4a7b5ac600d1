"""A setting that changes nothing is no setting: every value of every setting, against the default, on a tiny model.

A row says which values are tried, beside which other settings; each must give another plan, other numbers, or other
files than without it, or be refused there. What cannot be seen so says why. A new setting without a row fails, and so
does a new value of one that names its values.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from cases import on_grids, task_for, tiny
from residual_net import residual_net
from tersenet.errors import SettingsError
from tersenet.pruning.activation_penalty import KINDS
from tersenet.pruning.channel_scores import SCORES
from tersenet.pruning.prune_activations import SHARES
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.pruning.ramp import FROM_WEIGHTS
from tersenet.pruning.weight_scores import IMPORTANCES
from tersenet.quantization.quantize import RANGES, ROUNDING
from tersenet.quantization.quantize_aware import QuantizeAware
from tersenet.recipe import COMPANIONS, STEPS, step_class
from tersenet.step import Companion, Step
from tersenet.train import Train, loop
from tersenet.train.precision import FLOAT, Chosen

INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
CODES = ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "pq", *(f"pot{n}" for n in range(2, 9)),
         *(f"kmeans{n}" for n in range(1, 9)), *(f"binary{n}" for n in range(1, 5)))  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Values of one setting, tried beside others.

    Args:
        values: each must make a difference.
        beside: settings that both sides have.
        alike: value -> why it makes none.
    """

    values: tuple[Any, ...]
    beside: Mapping[str, Any] = field(default_factory=dict)
    alike: Mapping[Any, str] = field(default_factory=dict)


# Where and how something is computed, which is not to change what comes out; each has tests of its own.
WHERE = "where it runs, not what comes out"
NAMES = "names, see tests/test_step.py"
PARTS = "what it holds"

ROWS: dict[str, dict[str, Row | tuple[Row, ...] | str]] = {
    "binarise": {
        "method": Row(("bnn", "bwn", "xnor")),
        "stage": Row(("activations", "weights")),
        "edges": Row(("same",)),
    },
    "chain": {"steps": PARTS},
    "drop_blocks": {"blocks": Row((("block",),)), "count": Row((1,)), "refit": Row((False,), {"count": 1})},
    "fold_batch_norm": {},
    "keep_grids": {},
    "prune_activations": {
        "sparsity": Row((0.9,)),
        "share": Row(tuple(set(SHARES) - {"error"})),
        "per_channel": Row((True,)),
        "places": Row(("relu",), {"places": "inputs"}),
        "max_divergence": Row((1e-4,), {"sparsity": 0.9}),
        "samples": Row((16,)),
        "refit": Row((False,), {"sparsity": 0.9}),
    },
    "prune_channels": {
        "sparsity": Row((0.25,)),
        "importance": (
            Row(tuple(set(SCORES) - {"l2", "weighted", "random"})),
            Row(("weighted", "random")),
        ),
        "multiple_of": Row((8,), {"sparsity": 0.25}),
        "scope": (Row(("global",)), Row(("sensitivity",), {"macs": 0.7}), Row(("layer",), {"importance": "lamp"}, {})),
        "refit": Row((False,)),
        "macs": Row((0.8,)),
        "params": Row((0.8,)),
        "residual": Row((True,)),
        "widths": Row(({"first.conv1": 12},)),
        "balance": Row((0.0, 1.0), {"importance": "weighted"}),
        "percentile": Row((20.0,)),
        "threshold": Row((0.8,)),
        "keep": Row(({"last.conv1": [0, 1, 2]},)),
    },
    "prune_weights": {
        "sparsity": Row((0.2,)),
        "pattern": Row(("row", "column", "kernel", "filter", "4x1", "2:4")),
        "importance": (
            Row(tuple(set(IMPORTANCES) - {"l1", "l2"})),
            Row(("l2",), {"pattern": "row"}),
            Row((), {}, {"l2": "of single weights |w| and w^2 rank alike"}),
        ),
        "scope": (Row(("global",)), Row(("layer",), {"importance": "lamp"})),
        "percentile": Row((20.0,)),
        "threshold": Row((0.05,)),
        "refit": Row((True,)),
        "samples": Row((16,), {"refit": True}),
        "layers": Row(({"conv2": "0.5"},)),
    },
    "quantize": {
        "weights": (
            Row((*INTEGERS[:-1], "ternary")),
            Row((*INTEGERS[:-1], "ternary", *CODES), {"activations": None}),
        ),
        "activations": Row((None, *INTEGERS[:-1])),
        "ranges": (Row(tuple(set(RANGES) - {"mse"})), Row(("minmax",), {"activations": None, "weights": "int4"})),
        "percentile": Row((99.0,), {"ranges": "percentile"}),
        "samples": Row((16,)),
        "rounding": Row(tuple(set(ROUNDING) - {"nearest"}), {"weights": "int4", "activations": None}),
        "correct_bias": Row((True,), {"weights": "int4"}),
        "equalise": Row((True,)),
        "formats": Row(({"conv2": "int4"}, {"conv2": "float"})),
        "spare": Row((1,)),
        "offer": "choices of a search, see tests/quantization/test_mixed_precision.py",
        "granularity": Row(("tensor", 4), {"activations": None}),
        "symmetric": Row((False,), {"activations": None}),
        "piece": Row((2,), {"activations": None, "weights": "pq"}),
        "pieces": Row((16,), {"activations": None, "weights": "pq"}),
    },
    "quantize_aware": {
        "weights": Row(tuple(set(INTEGERS) - {"int4"})),
        "activations": Row((None, *set(INTEGERS) - {"int4"})),
        "method": Row(("dorefa", "pact")),
        "edges": Row(("same", "float")),
        "granularity": Row(("tensor",)),
        "samples": Row((16,)),
    },
    "repeat": {
        "steps": PARTS,
        "until_drop": Row((None,)),
        "at_most": Row((1,), {"until_drop": None}),
        "images": "how surely the drop is known",
    },
    "resize": {"sizes": Row((("8",),))},
    "rewind": {"to": "a file of the run, see tests/pruning/test_rewind.py"},
    "search": {
        "steps": PARTS,
        **dict.fromkeys(("latency", "bytes", "macs", "memory"), "the budget, see tests/search"),
        **dict.fromkeys(("runtime", "threads", "batch", "table"), "where a latency is measured"),
        "images": "how surely a loss is known",
        "widen": "other choices, see tests/search/test_search.py",
    },
    "settle": {},
    "share_weights": {"bits": Row((1, 2, 3, 5, 6, 7, 8)), "keep_zeros": Row((False,))},
    "shrink_file": {
        "bytes": Row(("0.2x",), {"price": 1e-8}),
        "max_drop": Row((30.0,), {"price": 1e-8}),
        "price": Row((1e-7,), {"price": 1e-8}),
        "samples": Row((16,), {"price": 1e-8}),
        "augmented": "which images are read, see tests/size/test_shrink_file.py",
        "images": "how surely the drop is known",
    },
    "ternarise": {"method": Row(("twn_exact", "ttq")), "granularity": Row(("tensor",)), "edges": Row(("same",))},
    "train": {
        "epochs": Row((0, 2)),
        "learning_rate": Row((0.1,)),
        "momentum": Row((0.5,)),
        "weight_decay": Row((0.1,)),
        "optimizer": Row(("adam", "adamw")),
        "schedule": Row(("constant",)),
        "warmup": Row((0.5,)),
        "companions": "see their own rows",
        "augment": "changes images of our readers, see tests/train",
        "keep": "what is kept where a training ended below its start, see tests/train/test_better.py",
        "label_weight": Row((0.5,)),
        "clip": Row((0.01,)),
        "precision": Row(("bf16-mixed",), {}, {"auto": "float32 where bf16 is no faster, as is said here"}),
        **dict.fromkeys(("accelerator", "devices", "strategy", "channels_last", "compile", "logger"), WHERE),
        **dict.fromkeys(("save_every_s", "max_hours"), "when it saves, and when it gives up"),
    },
    "activation_penalty": {"kind": Row(tuple(set(KINDS) - {"hoyer"})), "weight": Row((0.5,))},
    "freeze": {"begin": Row((0.0,)), "end": Row((0.6,)), "order": Row(("back",), {"begin": 0.0, "end": 0.9})},
    "group_lasso": {"strength": Row((1e-3,)), "growing": Row((True,)), "groups": Row(("channels", "kernels"))},
    "keep_early": {"at": "when the file is written, see tests/pruning/test_rewind.py", "path": "where it is written"},
    "ramp": {
        "sparsity": Row((0.8,)),
        "start": Row((0.2,), {"end": 0.9, "updates": 1}),
        "begin": Row((0.5,), {"updates": 2}),
        "end": Row((0.3,), {"updates": 2}),
        "updates": Row((1,)),
        "importance": (Row(("lamp",)), Row((), {}, {"l2": "of single weights |w| and w^2 rank alike"})),
        "scope": (Row(("global",)), Row(("layer",), {"importance": "lamp"})),
        "regrow": Row((True,)),
        "margin": Row((0.0,), {"regrow": True, "start": 0.5, "updates": 3, "end": 0.9}),
    },
    "scale_penalty": {"strength": Row((1e-2,)), "growing": Row((True,))},
    "soft_targets": {
        "temperature": Row((1.0,)),
        "weight": Row((0.1,)),
        "teacher": Row((residual_net(),)),
        "teachers": "files, see tests/distill",
    },
}
# What the settings stand on where the defaults say too little.
BEFORE: dict[str, tuple[Step, ...]] = {
    "ramp": (PruneWeights(sparsity=0.0),),
    "freeze": (QuantizeAware(activations=None),),
    "share_weights": (PruneWeights(sparsity=0.3),),
}
NEEDED: dict[str, dict[str, Any]] = {
    "ramp": {"sparsity": 0.6},
    "repeat": {"steps": (PruneWeights(percentile=30),), "until_drop": 100.0, "at_most": 2},
    "resize": {"sizes": ("12",)},
}
MODELS: dict[str, Callable[[int], nn.Module]] = {"prune_channels": residual_net, "keep_grids": on_grids}


def fields_of(name: str) -> dict[str, Any]:
    cls = step_class(name)
    hints = typing.get_type_hints(cls)
    return {each.name: hints[each.name] for each in dataclasses.fields(cls) if each.name not in ("only", "skip")}


def rows_of(name: str, setting: str) -> tuple[Row, ...]:
    found = ROWS[name][setting]
    return () if isinstance(found, str) else found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", [*STEPS, *COMPANIONS])
def test_every_setting_and_every_named_value_has_a_row(name: str) -> None:
    known = fields_of(name)
    assert set(ROWS[name]) == set(known)
    for setting, hint in known.items():
        rows = rows_of(name, setting)
        tried = {str(value) for row in rows for value in (*row.values, *row.alike)}
        named = [hint, *typing.get_args(hint)]
        allowed = {str(v) for each in named if typing.get_origin(each) is typing.Literal for v in typing.get_args(each)}
        default = next(each.default for each in dataclasses.fields(step_class(name)) if each.name == setting)
        missing = allowed - tried - {str(default), "16-mixed"}  # fp16 needs a GPU
        assert not rows or not missing, f"{name}.{setting}: {missing}"
    if name in ("ramp", "prune_weights"):
        wanted = set(FROM_WEIGHTS) if name == "ramp" else set(IMPORTANCES)
        assert wanted <= {v for row in rows_of(name, "importance") for v in (*row.values, *row.alike)} | {"l1"}


def outcome(name: str, settings: Mapping[str, Any]) -> str:
    """Everything that a step with these settings makes of the model: its plan, numbers and task; or that it refuses."""
    model = MODELS.get(name, tiny)(0)
    task = dataclasses.replace(task_for(tiny()), original=copy.deepcopy(model))
    if name == "prune_channels":
        task = dataclasses.replace(
            task, example=task.example[:, :, :8, :8], train=_cut(task.train), calibrate=_cut(task.calibrate)
        )
    part = step_class(name)(**settings)
    steps = (
        *BEFORE.get(name, ()),
        Train(epochs=1, learning_rate=0.3, companions=(part,)) if isinstance(part, Companion) else part,
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        for step in steps:
            model, plan = step.run(model, task)
            task = step.task_after(task, plan)
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    digest.update(str(tuple(task.example.shape)).encode())
    for key, value in model.state_dict().items():
        digest.update(f"{key} {value.shape} {value.dtype}".encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _cut(data: Any) -> Any:
    return [(x[:, :, :8, :8], y) for x, y in data]


# What many values, or slow ones, take too long for.
LONG = {
    ("binarise", "method"), ("prune_activations", "share"), ("prune_activations", "sparsity"),
    ("prune_channels", "importance"), ("prune_channels", "scope"), ("quantize", "activations"),
    ("quantize", "rounding"),
    ("quantize", "weights"), ("quantize_aware", "activations"), ("quantize_aware", "weights"), ("quantize", "ranges"),
    ("prune_activations", "max_divergence"), ("quantize_aware", "method"), ("train", "precision"),
}  # fmt: skip
BASE: dict[str, str] = {}
TRIED = [
    pytest.param(
        name,
        setting,
        row,
        id=f"{name}-{setting}-{number}",
        marks=[pytest.mark.minutes] if (name, setting) in LONG else [],
    )
    for name in ROWS
    for setting in ROWS[name]
    for number, row in enumerate(rows_of(name, setting))
]


@pytest.fixture
def float_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `precision: auto` finds by timing depends on the machine, and on what else runs there."""
    monkeypatch.setattr(loop, "faster", lambda once: Chosen(FLOAT, 0.5))


@pytest.mark.usefixtures("float_is_faster")
@pytest.mark.parametrize(("name", "setting", "row"), TRIED)
def test_every_value_makes_a_difference(name: str, setting: str, row: Row) -> None:
    beside = {**NEEDED.get(name, {}), **row.beside}
    budget = name == "shrink_file" and setting in ("bytes", "max_drop")
    if repr((name, beside)) not in BASE:
        BASE[repr((name, beside))] = outcome(name, beside)
    before = BASE[repr((name, beside))]
    for value in row.values:
        own = {**({} if budget else beside), setting: value}
        assert outcome(name, own) != before, f"{name}: {setting}: {value!r} changes nothing beside {beside}"
    for value, why in row.alike.items():
        assert why
        assert outcome(name, {**beside, setting: value}) == before, f"{value!r} does change something: move it"


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("prune_channels", {"balance": 0.1}, "changes nothing here: it is for importance: weighted"),
        ("prune_channels", {"sparsity": 0.3, "macs": 0.5}, "it is for cuts without macs; leave it out"),
        ("prune_channels", {"threshold": 0.5, "scope": "global"}, "changes nothing beside threshold"),
        ("prune_weights", {"threshold": 0.5, "scope": "global"}, "changes nothing beside threshold"),
        ("prune_weights", {"samples": 16}, "samples is 16.*refit, and importances that read data"),
        ("ramp", {"sparsity": 0.5, "margin": 0.3}, "margin is 0.3.*regrow: true"),
        ("ternarise", {"method": "ttq", "granularity": "tensor"}, "granularity is 'tensor'"),
        ("shrink_file", {"price": 1e-8, "images": 5}, "images is 5.*max_drop"),
        ("repeat", {"steps": (PruneWeights(),), "until_drop": None, "images": 5}, "images is 5.*until_drop"),
        ("quantize", {"percentile": 99.0}, "percentile is 99.0.*ranges: percentile"),
        ("quantize", {"piece": 2}, "piece is 2.*pq weights"),
        ("quantize", {"activations": None, "ranges": "divergence"}, "which is for activations"),
    ],
)  # fmt: skip
def test_a_setting_that_changes_nothing_is_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        step_class(name)(**settings)


def test_lamp_compares_layers_unless_asked_otherwise() -> None:
    """Within one layer it ranks as magnitudes do."""
    model = tiny()
    task = task_for(model)

    def zeros(**settings: Any) -> list[float]:
        made, _ = PruneWeights(sparsity=0.8, **settings).run(copy.deepcopy(model), task)
        return [float((layer.weight == 0).float().mean()) for layer in made.modules() if isinstance(layer, nn.Conv2d)]

    assert zeros(importance="lamp") == zeros(importance="lamp", scope="global") != zeros(importance="l1")
    assert zeros(importance="lamp", scope="layer") == zeros(importance="l1")
