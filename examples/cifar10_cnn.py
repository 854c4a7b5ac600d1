"""The textbook's pruning example, done so that its figures can be believed. Run it from the project's folder:

    python examples/cifar10_cnn.py --data parquet:cifar10 --epochs 3

A plain network (conv 64 - conv 128 - fc 1024 - fc 10) learns CIFAR-10. Its neurons are ranked by weights, activations
and gradients; those below the 90th percentile are taken out together with their connections; what is left is trained
again, rounded to 8 bits, and written as an ONNX file, which is then scored and timed in ONNX Runtime.

What snippets of this kind often get wrong, and where it is done right below:

1. They cut filters of conv2 and leave fc1 as it was. Each channel of conv2 is 64 inputs of fc1 (8 x 8 places after
   pooling), which have to go, too.                                                                  -> step 4
2. They set weights to zero and call the network smaller. Dense kernels multiply zeros as slowly as any other number;
   here the layers really shrink.                                                                    -> step 4
3. They choose on the images that they later report, or report accuracy on training images. Here choices are made on
   held-out training images, and the test set is read for the report only.                           -> steps 1 and 3
4. They "quantize" by rounding floats in PyTorch. Here the file holds integers and the runtime multiplies integers.
                                                                                                     -> steps 6 and 7

What it printed (CIFAR-10, 3 epochs and 3 again, seed 0, one core of a Xeon with AMX; files scored in ONNX Runtime on
the 10,000 test images, 95 % intervals of 0.9 to 1.0 points to each side):

                      parameters        MACs  file bytes   test accuracy
    original           8,475,530  29,042,688  33,903,910         70.94 %
    neurons removed       87,867     489,926     353,242         34.64 %
    trained again         87,867     489,926     353,242         58.90 %
    8 bits                87,867     489,926      94,582         58.81 %

On the held-out images, cut and not yet trained again (70.22 % before): by weights 27.98 %, by gradients 28.24 %, by
activations 32.90 %, by all three 34.20 %, and at random 24.58 %: the importance matters less than training again. The
tenth of the neurons that stays is a hundredth of the parameters, and costs 12 points.

Stop it at any moment and call it again: it goes on where it stopped. Data is read by the extra tersenet[data].
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet import Preparation, PruneChannels, Quantize, Run, SoftTargets, Task, Train, compress, open_task
from tersenet.models.weights import load_weights, save_weights
from tersenet.task import score_model

# Mean and deviation of CIFAR-10's training images, per colour.
CIFAR10 = Preparation(size=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
PERCENTILE = 90
HIDDEN = ("conv1", "conv2", "fc1")  # the layers whose neurons are ranked; fc2 gives the ten classes and stays


class SmallCNN(nn.Module):
    """(N, 3, 32, 32) -> (N, 10). The neurons of a convolution are its filters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 128, 3, padding=1)
        self.fc1 = nn.Linear(128 * 8 * 8, 1024)
        self.fc2 = nn.Linear(1024, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (N, 64, 16, 16)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (N, 128, 8, 8)
        x = F.relu(self.fc1(x.flatten(1)))  # (N, 1024)
        return self.fc2(x)


def cifar10(args: argparse.Namespace, model: nn.Module) -> Task:
    """Step 1: the data. A tenth of the training images is held out: the network never trains on it, so it may judge."""
    task = open_task(model, CIFAR10, args.data, batch_size=args.batch_size, seed=args.seed)
    images = task.train if args.images is None else task.train.subset(args.images, seed=args.seed)
    held_out, rest = images.split(0.1, seed=args.seed)
    return dataclasses.replace(
        task,
        train=rest,  # shuffled, cropped and flipped, as the data's name asks for
        validate=held_out.like(shuffle=False, augment=None),
        calibrate=rest.like(shuffle=False, augment=None).subset(1024, seed=args.seed),
    )


def train_once(args: argparse.Namespace, model: nn.Module, task: Task) -> None:
    """Step 2: the network to start from. The training saves itself in a folder and goes on after a cut."""
    weights = args.out.parent / f"{args.out.name}-original.safetensors"
    if weights.exists():
        load_weights(model.eval(), weights)
        return
    state = args.out.parent / f"{args.out.name}-original.state"
    train = Train(epochs=args.epochs, optimizer="adamw", learning_rate=1e-3, warmup=0.05, precision="auto")
    train.run(model, dataclasses.replace(task, folder=state))
    save_weights(model, weights)


def scores(model: nn.Module, task: Task) -> dict[str, dict[str, Tensor]]:
    """Step 3a: what each neuron is worth: {importance: {layer: (neurons,)}}, from training images only.

    - weights: mean |w| of what comes in;
    - activations: mean |a| of what goes out, after the ReLU;
    - gradients: mean |d loss / d w| of what comes in, averaged over batches;
    - all three: their sum.
    Each is divided by its mean over the layer, because a gradient of 1e-4 and an activation of 2 cannot be added.
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in HIDDEN}
    found = {kind: dict.fromkeys(HIDDEN, torch.tensor(0.0)) for kind in ("weights", "activations", "gradients")}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            a = F.relu(output.detach())  # (N, neurons) or (N, neurons, H, W)
            found["activations"][name] = found["activations"][name] + a.transpose(0, 1).flatten(1).mean(1)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    for batch in task.calibrate:
        loss = task.loss(task.forward(model, batch), batch)
        grads = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
        for name, grad in zip(HIDDEN, grads, strict=True):
            found["gradients"][name] = found["gradients"][name] + grad.abs().flatten(1).mean(1)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        found["weights"][name] = layer.weight.detach().abs().flatten(1).mean(1)
    relative = {kind: {name: s / s.mean() for name, s in by_layer.items()} for kind, by_layer in found.items()}
    relative["all three"] = {
        name: torch.stack([by_layer[name] for by_layer in relative.values()]).sum(0) for name in HIDDEN
    }
    generator = torch.Generator().manual_seed(task.seed)  # the control: an importance must beat knowing nothing
    relative["random"] = {name: torch.rand(len(layer.weight), generator=generator) for name, layer in layers.items()}
    return relative


def kept(by_layer: dict[str, Tensor]) -> dict[str, list[int]]:
    """Step 3b: the neurons at or above the 90th percentile of their layer: 7 of 64, 13 of 128, 103 of 1024."""
    return {
        name: torch.nonzero(score >= torch.quantile(score, PERCENTILE / 100)).flatten().tolist()
        for name, score in by_layer.items()
    }


def removal(keep: dict[str, list[int]]) -> PruneChannels:
    """Step 4: removal of all other neurons with their connections.

    The step follows each channel through ReLU, pooling and flatten, and cuts what reads it: the kernels of conv2 over a
    channel of conv1, the 64 columns of fc1 over a channel of conv2, the column of fc2 over a neuron of fc1. Then the
    readers make up for what they lost by least squares on training images (refit), before any training.

    The library has importances of its own: PruneChannels(importance="weighted", percentile=90) is steps 3 and 4 with
    weights and activations; the names are listed in its help.
    """
    return PruneChannels(keep=keep, refit=True)


def chosen(args: argparse.Namespace, model: nn.Module, task: Task) -> dict[str, list[int]]:
    """Step 3c: the importance whose cut loses least on the held-out images, before any retraining.

    The lists are kept in a file, so that a run that goes on does not choose again. They may be edited by hand before
    the run begins: what cannot be cut that way is refused with the reason.
    """
    path = args.out.parent / f"{args.out.name}-keep.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    print(f"\nheld-out accuracy {percent(score_model(model, task, task.validate).value)}; after the cut, untrained:")
    best, best_score = {}, -1.0
    for kind, by_layer in scores(model, task).items():
        keep = kept(by_layer)
        smaller, _ = removal(keep).run(copy.deepcopy(model), task)
        score = score_model(smaller, task, task.validate).value
        print(f"  by {kind:12} {percent(score)}")
        if score > best_score and kind != "random":
            best, best_score = keep, score
    path.write_text(json.dumps(best), encoding="utf-8")
    return best


def main() -> None:
    args = arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model: nn.Module = SmallCNN()
    task = cifar10(args, model)
    train_once(args, model, task)
    steps = (
        removal(chosen(args, model, task)),
        # Step 5: what is left learns again, from the labels and from the original's softened answers.
        Train(
            epochs=args.epochs,
            optimizer="adamw",
            learning_rate=2e-3,
            precision="auto",
            companions=(SoftTargets(temperature=4.0),),
        ),
        # Step 6: 8 bits. Weights get a scale per neuron, activations one per tensor, chosen on training images. That
        # makes the file smaller; whether it is also faster in layers as narrow as these, the table at the end says.
        Quantize(weights="int8", activations="int8"),
    )
    # Step 7: the run. Each step is saved when it is done. At the end every stage is written as a file, compared with
    # PyTorch output by output, scored on the test set in ONNX Runtime itself, and timed in turns with the others.
    run = compress(model, task, steps, out=args.out, runtimes=("onnxruntime",), names={"model": "small CNN"})
    show(run)


def show(run: Run) -> None:
    """The table that such an article should end with: of files, on test images, in the runtime."""
    print(f"\n{'':20} {'parameters':>11} {'MACs':>11} {'file bytes':>11} {'ms':>7}  test accuracy, 95 % interval")
    for row in run.rows:
        low, high = row["score_interval"]
        print(
            f"{row['step']:20} {row['params']:11,} {row['macs']:11,} {row['file_bytes']['onnx']:11,} "
            f"{row['latency_ms']['onnxruntime']['median']:7.3f}  {percent(row['score'])} "
            f"({percent(low)} to {percent(high)}), {row['samples']} images in ONNX Runtime"
        )
    error = run.report["files"]["model.onnx"]["max_abs_error"]
    print(f"\n{run.file('model.onnx')}: differs from PyTorch by {error:.2g} at most; {run.folder / 'report.html'}")


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="parquet:DIR, folder:DIR or hf:cifar10")
    parser.add_argument("--epochs", type=int, default=3, help="of the first training, and again of the retraining")
    parser.add_argument("--images", type=int, help="use only so many training images, to try it out")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_cnn"), help="the run folder")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
