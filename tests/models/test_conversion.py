"""Weights of torchvision and of networks' authors, under timm's names: the same logits as before."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import timm
import torch
from support import Run
from torch import Tensor, nn
from torchvision.models import get_model

from irgdistill.errors import UserError
from irgdistill.models import restore

CLASSES = 3
EPS = {"bn_eps": 0.001}


def torchvision_network(name: str) -> nn.Module:
    """With random weights, none of which is what it was initialised to."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = get_model(name, weights=None, num_classes=CLASSES)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) - 0.5, alpha=0.04)
    return model.eval()


def logits(model: nn.Module, size: tuple[int, int]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)))
    return result


def heavy(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("theirs", "ours", "args"),
    [
        ("resnet18", "resnet18", {}),
        ("mobilenet_v2", "mobilenetv2_100", {}),
        ("mobilenet_v3_small", "mobilenetv3_small_100", EPS),
        ("mnasnet0_5", "mnasnet_050", {}),
        ("regnet_x_400mf", "regnetx_004_tv", {}),
        heavy("densenet121", "densenet121", {}),
        heavy("efficientnet_b0", "efficientnet_b0", {}),
        heavy("inception_v3", "inception_v3", {}),
        heavy("convnext_tiny", "convnext_tiny", {}),
        heavy("swin_t", "swin_tiny_patch4_window7_224", {}),
        heavy("vit_b_32", "vit_base_patch32_224", {}),
    ],
)
def test_the_logits_are_those_of_torchvision(tmp_path: Path, theirs: str, ours: str, args: dict[str, float]) -> None:
    original, path = torchvision_network(theirs), tmp_path / "weights.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in original.state_dict().items()}}, path)
    found = restore(path, ours)[0]
    assert found.num_classes == CLASSES and found.args == args
    wanted = logits(original, found.input.size)
    assert (logits(found.model, found.input.size) - wanted).abs().max() < 1e-4 * wanted.std()
    same_names = timm.create_model(ours, num_classes=CLASSES).state_dict().keys() == original.state_dict().keys()
    assert found.note == ("" if same_names else f"{ours}: took the weights of torchvision's {theirs} in {path}")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("mobilenet_v2", "mobilenetv2_050"),
        ("mnasnet0_5", "mnasnet_small"),
        heavy("swin_v2_t", "swinv2_tiny_window8_256"),
    ],
)
def test_another_network_than_torchvisions_is_refused(tmp_path: Path, theirs: str, ours: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(torchvision_network(theirs).state_dict(), path)
    with pytest.raises(UserError, match=f"are those of torchvision's {theirs}, and {ours} of timm does not give the"):
        restore(path, ours)


def test_a_student_starts_from_torchvisions_weights(run: Run, folder: Path, tmp_path: Path) -> None:
    """Where its batch norm needs another epsilon, that is asked for, because timm builds the student without it."""
    path = tmp_path / "weights.pth"
    torch.save(torchvision_network("mobilenet_v3_small").state_dict(), path)
    words = ("train", "--model", "mobilenetv3_small_100", "--checkpoint", path, "--data", folder)
    words += ("--batch-size", 24, "--dry-run")
    refused = run(*words)
    assert refused.code == 2 and refused.err.count("\n") == 1, refused.err
    assert refused.err.endswith("network: --set 'student.args={\"bn_eps\": 0.001}'\n")
    accepted = run(*words, "--set", 'student.args={"bn_eps": 0.001}')
    assert accepted.code == 0, accepted.err
    assert f"starts from {path} (took the weights of torchvision's mobilenet_v3_small)\n" in accepted.err


def test_the_authors_names_are_converted_by_timm(tmp_path: Path) -> None:
    torch.manual_seed(3)
    wanted, path = timm.create_model("test_convnext", num_classes=5), tmp_path / "authors.pth"
    names = {"stem.": "downsample_layers.0.", ".blocks.": ".", "conv_dw": "dwconv", "mlp.fc": "pwconv"}
    names |= {"head.fc.": "head.", "head.norm.": "norm."}
    state = {}
    for key, value in wanted.state_dict().items():
        stage, is_downsample, rest = key.partition(".downsample.")
        key = f"downsample_layers.{stage.removeprefix('stages.')}.{rest}" if is_downsample else key
        for name, other in names.items():
            key = key.replace(name, other)
        state[key] = value
    torch.save({"model": state}, path)
    found = restore(path, "test_convnext")[0]
    assert found.num_classes == 5 and found.note == f"test_convnext: names converted by timm in {path}"
    assert torch.equal(logits(found.model, (64, 64)), logits(wanted, (64, 64)))
