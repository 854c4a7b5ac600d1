"""Which networks can be cut to half of their channels: all of torchvision's classifiers, many of timm's, and others.

Every network is opened with random weights at its own input size, in a process of its own with a time limit, on one
core. It is captured (torch.export, timed apart; seconds are those of the processor), its channels are coupled, half of
every bundle goes by chance, also of those that pass through residual additions, and the cut network runs. Then three
things are compared with the network as it was: the shapes of the outputs, the numbers of parameters, and the outputs
themselves: they must be those of the uncut graph in which every removed channel is zero wherever it appears (norms see
what is left).

    python benchmarks/coverage.py                     what is missing in benchmarks/results/coverage.json
    python benchmarks/coverage.py --only 'timm:*'     these again

Needs timm and torchvision. Writes docs/coverage.md from all results, old and new.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coverage_page import page, passed
from masked_twin import Zeroed, difference, half, leaves
from torch import Tensor, fx, nn

from tersenet.deploy.machine import machine
from tersenet.graph import capture
from tersenet.graph.coupling import Coupling, coupling
from tersenet.graph.recut import recut
from tersenet.graph.surgery import axes
from tersenet.models.sources import open_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
TIMM = [
    "convnext_atto", "convnextv2_atto", "efficientnet_b0", "efficientnetv2_rw_t", "mobilenetv3_large_100",
    "mobilenetv4_conv_small", "mobilenetv4_hybrid_medium", "regnetx_002", "regnety_002", "regnetz_b16", "resnest14d",
    "dla34", "hrnet_w18_small", "ghostnet_050", "ghostnetv2_100", "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "maxvit_nano_rw_256",
    "mobilevit_xxs", "mobilevitv2_050", "poolformer_s12", "mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224",
    "coatnet_nano_rw_224", "edgenext_xx_small", "fastvit_t8", "repvgg_a0", "repvit_m0_9", "tiny_vit_5m_224",
    "levit_128s", "efficientformer_l1", "efficientformerv2_s0", "pvt_v2_b0", "twins_svt_small", "cspresnet50",
    "cspdarknet53", "ese_vovnet19b_slim", "res2net50_14w_8s", "seresnet18", "skresnet18", "nf_regnet_b0",
    "densenetblur121d", "xception41", "inception_v4", "nasnetalarge", "pnasnet5large", "beit_base_patch16_224",
    "cait_xxs24_224", "xcit_nano_12_p16_224", "convmixer_768_32", "visformer_tiny", "caformer_s18", "focalnet_tiny_srf",
]  # fmt: skip
SEGMENTATION = [
    "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet50", "fcn_resnet101",
    "lraspp_mobilenet_v3_large",
]  # fmt: skip


def names() -> list[str]:
    """Everything on the list, in the order of the table."""
    open_model("torchvision:resnet18")  # loads it also where its compiled operators are missing
    torchvision = importlib.import_module("torchvision")
    classifiers = torchvision.models.list_models(module=torchvision.models)
    return [
        *(f"torchvision:{name}" for name in classifiers),
        *(f"timm:{name}" for name in TIMM),
        *(f"torchvision:{name}" for name in SEGMENTATION),
        "torchvision:ssdlite320_mobilenet_v3_large",
        "yolo",
    ]


class Raw(nn.Module):
    """A detector's backbone and heads, up to the raw outputs of the heads: no anchors, no suppression."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(images).values()))


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network with random numbers, also in its norms, and an input."""
    torch.manual_seed(0)
    short = name.partition(":")[2]
    if name == "yolo":
        spec = importlib.util.spec_from_file_location("yolo", ROOT / "tests" / "graph" / "yolo.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model, size = module.Yolo(), (256, 256)
    elif short in SEGMENTATION or short.startswith("ssdlite"):
        open_model("torchvision:resnet18")
        model = importlib.import_module("torchvision").models.get_model(short, weights=None, weights_backbone=None)
        model, size = (Raw(model), (320, 320)) if short.startswith("ssdlite") else (model, (224, 224))
    else:
        model, preparation = open_model(name)
        size = preparation.size
    settle(model)
    return model.eval(), torch.randn(1, 3, *size)


def settle(model: nn.Module) -> None:
    """Random numbers where a fresh network has equal ones: a layer scale of 1e-6 would hide a whole block."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            if parameter.dim() > 1 or bool((parameter == 0).all()):
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)


# --- one network ---------------------------------------------------------------------------------------------------


def one(name: str) -> dict[str, Any]:
    """What happens to one network; "error" says what stopped it."""
    model, example = build(name)
    spent: list[float] = []
    own = capture._attempt

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        program = own(*args, **kwargs)
        spent.append(time.process_time() - started)
        return program

    capture._attempt = timed  # type: ignore[assignment]
    row: dict[str, Any] = {"input": list(example.shape[1:]), "parameters": count(model)}
    started = time.process_time()
    known = coupling(model, example)
    row["coupling_seconds"] = time.process_time() - started - sum(spent)
    row["stays"] = stays(model, known, row["parameters"])
    row |= sides(model, known, row["parameters"])
    removed = half(known)
    with torch.no_grad():
        pair = torch.cat([example, torch.randn_like(example)])  # a graph is captured with a batch of 2
        before = leaves(model(example))
        expected = leaves(Zeroed(known, removed).run(pair))
        exports = sum(spent)
        started = time.process_time()
        model = recut(model, known.plan(model, removed)).eval()
        row["cut_seconds"] = time.process_time() - started - (sum(spent) - exports)
        row["export_seconds"] = sum(spent)
        row["left"] = count(model)
        row["traced"] = isinstance(model, fx.GraphModule)
        after, both = leaves(model(example)), leaves(model(pair))
    row["same_shapes"] = [t.shape for t in before] == [t.shape for t in after]
    if row["same_shapes"]:
        row["difference"] = max(difference(a, b) for a, b in zip(both, expected, strict=True))
    return row


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stays(model: nn.Module, known: Coupling, total: int) -> dict[str, float]:
    """Reason -> share of the parameters that are in layers of which nothing can go, the outputs' own layer left out."""
    free = {path for (path, _), classes in known.slots.items() if classes.any()}
    called = {str(node.target) for node in known.graph.graph.nodes if node.op in ("call_module", "get_attr")}
    shares: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        if path in free or name in free:
            continue
        why = known.frozen.get(path) or known.frozen.get(name)
        if why is None:
            used = name in called or any(path == one or path.startswith(one + ".") for one in called)
            why = "read by nothing that can be cut" if used else "not called in evaluation mode"
        if "the model's output" not in why:
            shares[shorter(why)] += parameter.numel() / total  # type: ignore[assignment]
    return {why: round(share, 4) for why, share in shares.most_common() if share >= 0.0005}


def sides(model: nn.Module, known: Coupling, total: int) -> dict[str, Any]:
    """{"at_most": how many times fewer parameters half of every channel can leave, "one_sided": kind -> share}.

    A weight with channels on both sides keeps a quarter; one with channels on one side keeps half: what makes the
    outputs, what reads the images, one number per channel (norms, biases, depthwise kernels).
    """
    left, seen = 0.0, set()
    shares: Counter[str] = Counter()
    for path, module in model.named_modules():
        known_axes = axes(module)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            whole = f"{path}.{name}" if path else name
            free = {
                role
                for role, axis in known_axes.items()
                if name in axis.tensors and known.slots.get((path, role), np.zeros(1)).any()
            }
            free |= {role for (owner, role), classes in known.slots.items() if owner == whole and classes.any()}
            left += parameter.numel() / 2 ** len(free)
            if len(free) < 2 and free:
                if parameter.dim() < 2 or "channel" in free:
                    kind = "one number or kernel per channel"
                elif "out" not in free and "out" in known_axes:
                    kind = "outputs" if "the model's output" in known.frozen.get(path, "") else "outputs that stay"
                else:
                    kind = "inputs that stay"
                shares[kind] += parameter.numel() / total  # type: ignore[assignment]
    return {"at_most": total / left, "one_sided": {kind: round(share, 4) for kind, share in shares.most_common()}}


def shorter(why: str) -> str:
    """A reason without the place: the same reason in many layers is one."""
    why = re.sub(r"(?<=when they are cut): .*", "", why)
    return re.sub(r"^(\S+) in (?:.*\) |the model's own forward |\S+ )(.*)$", r"\1 \2", why)


# --- all of them ---------------------------------------------------------------------------------------------------


def _child(name: str, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    try:
        pipe.send(one(name))
    except Exception as error:  # noqa: BLE001 - whatever stops a network is its result
        text = str(error).strip().splitlines() or [""]
        pipe.send({"error": f"{type(error).__name__}: {text[0][:400]}", "traceback": traceback.format_exc()[-3000:]})


def apart(name: str, limit: float) -> dict[str, Any]:
    """`one` in a process of its own."""
    context = multiprocessing.get_context("fork")  # what was imported need not be imported again
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, theirs))
    started = time.perf_counter()
    child.start()
    theirs.close()
    row: dict[str, Any] = {"error": f"took longer than {limit:g} s"}
    try:
        if ours.poll(limit):
            row = ours.recv()
    except EOFError:
        row = {"error": "the process died"}
    child.kill()
    child.join()
    return {**row, "all_seconds": time.perf_counter() - started}


def warm() -> None:
    """Imports once what torch.export needs."""
    coupling(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(), torch.zeros(1, 3, 8, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="networks that match this pattern, also those that are there already")
    parser.add_argument("--failed", action="store_true", help="those that do not pass, again")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one network")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    log: dict[str, Any] = {"networks": {}}
    if arguments.results.exists():
        log = json.loads(arguments.results.read_text())
    everything = names()
    import timm  # noqa: F401 - once, before the processes part

    warm()
    if arguments.only:
        chosen = [name for name in everything if fnmatch.fnmatch(name, arguments.only)]
    else:
        again: Callable[[str], bool] = lambda name: arguments.failed and not passed(log["networks"][name])  # noqa: E731
        chosen = [name for name in everything if name not in log["networks"] or again(name)]
    for name in chosen:
        row = apart(name, arguments.limit)
        print(row.pop("traceback", ""), end="", file=sys.stderr)  # paths of this machine are no result
        log["networks"][name] = row
        log.update(machine=machine(), threads=1)
        arguments.results.write_text(json.dumps(log, indent=1) + "\n")
        print(name, json.dumps(row), flush=True)
    arguments.out.write_text(page(log, everything))


if __name__ == "__main__":
    main()
