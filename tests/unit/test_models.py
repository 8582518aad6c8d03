from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_graft.config import ModelConfig
from dist_graft.errors import ConfigError
from dist_graft.training import models
from dist_graft.training.models import build_model, model_names

RESNETS = ["resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
# Small enough for forward and backward passes on one thread.
TRAINABLE = [name for name in model_names() if name != "wrn28_10"]


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def build(name: str, num_classes: int = 10, channels: int = 3, **options: Any) -> nn.Module:
    config = ModelConfig(name=name, **options)
    return build_model(config, num_classes=num_classes, channels=channels)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def filters(model: nn.Module) -> dict[str, int]:
    convolutions = (
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    )
    return {name: convolution.out_channels for name, convolution in convolutions}


def message_of(name: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_model_names():
    assert model_names() == [*RESNETS, "mobilenetv2", "vgg16_bn", "wrn28_10"]


@pytest.mark.parametrize(
    ("name", "parameter_count", "filter_count"),
    [
        ("resnet8", 75_290, 240),
        ("resnet14", 172_506, 464),
        ("resnet20", 269_722, 688),
        ("resnet32", 464_154, 1_136),
        ("resnet44", 658_586, 1_584),
        ("resnet56", 853_018, 2_032),
        ("resnet110", 1_727_962, 4_048),
        ("mobilenetv2", 2_296_922, 17_544),
        ("vgg16_bn", 14_724_042, 4_224),
        ("wrn28_10", 36_479_194, 10_096),
    ],
)
def test_counts(name: str, parameter_count: int, filter_count: int):
    with torch.device("meta"):
        model = build(name)
    assert parameters(model) == parameter_count
    assert sum(filters(model).values()) == filter_count


def test_mobilenetv2_has_four_shortcut_convolutions():
    with torch.device("meta"):
        counts = filters(build("mobilenetv2"))
    without = {name: count for name, count in counts.items() if "shortcut" not in name}
    assert len(counts) - len(without) == 4
    assert sum(without.values()) == 17_088


def test_resnet_keys():
    with torch.device("meta"):
        keys = list(build("resnet20").state_dict())
    leads = [key for key in keys if key.endswith(".weight") and "bn" not in key]
    assert leads[:3] == ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"]
    assert leads[-2:] == ["layer3.2.conv2.weight", "linear.weight"]
    assert "bn1.running_mean" in keys
    assert "layer2.0.bn2.weight" in keys


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
@pytest.mark.parametrize("name", model_names())
def test_logits_of_small_images(name: str, size: int, channels: int):
    with torch.device("meta"):
        logits = build(name, num_classes=7, channels=channels)(torch.empty(2, channels, size, size))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("name", TRAINABLE)
def test_one_backward_pass_reaches_every_parameter(name: str):
    model = build(name, channels=1)
    model.to(memory_format=torch.channels_last)
    images = torch.randn(4, 1, 28, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    loss = nn.functional.cross_entropy(logits.float(), torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", TRAINABLE)
def test_initial_logits_are_of_order_one(name: str):
    logits = build(name)(torch.randn(4, 3, 32, 32))
    assert 0.1 < logits.std() < 4


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_initial_weights_depend_on_the_seed(name: str):
    first = build(name)
    torch.manual_seed(0)
    again = build(name)
    other = build(name)
    weights = nn.utils.parameters_to_vector
    assert torch.equal(weights(first.parameters()), weights(again.parameters()))
    assert not torch.equal(weights(first.parameters()), weights(other.parameters()))


def test_he_initialization_over_fan_in():
    weight = build("resnet20").get_parameter("layer3.2.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_he_initialization_over_fan_out():
    weight = build("vgg16_bn").get_parameter("features.7.weight")
    assert weight.shape[:2] == (128, 64)
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("size", [7, 8])
def test_resnet_shortcut_is_option_a(size: int):
    block = build("resnet20").get_submodule("layer2.0")
    nn.init.zeros_(block.get_parameter("bn2.weight"))
    images = torch.rand(2, 16, size, size).contiguous(memory_format=torch.channels_last)
    out: Tensor = block(images)
    assert torch.equal(out[:, :16], images[:, :, ::2, ::2])
    assert not out[:, 16:].any()
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_leaky_relu_replaces_every_relu():
    kinds = [type(module) for module in build("resnet32", activation="leaky_relu").modules()]
    assert nn.ReLU not in kinds
    assert nn.LeakyReLU in kinds


@pytest.mark.parametrize("name", ["mobilenetv2", "vgg16_bn", "wrn28_10", "resnet18"])
def test_activation_needs_a_small_resnet(name: str):
    message = message_of(name, activation="leaky_relu")
    assert message.startswith("model.activation 'leaky_relu' requires one of resnet8, resnet14")
    assert message.endswith(f"model.name is {name!r}")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet21", "resnet20"),
        ("ResNet32", "resnet32"),
        ("vgg16bn", "vgg16_bn"),
        ("mobilnet_v2", "mobilenet_v2"),
        ("torchvision/vgg16bn", "torchvision/vgg16_bn"),
        ("torchvision/resnet_18", "torchvision/resnet18"),
        ("torchvision/resnet20", "resnet20"),
    ],
)
def test_unknown_name(name: str, nearest: str):
    message = message_of(name)
    offered = re.search(r"nearest: (.+?); known: ", message)
    assert message.startswith(f"model.name {name!r} is unknown")
    assert offered is not None
    assert nearest in offered[1]
    assert f"{', '.join(model_names())}, timm/NAME, and any name of torchvision.models" in message


def test_unknown_name_without_similar_ones():
    assert message_of("???").startswith("model.name '???' is unknown; known: resnet8, ")


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_resnet50_fpn",
        "torchvision/fcn_resnet50",
        "r3d_18",
        "raft_small",
        "quantized_resnet18",
    ],
)
def test_torchvision_models_other_than_image_classifiers(name: str):
    assert message_of(name).startswith(
        f"model.name {name!r} is a torchvision model, but not an image"
    )


def test_torchvision_resnet18_on_grayscale_images():
    rgb = build("resnet18", num_classes=7)
    torch.manual_seed(0)
    gray = build("resnet18", num_classes=7, channels=1)
    assert parameters(rgb) - parameters(gray) == 2 * 64 * 7 * 7
    images = torch.randn(2, 1, 32, 32)
    logits = gray.eval()(images)
    assert logits.shape == (2, 7)
    same = rgb.eval()(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(logits, same, rtol=1e-3, atol=1e-3)
    logits.sum().backward()
    assert gray.get_parameter("conv1.weight").grad is not None


@pytest.mark.parametrize("name", ["vit_b_16", "convnext_tiny", "swin_t", "squeezenet1_1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_logits(name: str, channels: int):
    with torch.device("meta"):
        model = build(name, num_classes=7, channels=channels)
        logits = model(torch.empty(2, channels, 224, 224))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 299)])
def test_torchvision_models_return_one_tensor_in_training(name: str, size: int):
    with torch.device("meta"):
        model = build(name, num_classes=7, channels=1)
        logits = model(torch.empty(2, 1, size, size))
    assert model.training
    assert logits.shape == (2, 7)


def test_vgg16_bn_of_this_package_and_of_torchvision():
    with torch.device("meta"):
        ours = build("vgg16_bn")
        theirs = build("torchvision/vgg16_bn")
    assert filters(ours) == {
        key: count for key, count in filters(theirs).items() if key.startswith("features.")
    }
    assert parameters(theirs) > 100_000_000 > parameters(ours)


def test_model_names_do_not_import_torchvision():
    program = (
        "import sys, torch\n"
        "from dist_graft.config import ModelConfig\n"
        "from dist_graft.training.models import build_model, model_names\n"
        "with torch.device('meta'):\n"
        "    for name in model_names():\n"
        "        build_model(ModelConfig(name=name), num_classes=10, channels=3)\n"
        "sys.exit('torchvision' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_kwargs_reach_the_model():
    with torch.device("meta"):
        wide = build("resnet18", kwargs={"width_per_group": 64, "zero_init_residual": True})
        vit = build("torchvision/vit_b_16", kwargs={"image_size": 64})
    assert parameters(wide) == 11_181_642
    assert vit.image_size == 64


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet20", {"depth": 3}),
        ("resnet20", {"activation": "relu"}),
        ("resnet20", {"stem_stride": 0}),
        ("resnet20", {"width": "wide"}),
        ("vgg16_bn", {"width": 8}),
        ("resnet18", {"depth": 3}),
    ],
)
def test_kwargs_that_do_not_fit(name: str, kwargs: dict[str, object]):
    assert f"model.kwargs {kwargs} do not fit {name}: " in message_of(name, kwargs=kwargs)


def test_narrow_resnet_with_strided_stem():
    narrow = build("resnet8", kwargs={"width": 8, "stem_stride": 2})
    assert [narrow.conv1.stride, narrow.conv1.out_channels] == [(2, 2), 8]
    assert narrow.linear.in_features == 32
    assert parameters(narrow) == 19_218
    assert narrow(torch.zeros(2, 3, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_kwargs_do_not_load_weights(name: str):
    """Also not those of an export.json from elsewhere: torchvision would unpickle a download."""
    assert "model.kwargs must not load weights" in message_of(name, kwargs={"weights": "DEFAULT"})


def test_timm():
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = build("timm/resnet18", num_classes=7, channels=1, kwargs={"drop_rate": 0.1})
        assert model(torch.empty(2, 1, 32, 32)).shape == (2, 7)
    assert model.drop_rate == 0.1
    assert "nearest: timm/resnet18" in message_of("timm/resnet_18")
    assert "do not fit timm/resnet18" in message_of("timm/resnet18", kwargs={"depth": 3})


def test_timm_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "dist_graft.training.models.timm_names", raising=False)
    monkeypatch.delattr(models, "timm_names", raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'dist_graft[timm]'" in message_of("timm/resnet18")
