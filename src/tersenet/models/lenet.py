"""The two networks for MNIST that papers on compression begin with.

LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 86(11), 1998. LeNet-300-100 has two
hidden layers; "LeNet-5" is the version of Caffe's example, with 431,080 parameters, as in Han et al., arXiv:1510.00149,
and not the paper's own: no ReLU follows a convolution, and max pooling takes the place of learned averages.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def lenet_300_100(num_classes: int = 10) -> nn.Sequential:
    """(N, 1, 28, 28) images to (N, num_classes) logits; 266,610 parameters for ten classes."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, num_classes),
        )
    )


def lenet5(num_classes: int = 10) -> nn.Sequential:
    """(N, 1, 28, 28) images to (N, num_classes) logits; 431,080 parameters for ten classes."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu=nn.ReLU(),
            fc2=nn.Linear(500, num_classes),
        )
    )
