"""The networks against the state_dicts and feature maps of RepDistiller and mdistiller.

state_dicts.json was made by running RepDistiller (commit b84f547) with 100 classes. Of each network
it has the parameters, the number of keys, SHA-256 of the lines "key [shape]" in order, some
of them in words, the shapes of the stages for an image of 32x32, and the channels that are pooled.
mdistiller (a08d46f) has the same keys and shapes in the same order.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from parts import networks

PUBLIC = json.loads(Path(__file__).with_name("state_dicts.json").read_text())
MILLIONS = {  # as the papers print them
    "resnet20": 0.28, "resnet56": 0.86, "resnet110": 1.74, "resnet8x4": 1.23, "resnet32x4": 7.43,
    "wrn_16_2": 0.70, "wrn_40_1": 0.57, "wrn_40_2": 2.26, "vgg8": 3.97, "vgg13": 9.46,
    "MobileNetV2": 0.81, "ShuffleV1": 0.95, "ShuffleV2": 1.36, "ResNet50": 23.71,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_keys_shapes_and_stages(name):
    public = PUBLIC[name]
    with torch.device("meta"):
        network = networks.build(name, 100).eval()
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert {key: shapes.get(key) for key in public["some"]} == public["some"]
    lines = "\n".join(f"{key} {shape}" for key, shape in shapes.items())
    assert len(shapes) == public["keys"]
    assert hashlib.sha256(lines.encode()).hexdigest() == public["sha256"]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == public["parameters"]
    if name in MILLIONS:
        assert round(parameters / 1e6, 2) == MILLIONS[name]

    stages, last = networks.layers_of(name)
    found = {}
    modules = dict(network.named_modules())
    for layer in {*stages, last}:
        modules[layer].register_forward_hook(
            lambda module, args, out, layer=layer: found.update({layer: list(out.shape[1:])})
        )
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 100)
    assert [found[layer] for layer in stages] == public["stages"]
    assert found[last][0] == public["pooled"]


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1"])
def test_first_weights_keep_the_scale_of_activations(name):
    """He's initialisation: neither vanishing nor exploding logits at the start."""
    network = networks.build(name, 10)
    logits = network(torch.randn(8, 3, 32, 32))
    assert logits.isfinite().all() and logits.std() < 10
    weight = next(m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    assert weight.std() > 0.01


def test_layers_of_the_tables():
    of = networks.layers_of
    fitnet = networks.layers(["fitnet", "kd"], of("resnet8x4"), of("resnet32x4"))
    assert fitnet == [("layer2", "layer2")]
    assert len(networks.layers(["at"], of("MobileNetV2"), of("vgg13"))) == 4
    assert networks.layers(["nst"], of("WRN-40-1"), of("wrn_40_2"))[0] == ("block1", "block1")
    sp = networks.layers(["sp"], of("wrn_40_1"), of("wrn_40_2"))
    assert sp == [("block3", "block3")]
    crd = networks.layers(["crd"], of("ShuffleV2"), of("wrn_40_2"))
    assert crd == [("relu", "relu")]
    assert networks.layers(["kd"], of("resnet20"), of("ResNet50")) == [("layer3", "layer4")]
    both = networks.layers(["fitnet", "crd"], of("wrn_16_2"), of("wrn_40_2"))
    assert both == [("block2", "block2"), ("relu", "relu")]


def test_names_have_some_freedom_and_a_wrong_one_is_refused():
    assert type(networks.build("WRN-16-2", 10)) is networks.WideResNet
    with pytest.raises(SystemExit, match=r"no network 'resnet21' here \(nearest: resnet"):
        networks.build("resnet21")
