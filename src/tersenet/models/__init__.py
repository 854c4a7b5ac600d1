"""Reference networks by name.

One plain dictionary says where each comes from; nothing is built, downloaded or read until `build` is called. Weights
are read by `tersenet.models.weights`, and models from elsewhere are opened by `tersenet.models.sources`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tersenet.errors import ModelError
from tersenet.models import binary_resnet, cifar_resnet, digits, lenet, mobilenet_v2, resnet, vgg
from tersenet.task import Preparation

_CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The published weights of the CIFAR ResNets were trained with ImageNet's normalisation, so it is theirs too.
CIFAR10 = Preparation((32, 32), IMAGENET_MEAN, IMAGENET_STD, _CIFAR10_LABELS)
IMAGENET = Preparation((224, 224), IMAGENET_MEAN, IMAGENET_STD, crop=224 / 256)
# Mean and deviation of all training pixels.
MNIST = Preparation((28, 28), (0.1307,), (0.3081,), tuple("0123456789"))
# Mean and deviation of all pixels of scikit-learn's digits, divided by their largest value, 16.
DIGITS = Preparation((8, 8), (0.3053,), (0.3760,), tuple("0123456789"))


@dataclass(frozen=True)
class Reference:
    """A network that we can build: its factory, how its inputs are prepared, and one line about it."""

    factory: Callable[..., nn.Module]
    preparation: Preparation
    summary: str


REFERENCES: dict[str, Reference] = {
    "digits": Reference(digits.digits, DIGITS, "small residual net for scikit-learn's 8x8 digits"),
    "resnet20": Reference(cifar_resnet.resnet20, CIFAR10, "CIFAR ResNet-20, parameter-free shortcuts"),
    "resnet32": Reference(cifar_resnet.resnet32, CIFAR10, "CIFAR ResNet-32, parameter-free shortcuts"),
    "resnet44": Reference(cifar_resnet.resnet44, CIFAR10, "CIFAR ResNet-44, parameter-free shortcuts"),
    "resnet56": Reference(cifar_resnet.resnet56, CIFAR10, "CIFAR ResNet-56, parameter-free shortcuts"),
    "resnet110": Reference(cifar_resnet.resnet110, CIFAR10, "CIFAR ResNet-110, parameter-free shortcuts"),
    "binary_resnet20": Reference(
        binary_resnet.binary_resnet20, CIFAR10, "binary weights and activations, to be trained in two stages"
    ),
    "resnet18": Reference(resnet.resnet18, IMAGENET, "ImageNet ResNet-18, torchvision's names"),
    "resnet34": Reference(resnet.resnet34, IMAGENET, "ImageNet ResNet-34, torchvision's names"),
    "resnet50": Reference(resnet.resnet50, IMAGENET, "ImageNet ResNet-50, torchvision's names"),
    "resnet101": Reference(resnet.resnet101, IMAGENET, "ImageNet ResNet-101, torchvision's names"),
    "resnet152": Reference(resnet.resnet152, IMAGENET, "ImageNet ResNet-152, torchvision's names"),
    "mobilenet_v2": Reference(mobilenet_v2.mobilenet_v2, IMAGENET, "MobileNetV2, torchvision's names"),
    "vgg16": Reference(vgg.vgg16, IMAGENET, "VGG-16, torchvision's names"),
    "vgg16_bn": Reference(vgg.vgg16_bn, IMAGENET, "VGG-16 with batch norm, torchvision's names"),
    "vgg16_bn_cifar": Reference(vgg.vgg16_bn_cifar, CIFAR10, "VGG-16 with batch norm for 32x32 images"),
    "vgg16_bn_cifar_half": Reference(vgg.vgg16_bn_cifar_half, CIFAR10, "the same at half the width"),
    "mobilenet_v2_cifar": Reference(mobilenet_v2.mobilenet_v2_cifar, CIFAR10, "MobileNetV2 for 32x32 images"),
    "mobilenet_v2_cifar_half": Reference(
        mobilenet_v2.mobilenet_v2_cifar_half, CIFAR10, "MobileNetV2 for 32x32 images at half the width"
    ),
    "lenet_300_100": Reference(lenet.lenet_300_100, MNIST, "LeNet-300-100 for MNIST, two hidden layers"),
    "lenet5": Reference(lenet.lenet5, MNIST, "LeNet-5 for MNIST, Caffe's version with 431,080 parameters"),
}


def names() -> list[str]:
    """The names that `build` knows, in the order of the dictionary."""
    return list(REFERENCES)


def reference(name: str) -> Reference:
    """The entry of a name. Raises ModelError, naming near ones, when there is none."""
    if name not in REFERENCES:
        near = difflib.get_close_matches(name, REFERENCES, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the known ones are {', '.join(REFERENCES)}"
        raise ModelError(f"there is no model named {name!r}; {hint}")
    return REFERENCES[name]


def build(name: str, **kwargs: Any) -> nn.Module:
    """A freshly initialised model, in training mode as torch.nn leaves it.

    Args:
        name: one of `names()`.
        kwargs: of its factory, such as num_classes or width.
    Raises:
        ModelError: for an unknown name or argument.
    """
    factory = reference(name).factory
    known = inspect.signature(factory).parameters
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise ModelError(f"{name} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
    return factory(**kwargs)
