"""The networks of the CIFAR-100 distillation tables, for images [B, 3, 32, 32].

Keys and shapes of every state_dict are those of RepDistiller and mdistiller, so that the public
teachers load. All features are outputs of modules, after their ReLU; WRN blocks have none. Weights
start as in these repositories.

Sources: He et al. 2016 (resnet, ResNet50), Zagoruyko and Komodakis 2016 (wrn), Simonyan and
Zisserman 2015 (vgg), Sandler et al. 2018 (MobileNetV2), Zhang et al. 2018 (ShuffleV1), Ma et al.
2018 (ShuffleV2).
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.published import plain

Block = Callable[[int, int, int], nn.Module]  # of channels in, channels out, stride
Layers = tuple[list[str], str]  # the stages, and the last map before the pooling


def build(name: str, num_classes: int = 100) -> nn.Module:
    """The network of that name; case and `-` or `_` do not matter.

    Raises:
        SystemExit: no such network; the nearest names are given.
    """
    known = {plain(each): each for each in NETWORKS}
    if plain(name) not in known:
        near = difflib.get_close_matches(plain(name), known, n=3) or list(known)
        raise SystemExit(f"no network {name!r} here (nearest: {', '.join(near)})")
    return NETWORKS[known[plain(name)]](num_classes=num_classes)


def layers_of(name: str) -> Layers:
    """The stages of a network, and its last map before the pooling."""
    stages, last = next(of for start, of in LAYERS.items() if plain(name).startswith(start))
    return stages.split(), last


def layers(methods: Iterable[str], student: Layers, teacher: Layers) -> list[tuple[str, str]]:
    """The pairs (student's layer, teacher's layer) that the tables distil: FitNet the second stage,
    AT, NST, VID and ReviewKD all stages, SP the last, the other methods and SoKD alone the last
    map."""
    stages = list(zip(reversed(student[0]), reversed(teacher[0]), strict=False))[::-1]
    pairs = [*stages, (student[1], teacher[1])]
    wanted = dict.fromkeys(("at", "nst", "vid", "reviewkd"), stages)
    wanted |= {"fitnet": [stages[1]], "sp": stages[-1:]}
    logits_only = {"kd", "dkd", "lskd", "dist"}
    readers = set(methods) - logits_only or {"sokd"}
    chosen = [pair for method in readers for pair in wanted.get(method, pairs[-1:])]
    return [pair for pair in dict.fromkeys(pairs) if pair in chosen]


LAYERS = {
    "resnet50": ("layer1 layer2 layer3 layer4", "layer4"),
    "resnet": ("layer1 layer2 layer3", "layer3"),
    "wrn": ("block1 block2 block3", "relu"),
    "vgg": ("block1 block2 block3 block4", "block4"),
    "mobilenetv2": ("blocks.1 blocks.2 blocks.4 blocks.6", "conv2"),
    "shufflev1": ("layer1 layer2 layer3", "layer3"),
    "shufflev2": ("layer1 layer2 layer3", "relu"),
}


def conv_bn(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1):
    """A convolution without a bias, and its BatchNorm."""
    padding = kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)


def start(model: nn.Module, linear: float | None = None) -> None:
    """He's initialisation of the convolutions (fan out), no biases; std of the linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear is not None:
            nn.init.normal_(module.weight, 0, linear)
            nn.init.zeros_(module.bias)


def stage(block: Block, inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    """`count` blocks in a row, the first of them with the stride."""
    first = block(inputs, outputs, stride)
    return nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(count - 1)))


# ------------------------------------------------------------------------------------------ ResNets


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs, 3)
        changes = stride != 1 or inputs != outputs
        self.downsample = nn.Sequential(*conv_bn(inputs, outputs, 1, stride)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2."""

    def __init__(self, depth: int, widths: tuple[int, ...], num_classes: int = 100) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.conv1, self.bn1 = conv_bn(3, widths[0], 3)
        self.layer1 = stage(BasicBlock, widths[0], widths[1], count, 1)
        self.layer2 = stage(BasicBlock, widths[1], widths[2], count, 2)
        self.layer3 = stage(BasicBlock, widths[2], widths[3], count, 2)
        self.fc = nn.Linear(widths[3], num_classes)
        start(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = outputs // 4
        self.conv1, self.bn1 = conv_bn(inputs, middle)
        self.conv2, self.bn2 = conv_bn(middle, middle, 3, stride)
        self.conv3, self.bn3 = conv_bn(middle, outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*(conv_bn(inputs, outputs, 1, stride) if changes else ()))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet50(nn.Module):
    """ImageNet's ResNet50 with a stem for 32x32: a 3x3 convolution and no pooling."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 64, 3)
        self.layer1 = stage(Bottleneck, 64, 256, 3, 1)
        self.layer2 = stage(Bottleneck, 256, 512, 4, 2)
        self.layer3 = stage(Bottleneck, 512, 1024, 6, 2)
        self.layer4 = stage(Bottleneck, 1024, 2048, 3, 2)
        self.linear = nn.Linear(2048, num_classes)
        start(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(self.layer4(self.layer3(x)).mean((2, 3)))


# ------------------------------------------------------------------------------------- Wide ResNets


class WideBlock(nn.Module):
    """Activation first; where the width changes, the shortcut starts at the activation too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1, self.bn2 = conv_bn(inputs, outputs, 3, stride)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.changes = inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (self.convShortcut(active) if self.changes else x)


class WideStage(nn.Module):
    def __init__(self, inputs: int, outputs: int, count: int, stride: int) -> None:
        super().__init__()
        self.layer = stage(WideBlock, inputs, outputs, count, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN of depth 6n + 4."""

    def __init__(self, depth: int, factor: int, num_classes: int = 100) -> None:
        super().__init__()
        count, width = (depth - 4) // 6, 16 * factor
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, width, count, 1)
        self.block2 = WideStage(width, 2 * width, count, 2)
        self.block3 = WideStage(2 * width, 4 * width, count, 2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4 * width, num_classes)
        start(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.relu(self.bn1(x)).mean((2, 3)))


# ---------------------------------------------------------------------------------------------- VGG


class VGG(nn.Module):
    """VGG with BatchNorm: `counts` convolutions a block, pooling after the first three blocks."""

    def __init__(self, counts: tuple[int, ...], num_classes: int = 100) -> None:
        super().__init__()
        inputs = 3
        for block, (count, width) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
                inputs = width
            setattr(self, f"block{block}", nn.Sequential(*layers))
        self.classifier = nn.Linear(512, num_classes)
        start(self, linear=0.01)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block0, self.block1, self.block2):
            x = F.max_pool2d(block(x), 2)
        return self.classifier(self.block4(self.block3(x)).mean((2, 3)))


# ---------------------------------------------------------------------------------- mobile networks


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.conv = nn.Sequential(
            *(*conv_bn(inputs, wide), nn.ReLU()),
            *(*conv_bn(wide, wide, 3, stride, groups=wide), nn.ReLU()),
            *conv_bn(wide, outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 at half width."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn(3, 16, 3, 2), nn.ReLU())
        self.blocks, inputs = nn.ModuleList(), 16
        widths, counts = (8, 12, 16, 32, 48, 80, 160), (1, 2, 3, 4, 3, 3, 1)
        for width, count, stride in zip(widths, counts, (1, 1, 2, 2, 1, 2, 1), strict=True):
            block = partial(InvertedResidual, expansion=6 if len(self.blocks) else 1)
            self.blocks.append(stage(block, inputs, width, count, stride))
            inputs = width
        self.conv2 = nn.Sequential(*conv_bn(inputs, 1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        start(self, linear=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.conv2(x).mean((2, 3)))


class ShuffleUnitV1(nn.Module):
    """ShuffleNet's unit: the pooled input is concatenated with stride 2, else added."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        own = outputs - inputs if stride == 2 else outputs
        self.stride, self.groups = stride, 1 if inputs == 24 else 3
        self.conv1, self.bn1 = conv_bn(inputs, own // 4, groups=self.groups)
        self.conv2, self.bn2 = conv_bn(own // 4, own // 4, 3, stride, groups=own // 4)
        self.conv3, self.bn3 = conv_bn(own // 4, own, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        out = F.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            return F.relu(torch.cat((out, F.avg_pool2d(x, 3, 2, 1)), 1))
        return F.relu(out + x)


class ShuffleUnitV2(nn.Module):
    """With stride 1: half of the channels pass through, half through three convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = conv_bn(half, half)
        self.conv2, self.bn2 = conv_bn(half, half, 3, groups=half)
        self.conv3, self.bn3 = conv_bn(half, half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, 1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))
        return F.channel_shuffle(torch.cat((kept, F.relu(self.bn3(self.conv3(out)))), 1), 2)


class ShuffleDownV2(nn.Module):
    """With stride 2: both halves of the output come from the whole input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = conv_bn(inputs, inputs, 3, 2, groups=inputs)
        self.conv2, self.bn2 = conv_bn(inputs, half)
        self.conv3, self.bn3 = conv_bn(inputs, half)
        self.conv4, self.bn4 = conv_bn(half, half, 3, 2, groups=half)
        self.conv5, self.bn5 = conv_bn(half, half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return F.channel_shuffle(torch.cat((left, right), 1), 2)


def _unit_v2(inputs: int, outputs: int, stride: int) -> nn.Module:
    return (ShuffleDownV2 if stride == 2 else ShuffleUnitV2)(inputs, outputs, stride)


class ShuffleNet(nn.Module):
    """ShuffleNetV1 (three groups) or V2 (width 1) with a stem for 32x32: a 1x1 convolution."""

    def __init__(
        self, unit: Block, widths: Sequence[int], counts: Sequence[int], head: int | None = None,
        num_classes: int = 100,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 24)
        self.layer1 = stage(unit, 24, widths[0], counts[0], 2)
        self.layer2 = stage(unit, widths[0], widths[1], counts[1], 2)
        self.layer3 = stage(unit, widths[1], widths[2], counts[2], 2)
        self.head = head
        if head is not None:
            self.conv2, self.bn2 = conv_bn(widths[2], head)
            self.relu = nn.ReLU()
        self.linear = nn.Linear(head or widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        if self.head is not None:
            x = self.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(ResNet, depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth, _WIDE) for depth in (8, 32)},
    "resnet8w8": partial(ResNet, 8, (8, 8, 16, 32)),  # in no table: for trials on a small machine
    **{f"wrn_{d}_{w}": partial(WideResNet, d, w) for d in (16, 40) for w in (1, 2)},
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": partial(ShuffleNet, ShuffleUnitV1, (240, 480, 960), (4, 8, 4)),
    "ShuffleV2": partial(ShuffleNet, _unit_v2, (116, 232, 464), (4, 8, 4), 1024),
    "ResNet50": ResNet50,
}
