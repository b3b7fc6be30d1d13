"""`irgdistill embed`: every image of a source once, its embedding and its exact name."""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import Run, write_images
from timm.data import create_transform
from torch import Tensor

from irgdistill.config import DataConfig
from irgdistill.data import ImageFiles, OnePass
from irgdistill.io import Report, read_tensors
from irgdistill.models import Network, build_network
from irgdistill.training import embed

CPU = torch.device("cpu")
NASTY = os.fsdecode(b'a,"b\n\xfe.png')


def names(tensors: dict[str, Tensor]) -> list[str]:
    """As docs/student.md reads them."""
    joined, ends = tensors["names"].numpy().tobytes(), tensors["name_offsets"].tolist()
    return [os.fsdecode(joined[start:end]) for start, end in pairwise(ends)]


def expected(teacher: Path, image: Path) -> Tensor:
    """(D,), by timm alone."""
    model = timm.create_model("cifar_resnet14_x0_5", num_classes=3)
    model.load_state_dict(load_file(teacher / "best.safetensors"))
    values = json.loads((teacher / "config.json").read_text())["pretrained_cfg"]
    chosen = {key: values[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    pixels = create_transform(**chosen)(Image.open(image).convert("RGB"))[None]
    with torch.no_grad():
        model.eval()
        return model.forward_head(model.forward_features(pixels), pre_logits=True)[0]  # type: ignore[no-any-return]


def test_the_pooled_features_of_every_image_by_its_name(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    """Names that are not UTF-8 among them; without the unreadable."""
    output = tmp_path / "all.safetensors"
    shutil.copy(folder / "val/red/000.png", folder / "val" / NASTY)
    (folder / "train/red/005.png").write_bytes(b"broken")
    words = ("embed", teacher, "--data", folder, "--output", output, "--workers", 0, "--batch-size", 7)
    result = run(*words)
    assert result.code == 0, result.err
    assert "unreadable image left out" in result.err and "96 embeddings of 32 numbers" in result.err
    tensors, facts = read_tensors(output)
    assert facts is not None and facts["network"]["architecture"] == "cifar_resnet14_x0_5"
    paths = sorted(str(path) for path in folder.rglob("*.png") if path != folder / "train/red/005.png")
    assert names(tensors) == paths
    embeddings = tensors["embeddings"]
    assert embeddings.shape == (96, 32) and embeddings.dtype == torch.float32
    for position in (0, 50, paths.index(str(folder / "val" / NASTY))):
        assert torch.allclose(embeddings[position], expected(teacher, Path(paths[position])), atol=1e-5)
    again = run(*words)
    assert again.code == 2 and "is there already; give another --output, or --overwrite" in again.err


def test_every_image_of_a_named_data_set_and_of_an_archive(
    run: Run, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.make_archive(str(tmp_path / "colours"), "tar", folder / "val")
    counts = {"digits": 1797, str(tmp_path / "colours.tar"): 24}
    for data, count in counts.items():
        output = tmp_path / f"{count}.safetensors"
        result = run("embed", teacher, "--data", data, "--output", output, "--workers", 0)
        assert result.code == 0, result.err
        tensors = load_file(output)
        assert len(tensors["embeddings"]) == count and len(set(names(tensors))) == count


@pytest.mark.parametrize("odd", [False, True])
def test_parquet_has_text_or_the_bytes_of_names(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, odd: bool
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    if odd:
        shutil.copy(folder / "val/red/000.png", folder / "val" / NASTY)
    words = ("embed", teacher, "--data", folder / "val", "--workers", 0)
    for name in ("a.parquet", "a.safetensors"):
        assert run(*words, "--output", tmp_path / name).code == 0
    table, tensors = parquet.read_table(tmp_path / "a.parquet"), load_file(tmp_path / "a.safetensors")
    assert str(table.schema.field("file").type) == ("binary" if odd else "string")
    assert [os.fsdecode(name) for name in table["file"].to_pylist()] == names(tensors)
    assert torch.equal(torch.tensor(table["embedding"].to_pylist()), tensors["embeddings"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "nowhere", "--output", "a.safetensors"), "no data folder 'nowhere'"),
        (("--output", "a.safetensors"), "no data: give --data"),
        (("--data", "val", "--output", "a.npy"), "expected a name that ends in .safetensors or .parquet"),
        (("--data", "val", "--output", "a.safetensors", "--pooling", "max"), "expected 'auto', 'cls'"),
        (("--data", "val", "--output", "a.safetensors", "--pooling", "cls"), "has no tokens to pool by cls"),
        (("--data", "empty", "--output", "a.safetensors"), "no images in empty"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, teacher: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    result = run("embed", teacher, *words, "--workers", 0)
    assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize("shape", [(5,), (7, 5), (5, 3, 3)])
def test_the_output_of_a_network_without_a_classifier_is_its_embedding(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """(B, D), tokens (B, N, D) or a map (B, D, H, W): the mean over positions."""
    images = write_images(tmp_path, {"red": 2})
    output = torch.randn(2, *shape)
    network = Network.of(timm.create_model("cifar_resnet20", num_classes=0))
    network.model.forward = lambda _: output
    files = ImageFiles(sorted(map(str, images.rglob("*.png"))))
    source = OnePass(files, DataConfig(workers=0), network.input, CPU, print)
    found, positions = embed(network, source, "none", Report(quiet=True))
    axes = {1: (), 2: (1,), 3: (2, 3)}[len(shape)]
    assert torch.allclose(found, torch.from_numpy(output.numpy().mean(axes)))
    assert positions.tolist() == [0, 1]


def test_pooling_of_tokens(run: Run, tmp_path: Path) -> None:
    """Of a class token and patch tokens after the last norm; by itself, what the classifier reads."""
    images = write_images(tmp_path / "images", {"red": 3}, size=32)
    network = build_network("test_vit")
    save_file(network.model.state_dict(), tmp_path / "vit.safetensors")
    found = {}
    for pooling in ("auto", "cls", "mean", "cls+mean"):
        words = ("embed", "test_vit", "--checkpoint", tmp_path / "vit.safetensors", "--data", images, "--workers", 0)
        result = run(*words, "--pooling", pooling, "--output", tmp_path / f"{pooling}.safetensors")
        assert result.code == 0, result.err
        found[pooling] = load_file(tmp_path / f"{pooling}.safetensors")["embeddings"]
    source = OnePass(
        ImageFiles(sorted(map(str, images.rglob("*.png")))), DataConfig(workers=0), network.input, CPU, print
    )
    with torch.no_grad():
        tokens = network.model.eval().forward_features(network.preprocess()(next(iter(source))[0]))  # type: ignore[operator]
    assert torch.allclose(found["cls"], tokens[:, 0], atol=1e-5)
    assert torch.allclose(found["mean"], tokens[:, 1:].mean(1), atol=1e-5)
    assert torch.equal(found["cls+mean"], torch.cat([found["cls"], found["mean"]], 1))
    assert torch.equal(found["auto"], found["cls"])
