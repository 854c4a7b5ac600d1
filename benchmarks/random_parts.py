"""Random networks from the parts that image networks are made of: who reads whose output is drawn too.

Residual blocks, parallel branches, concatenations, splits, slices, layers that are used twice, attention over pixels,
two inputs and several outputs, with the settings of every layer drawn. Every choice comes from one function, so that a
seed makes a network, and so does a strategy of hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Choose = Callable[[Sequence[Any]], Any]
SIDE = 12
_MOST_PARTS = 9


class Part(nn.Module):
    """A function of tensors with the layers that it calls."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *values: Tensor) -> Any:
        return self.function(self, *values)


class Parameters(nn.Module):
    """A parameter that is read outside of any layer."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(0.5 + torch.rand(shape))


class RandomNetwork(nn.Module):
    """Images (N, C, H, W), one or two, to logits, alone or with further outputs in a tuple or a dict."""

    def __init__(self, steps: list[tuple[str, list[int]]], parts: dict[str, nn.Module], inputs: int, form: str) -> None:
        super().__init__()
        self.steps, self.inputs, self.form = steps, inputs, form
        self.parts = nn.ModuleDict(parts)

    def _run(self, values: list[Tensor]) -> Any:
        outputs = []
        for name, sources in self.steps:
            made = self.parts[name](*[values[i] for i in sources])
            if name.startswith("head"):
                outputs.append(made)
            else:
                values.extend(made if isinstance(made, tuple) else (made,))
        if self.form == "one":
            return outputs[0]
        return {f"out{i}": value for i, value in enumerate(outputs)} if self.form == "dict" else tuple(outputs)


class OneInput(RandomNetwork):
    def forward(self, x: Tensor) -> Any:
        return self._run([x])


class TwoInputs(RandomNetwork):
    def forward(self, x: Tensor, z: Tensor) -> Any:
        return self._run([x, z])


def network(choose: Choose) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network in evaluation mode with random numbers, and an example of its inputs, each (2, C, H, W).

    Args:
        choose: picks one of several; the same picks make the same network, numbers apart.
    """
    maker = _Maker(choose)
    inputs = 1 + choose([0, 0, 0, 1])
    for _ in range(inputs):
        maker.values.append((3, SIDE, SIDE))
    for i in range(inputs):
        maker.stem(i)
    for _ in range(choose(range(3, _MOST_PARTS + 1))):
        maker.part()
    form = choose(["one", "one", "one", "tuple", "dict"])
    maker.heads(1 if form == "one" else choose([1, 2]))
    kind = OneInput if inputs == 1 else TwoInputs
    model = kind(maker.steps, maker.parts, inputs, form)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.InstanceNorm2d) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
            if getattr(module, "running_var", None) is not None:
                module.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr,operator]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    return model.eval(), tuple(torch.randn(2, 3, SIDE, SIDE) for _ in range(inputs))


class _Maker:
    """Draws parts; `values` are the shapes (C, H, W) of what has been made."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.values: list[tuple[int, int, int]] = []
        self.steps: list[tuple[str, list[int]]] = []
        self.parts: dict[str, nn.Module] = {}
        self.convolutions: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {}

    def put(self, kind: str, module: nn.Module, sources: list[int], *shapes: tuple[int, int, int]) -> int:
        name = f"{kind}{len(self.parts)}"
        self.parts[name] = module
        self.steps.append((name, sources))
        self.values.extend(shapes)
        return len(self.values) - 1

    def pick(self, least_side: int = 1) -> int:
        """One of the values, the last ones more often."""
        fit = [i for i, shape in enumerate(self.values) if shape[0] > 3 and shape[1] >= least_side]
        return self.choose([*fit, *fit[-2:], fit[-1], fit[-1]])

    def stem(self, source: int) -> None:
        channels = self.choose([8, 12, 16])
        layer = nn.Conv2d(3, channels, 3, padding=1, bias=self.choose([True, False]))
        i = self.put("stem", layer, [source], (channels, SIDE, SIDE))
        if self.choose([True, True, False]):
            i = self.put("norm", nn.BatchNorm2d(channels), [i], self.values[i])
        self.put("act", self.activation(), [i], self.values[i])

    def activation(self) -> nn.Module:
        kinds = [nn.ReLU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.ELU,
                 nn.PReLU, nn.Hardsigmoid, nn.Identity]  # fmt: skip
        return self.choose(kinds)()

    def part(self) -> None:
        kinds: list[Callable[[], Any]] = [
            self.convolution, self.convolution, self.convolution, self.depthwise, self.norm, self.active, self.pool,
            self.addition, self.residual, self.residual, self.concatenation, self.split, self.slices, self.upsample,
            self.gate, self.attention, self.shuffle, self.scale, self.offset, self.again, self.tokens, self.pad,
            self.transposed, self.product,
        ]  # fmt: skip
        self.choose(kinds)()

    def convolution(self) -> None:
        i = self.pick(3)
        c, h, w = self.values[i]
        groups = self.choose([1, 1, 1, 2, 4]) if c % 4 == 0 else 1
        out = self.choose([8, 12, 16])
        kernel, stride, dilation = self.choose([1, 3, 3, 5]), self.choose([1, 1, 2]), self.choose([1, 1, 1, 2])
        dilation = dilation if kernel == 3 else 1
        padding = dilation * (kernel // 2)
        layer = nn.Conv2d(c, out, kernel, stride, padding, dilation, groups, bias=self.choose([True, True, False]))
        shape = (out, (h - 1) // stride + 1, (w - 1) // stride + 1)
        j = self.put("conv", layer, [i], shape)
        self.convolutions[self.steps[-1][0]] = ((c, h, w), shape)
        if self.choose([True, False]):
            j = self.put("norm", nn.BatchNorm2d(out), [j], shape)
        if self.choose([True, False]):
            self.put("act", self.activation(), [j], shape)

    def depthwise(self) -> None:
        i = self.pick(3)
        c, h, w = self.values[i]
        times = self.choose([1, 1, 2])
        self.put("depthwise", nn.Conv2d(c, c * times, 3, padding=1, groups=c), [i], (c * times, h, w))

    def transposed(self) -> None:
        i = self.pick()
        c, h, w = self.values[i]
        if h > SIDE:
            return
        self.put("transposed", nn.ConvTranspose2d(c, 8, 2, 2), [i], (8, 2 * h, 2 * w))

    def norm(self) -> None:
        i = self.pick(2)
        c = self.values[i][0]
        kind = self.choose(["batch", "batch", "group", "layer", "instance"])
        if kind == "layer":
            part: nn.Module = Part(
                lambda self, x: self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(c)
            )
        elif kind == "group":
            part = nn.GroupNorm(self.choose([1, 2, c]) if c % 2 == 0 else 1, c)
        elif kind == "instance":
            part = nn.InstanceNorm2d(c, affine=True, track_running_stats=self.choose([True, False]))
        else:
            part = nn.BatchNorm2d(c)
        self.put("norm", part, [i], self.values[i])

    def active(self) -> None:
        i = self.pick()
        self.put("act", self.activation(), [i], self.values[i])

    def pool(self) -> None:
        i = self.pick(4)
        c, h, w = self.values[i]
        ceil, padding = self.choose([False, True]), self.choose([0, 0, 1])
        if self.choose([True, False]):
            part: nn.Module = nn.MaxPool2d(3, 2, padding, ceil_mode=ceil)
        else:
            part = nn.AvgPool2d(3, 2, padding, ceil_mode=ceil, count_include_pad=self.choose([True, False]))
        side = part(torch.zeros(1, 1, h, w)).shape[-1]
        self.put("pool", part, [i], (c, side, side))

    def _pair(self) -> tuple[int, int] | None:
        """Two values of one shape."""
        i = self.pick()
        others = [j for j, shape in enumerate(self.values) if shape == self.values[i] and j != i]
        return (i, self.choose(others)) if others else None

    def addition(self) -> None:
        pair = self._pair()
        if pair is not None:
            self.put("add", Part(lambda self, x, y: x + y), list(pair), self.values[pair[0]])

    def product(self) -> None:
        pair = self._pair()
        if pair is not None:
            self.put("product", Part(lambda self, x, y: x * y), list(pair), self.values[pair[0]])

    def residual(self) -> None:
        i = self.pick(3)
        c = self.values[i][0]
        inner = self.choose([c, 8, 16])
        branch = nn.Sequential(
            nn.Conv2d(c, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), self.activation(),
            nn.Conv2d(inner, c, self.choose([1, 3]), padding="same"), nn.BatchNorm2d(c),
        )  # fmt: skip
        j = self.put("residual", Part(lambda self, x: x + self.branch(x), branch=branch), [i], self.values[i])
        if self.choose([True, False]):
            self.put("act", self.activation(), [j], self.values[j])

    def concatenation(self) -> None:
        i = self.pick()
        c, h, w = self.values[i]
        others = [j for j, shape in enumerate(self.values) if shape[1:] == (h, w) and shape[0] > 3]
        j = self.choose(others)
        if c + self.values[j][0] <= 48:
            shape = (c + self.values[j][0], h, w)
            self.put("concat", Part(lambda self, x, y: torch.cat([x, y], 1)), [i, j], shape)

    def split(self) -> None:
        i = self.pick()
        c, h, w = self.values[i]
        if c % 2 or c < 8:
            return
        half = (c // 2, h, w)
        if self.choose([True, False]):
            self.put("split", Part(lambda self, x: tuple(x.chunk(2, 1))), [i], half, half)
        else:
            self.put(
                "split", Part(lambda self, x: tuple(x.split([4, x.shape[1] - 4], 1))), [i], (4, h, w), (c - 4, h, w)
            )

    def slices(self) -> None:
        i = self.pick(4)
        c, h, w = self.values[i]
        kind = self.choose(["channels", "stride", "crop", "flip"])
        if kind == "channels" and c >= 8:
            self.put("slice", Part(lambda self, x: x[:, 2:-2]), [i], (c - 4, h, w))
        elif kind == "stride":
            self.put("slice", Part(lambda self, x: x[:, :, ::2, ::2]), [i], (c, (h + 1) // 2, (w + 1) // 2))
        elif kind == "crop":
            self.put("slice", Part(lambda self, x: x[..., 1:-1, 1:-1]), [i], (c, h - 2, w - 2))
        elif kind == "flip":
            self.put("slice", Part(lambda self, x: x.flip(3)), [i], (c, h, w))

    def upsample(self) -> None:
        i = self.pick()
        c, h, w = self.values[i]
        if h > SIDE:
            return
        mode = self.choose(["nearest", "bilinear"])
        self.put("up", nn.Upsample(scale_factor=2, mode=mode), [i], (c, 2 * h, 2 * w))

    def gate(self) -> None:
        i = self.pick()
        c = self.values[i][0]
        squeeze, excite = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)
        act = self.choose([nn.Sigmoid, nn.Hardsigmoid])()

        def forward(self: Any, x: Tensor) -> Tensor:
            return x * self.act(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))

        self.put("gate", Part(forward, squeeze=squeeze, excite=excite, act=act), [i], self.values[i])

    def attention(self) -> None:
        i = self.pick()
        c, h, w = self.values[i]
        if c % 4 or h > 8:
            return
        fused = self.choose([True, False])

        def forward(self: Any, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            tokens = self.norm(x.flatten(2).transpose(1, 2))
            q, k, v = self.qkv(tokens).reshape(n, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
            if fused:
                mixed = F.scaled_dot_product_attention(q, k, v)
            else:
                mixed = ((q * (c // 2) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
            tokens = self.out(mixed.transpose(1, 2).reshape(n, h * w, c))
            return x + tokens.transpose(1, 2).reshape(n, c, h, w)

        layers = {"norm": nn.LayerNorm(c), "qkv": nn.Linear(c, 3 * c), "out": nn.Linear(c, c)}
        self.put("attention", Part(forward, **layers), [i], (c, h, w))

    def tokens(self) -> None:
        i = self.pick()
        c, h, w = self.values[i]

        def forward(self: Any, x: Tensor) -> Tensor:
            tokens = x.permute(0, 2, 3, 1)
            return (tokens + self.second(F.gelu(self.first(tokens)))).permute(0, 3, 1, 2)

        self.put("tokens", Part(forward, first=nn.Linear(c, 16), second=nn.Linear(16, c)), [i], (c, h, w))

    def shuffle(self) -> None:
        i = self.pick()
        c, h, w = self.values[i]
        if c % 2 == 0:
            self.put("shuffle", nn.ChannelShuffle(2), [i], (c, h, w))

    def scale(self) -> None:
        i = self.pick()
        c = self.values[i][0]
        part = Part(lambda self, x: x * self.own.value, own=Parameters(c, 1, 1))
        self.put("scale", part, [i], self.values[i])

    def offset(self) -> None:
        i = self.pick()
        part = Part(lambda self, x: x + self.own.value, own=Parameters(1, *self.values[i]))
        self.put("offset", part, [i], self.values[i])

    def again(self) -> None:
        """A convolution that is called a second time, on another value of its input's shape."""
        fit = [
            (name, i, out)
            for name, (shape, out) in self.convolutions.items()
            for i, value in enumerate(self.values)
            if value == shape
        ]
        if fit:
            name, i, out = self.choose(fit)
            self.steps.append((name, [i]))
            self.values.append(out)

    def pad(self) -> None:
        i = self.pick(3)
        c, h, w = self.values[i]
        mode = self.choose(["constant", "reflect", "replicate"])
        self.put("pad", Part(lambda self, x: F.pad(x, (1, 1, 1, 1), mode=mode)), [i], (c, h + 2, w + 2))

    def heads(self, count: int) -> None:
        for number in range(count):
            i = len(self.values) - 1 if number == 0 else self.pick()
            c = self.values[i][0]
            if number == 1 and self.choose([True, False]):
                self.put("head", nn.Conv2d(c, 2, 1), [i])
                continue
            hidden = self.choose([None, 12])
            layers = [nn.Linear(c, 5)] if hidden is None else [nn.Linear(c, hidden), nn.ReLU(), nn.Linear(hidden, 5)]
            self.put("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers), [i])
