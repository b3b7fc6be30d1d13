"""The registered CIFAR networks, and building by name."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support import shared

from irgdistill.errors import UserError
from irgdistill.models.build import build_network, multiply_adds, parameters
from irgdistill.models.checkpoint import restore
from irgdistill.models.cifar import BasicBlock
from irgdistill.models.weights import Weights

SIZES = {
    "cifar_resnet20": 269_722,
    "cifar_resnet20_x0_5": 68_050,
    "cifar_resnet14_x0_5": 43_634,
    "cifar_resnet20_x0_375": 38_512,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_resnet8x4": 1_210_410,
    "cifar_resnet32x4": 7_410_730,
    "cifar_shufflenet_x0_5": 242_134,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_shapes(name: str) -> None:
    model = timm.create_model(name, num_classes=100)
    head = model.get_classifier()
    assert parameters(model) - head.weight.numel() - 100 + 10 * (model.num_features + 1) == SIZES[name]
    features = model.forward_features(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, model.num_features, 8, 8)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.num_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shortcuts_take_every_second_pixel_and_keep_the_layout(dtype: torch.dtype) -> None:
    """He et al. 2016, section 3.3, option A."""
    block = BasicBlock(4, 10, stride=2)
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 8, 6, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = block.to(dtype)(x)
    assert torch.equal(found[:, 3:7], x.relu()[:, :, ::2, ::2]) and not found[:, :3].any() and not found[:, 7:].any()
    outer = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, x, outer)
    expected = torch.zeros_like(x)
    expected[:, :, ::2, ::2] = outer[:, 3:7] * (x[:, :, ::2, ::2] > 0)
    assert torch.equal(gradient, expected) and gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet56"])
def test_public_teachers_load_strictly(name: str) -> None:
    weights = load_file(shared(f"weights/{name}.safetensors"))
    model = timm.create_model(name)
    assert list(model.load_state_dict(weights, strict=True)) == [[], []]
    assert set(model.state_dict()) == set(weights)


def test_checkpointed_blocks_give_the_same_output() -> None:
    model = timm.create_model("cifar_resnet14_x0_5").eval()
    images = torch.randn(2, 3, 32, 32)
    plain = model(images)
    model.set_grad_checkpointing()
    assert torch.equal(model(images), plain)


def test_multiply_adds_of_resnet20() -> None:
    """Stem, 6 convolutions at 32×32, one and five at 16×16, one and five at 8×8, head."""
    network = build_network("cifar_resnet20")
    stem, six = 32**2 * 9 * 3 * 16, 6 * 32**2 * 9 * 16 * 16
    down, five = 16**2 * 9 * 16 * 32, 5 * 16**2 * 9 * 32 * 32
    assert multiply_adds(network) == stem + six + 2 * (down + five) + 64 * 10
    assert next(network.model.parameters()).device.type == "cpu"


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown model 'resnet5O'; did you mean .*resnet50"):
        build_network("resnet5O")
    with pytest.raises(UserError, match=r"unknown model '\./irgdistil', and no folder .*; did you mean irgdistill"):
        build_network("./irgdistil")
    with pytest.raises(UserError, match=r"no config\.json"):
        build_network("local-dir:/nowhere")


def test_a_local_network_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from irgdistill.config.loading import load_config
    from irgdistill.training.resolving import resolved

    monkeypatch.chdir(tmp_path)
    config = resolved(load_config(flags={"student.name": "local-dir:mine", "teacher.name": "local-dir:/theirs"}))
    assert config.student.name == f"local-dir:{tmp_path / 'mine'}" and config.teacher.name == "local-dir:/theirs"


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"no pretrained weights of cifar_resnet20 .*--teacher-checkpoint"):
        build_network("cifar_resnet20", pretrained=True)


def test_classes_are_read_from_the_weights(tmp_path: Path) -> None:
    model = timm.create_model("cifar_resnet14_x0_5", num_classes=17)
    save_file(model.state_dict(), tmp_path / "foreign.safetensors")
    network, metadata = restore(tmp_path / "foreign.safetensors", "cifar_resnet14_x0_5")
    assert network.num_classes == 17 and metadata is None


def test_pth_files_are_read_without_pickle(tmp_path: Path) -> None:
    model = timm.create_model("cifar_resnet14_x0_5")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "good.pth")
    assert restore(tmp_path / "good.pth", "cifar_resnet14_x0_5")[0].num_classes == 10

    torch.save({"state_dict": model}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth holds Python objects \("):
        restore(tmp_path / "evil.pth", "cifar_resnet14_x0_5")


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    save_file(timm.create_model("cifar_resnet20").state_dict(), tmp_path / "r20.safetensors")
    with pytest.raises(UserError, match=r"do not fit cifar_resnet14_x0_5: they have extra layer"):
        restore(tmp_path / "r20.safetensors", "cifar_resnet14_x0_5")
    with pytest.raises(UserError, match="was not written by irgdistill"):
        restore(tmp_path / "r20.safetensors")


def test_fixed_size_networks_are_built_at_the_size_asked_for() -> None:
    network = build_network("vit_tiny_patch16_224", num_classes=3, input_size=(64, 64))
    assert network.args == {"img_size": (64, 64)}
    assert network.model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("name", ["cifar_resnet20", "no_such_network"])
def test_the_level_of_the_hubs_logger_is_restored(name: str) -> None:
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        with contextlib.suppress(UserError):
            build_network(name, pretrained=True)
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)


def test_weights_without_a_classifier_are_an_encoder_s() -> None:
    """The classifier alone may be missing: any other weight is named."""
    tensors = timm.create_model("test_vit", num_classes=0).state_dict()
    assert build_network("test_vit", weights=Weights(tensors, "here")).num_classes == 0
    del tensors["norm.bias"]
    with pytest.raises(UserError, match=r"do not fit test_vit: they lack norm\.bias"):
        build_network("test_vit", weights=Weights(tensors, "here"))
