"""`irgdistill export`: what is written is the student, says what it is, and loads where irgdistill is not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support import Run, command
from torch import Tensor

from irgdistill.commands.export import programs
from irgdistill.commands.export import run as export
from irgdistill.config.loading import load_config
from irgdistill.errors import UserError
from irgdistill.io.tensors import read_tensors, save_tensors
from irgdistill.models.build import build_network
from irgdistill.models.checkpoint import restore

RECIPE = ("--preset", "quickstart", "--device", "cpu", "--set", "data.train_images=256", "--warmup-epochs", 0)
RECIPE += ("--val-fraction", 0.1)
KNOWN = "test_resnet"
"""A small network that timm knows by itself."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained through the command line on digits: teacher, a student timm knows, a comparison of CIFAR students."""

    root = tmp_path_factory.mktemp("runs")
    taught = ("--teacher-checkpoint", root / "teacher" / "last.safetensors", "--skip-teacher-check")
    cifar = ("--student", "cifar_resnet14_x0_5", "--epochs", 1, *taught, "--methods", "none,kd", "--seeds", 2)
    fading = ("--set", "losses.edges.fade=0.3,0.6")
    few = ("--batch-size", 32, "--set", "data.train_images=128")
    known = ("--student", KNOWN, "--input-size", 48, "--epochs", 6, *few, *fading, *taught[:2])
    teacher = ("--student", "cifar_resnet20", "--method", "none", "--epochs", 6)
    for words in (
        ("distill", *RECIPE, *teacher, "--output", root / "teacher"),
        ("distill", *RECIPE, *known, "--output", root / "known"),
        ("compare", *RECIPE, *cifar, "--output", root / "compare"),
    ):
        assert command(*words) == 0
    return root


def logits_of(checkpoint: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = restore(checkpoint)[0].model.eval()(images)
    return logits


def normalised(checkpoint: Path, images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], by the network's own mean and deviation."""
    network = restore(checkpoint)[0]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (network.input.mean, network.input.std))
    return (images - mean) / std


@pytest.mark.parametrize("raw", [False, True])
def test_onnx_is_the_student(run: Run, runs: Path, tmp_path: Path, raw: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "student.onnx"
    options = ("--raw-input", "--check-images", 20) if raw else ("--opset", 18)
    result = run("export", runs / "known", "--format", "onnx", "--output", path, *options)
    assert result.code == 0, result.err
    assert f"on {20 if raw else 64} validation images of digits" in result.err and [*tmp_path.iterdir()] == [path]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (taken,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, 48, 48])
    assert (taken.name, taken.shape) == ("logits", ["batch", 10])
    assert b"timm/models" not in path.read_bytes(), "no path of this machine"
    images = torch.rand(5, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    student = runs / "known" / "best.safetensors"
    fed = images if raw else normalised(student, images)
    expected = logits_of(student, normalised(student, images))
    for part in (slice(0, 1), slice(0, 5)):
        (logits,) = session.run(None, {"images": fed[part].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[part], atol=1e-4, rtol=0)

    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list("0123456789") and json.loads(about["mean"]) == [0.5, 0.5, 0.5]
    assert about["architecture"] == KNOWN and json.loads(about["normalised_inside"]) is raw
    if not raw:
        onnx = pytest.importorskip("onnx")
        assert {item.version for item in onnx.load(path).opset_import if not item.domain} == {18}


def test_the_program_is_the_student(run: Run, runs: Path, tmp_path: Path) -> None:
    result = run("export", runs / "known", "--format", "program", "--output", tmp_path / "a.pt2")
    assert result.code == 0 and "64 validation images of digits" in result.err
    files = {"irgdistill.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=files).module()
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        assert not any(b"timm/models" in archive.read(name) for name in archive.namelist()), "no path of this machine"
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        for part in (images[:1], images):
            expected = logits_of(runs / "known" / "best.safetensors", part)
            torch.testing.assert_close(program(part), expected, atol=1e-5, rtol=0)
    about = json.loads(files["irgdistill.json"])
    assert about["input_size"] == [3, 48, 48] and "(value / 255 - mean) / std" in about["input"]


BARE = """
import sys
{code}
print(*logits[0].tolist())
plain = timm.create_model({name!r}, num_classes=10, checkpoint_path={path!r}).eval()
print(*plain(transform(Image.open("image.png").convert("RGB")).unsqueeze(0))[0].tolist())
assert "irgdistill" not in sys.modules
"""


def test_timm_alone_loads_the_folder_as_its_card_says(run: Run, runs: Path, tmp_path: Path) -> None:
    """In a bare process: the card's own lines, and the plain weights."""
    assert run("export", runs / "known", "--format", "timm", "--output", tmp_path / "plain").code == 0
    result = run("export", runs / "known", "--output", tmp_path / "hub")
    assert result.code == 0, result.err
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "recipe.yaml")
    }
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"config.json", f"{KNOWN}.safetensors"}
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    script = BARE.format(code=use_of(tmp_path / "hub"), name=KNOWN, path=f"plain/{KNOWN}.safetensors")
    bare = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert bare.returncode == 0, bare.stderr
    label, *lines = bare.stdout.splitlines()

    student = runs / "known" / "best.safetensors"
    network = restore(student)[0]
    size = int(48 / network.input.crop_pct)  # what timm's transform does to 48 pixels, by hand
    edge = (size - 48) // 2
    larger = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
    shown = np.asarray(larger.crop((edge, edge, edge + 48, edge + 48)))
    image = torch.tensor(shown / 255, dtype=torch.float32).permute(2, 0, 1)
    expected = logits_of(student, normalised(student, image[None]))[0]
    for line in lines:
        assert [float(value) for value in line.split()] == pytest.approx(expected.tolist(), abs=1e-4)
    assert lines[0] == lines[1] and label == str(expected.argmax().item())


def use_of(folder: Path) -> str:
    """The card's example, on the folder itself."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return str(code).replace("hf-hub:USER/NAME", f"local-dir:{folder}")


def test_the_hub_loads_it(run: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's way through the Hub, with the download replaced; and config.json is what timm itself writes."""
    assert run("export", runs / "known", "--output", tmp_path / "hub").code == 0
    monkeypatch.setattr(
        "timm.models._hub.hf_hub_download", lambda *a, **k: str(tmp_path / "hub" / (k.get("filename") or a[-1]))
    )
    model = timm.create_model("hf-hub:me/student", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(model(images), logits_of(runs / "known" / "best.safetensors", images))
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 48, 48) and model.pretrained_cfg["label_names"] == list("0123456789")
    assert model.pretrained_cfg["tag"] == "irg_kd" and model.pretrained_cfg["license"] == "apache-2.0"

    timm.models.save_for_hf(model, tmp_path / "timm", {"label_names": list("0123456789")}, safe_serialization=True)
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hub", "timm"))
    assert theirs["pretrained_cfg"].pop("label_names") == ours["label_names"]  # a loaded model has them twice
    assert ours == theirs
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("hub", "timm"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_card_tells_the_run_and_its_controls(run: Run, runs: Path, tmp_path: Path) -> None:
    chosen = runs / "compare" / "kd" / "1"
    result = run("export", chosen, "--output", tmp_path / "hub", "--license", "cc-by-4.0", "--check-images", 3)
    assert result.code == 0, result.err
    card = huggingface_hub.ModelCard.load(tmp_path / "hub" / "README.md")
    about, text = card.data.to_dict(), card.text
    metrics = json.loads((chosen / "summary.json").read_text())
    assert about["library_name"] == "timm" and about["license"] == "cc-by-4.0"
    (entry,) = about["model-index"]
    assert entry["results"][0]["metrics"][0]["value"] == pytest.approx(metrics["top1"] / 100, abs=1e-6)

    compared = json.loads((runs / "compare" / "compare.json").read_text())
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [
        *("Usage", "Accuracy", "Comparison with other methods"),
        *("Recipe", "Versions and licence", "Citation"),
    ]
    assert f"| this student, after epoch 1 | {metrics['top1']:.2f} |" in text
    assert f"| teacher, `cifar_resnet20` | {compared['teacher_top1']:.2f} | – | 179 |" in text
    for row in compared["rows"]:
        assert f"| {row['method']} | {len(row['seeds'])} | {row['top1_mean']:.2f} ± {row['top1_std']:.2f} |" in text
    assert "this one is `kd`, seed 1" in text and "1 · ce + 1 · kd" in text
    assert "import irgdistill.models" in use_of(tmp_path / "hub") and "is not part of timm: install irgdistill" in text
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    used = dict[str, Any]()
    exec(use_of(tmp_path / "hub").replace("image.png", f"{tmp_path}/image.png"), used)
    assert used["logits"].shape == (1, 10)
    assert str(runs) not in card.content + (tmp_path / "hub" / "recipe.yaml").read_text(), "no path of this machine"

    recipe = load_config(str(tmp_path / "hub" / "recipe.yaml"))
    assert recipe.method == "kd" and recipe.seed == 1 and str(recipe.teacher.checkpoint) == "last.safetensors"
    again = ("distill", "--preset", tmp_path / "hub" / "recipe.yaml", "--dry-run")
    shown = run(*again, "--teacher-checkpoint", runs / "teacher" / "last.safetensors")
    assert shown.code == 0 and yaml.safe_load(shown.out)["losses"] == recipe.losses.model_dump(mode="json")


def test_the_card_tells_no_more_than_is_known(run: Run, runs: Path, tmp_path: Path) -> None:
    """A run of its own tells its teacher's accuracy; weights alone tell neither that nor their epochs."""
    assert run("export", runs / "known", "--output", tmp_path / "run", "--check-images", 1).code == 0
    tried = json.loads((runs / "known" / "metrics.jsonl").read_text().splitlines()[0])
    text = (tmp_path / "run" / "README.md").read_text()
    assert tried["kind"] == "teacher" and f"| teacher, `cifar_resnet20` | {tried['top1']:.2f} |" in text
    assert "| `layer3.2` |" in text and "Comparison" not in text and "| epochs | 6 |" in text
    assert "5 · edges (fades out between 30% and 60% of the training)" in text

    shutil.copy(runs / "compare" / "none" / "0" / "best.safetensors", tmp_path)
    assert run("export", tmp_path / "best.safetensors", "--output", tmp_path / "file", "--check-images", 1).code == 0
    text = (tmp_path / "file" / "README.md").read_text()
    assert "trained on labels alone" in text and "this student, after epoch 1" in text
    for unknown in ("teacher,", "Comparison", "| epochs |", "Matched stages", "recipe.yaml"):
        assert unknown not in text
    assert not (tmp_path / "file" / "recipe.yaml").exists()


def test_large_logits_may_differ_by_their_rounding() -> None:
    network = build_network("cifar_resnet14_x0_5", num_classes=10)
    network.model.eval().get_classifier().bias.data.fill_(1000.0)
    with torch.no_grad():
        check = export._Check(network, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "2 images", raw_input=False)
        check(lambda images: network.model(images) + 0.005)
        with pytest.raises(UserError, match=r"by up to 2\.0e-02, 1e-02 is allowed"):
            check(lambda images: network.model(images) + 0.02)


def test_a_difference_leaves_everything_as_it_was(
    run: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "student.pt2"
    command = ("export", runs / "known", "--format", "program", "--output", path)
    forward = programs.Student.forward
    monkeypatch.setattr(programs.Student, "forward", lambda self, images: forward(self, images) + 2e-4)
    wrong = run(*command)
    assert wrong.code == 2 and "by up to 2.0e-04, 1e-04 is allowed; nothing was written" in wrong.err
    assert wrong.err.count("\n") == 1 and not [*tmp_path.iterdir()]
    path.write_text("mine")
    assert run(*command, "--overwrite").code == 2 and path.read_text() == "mine" and [*tmp_path.iterdir()] == [path]
    monkeypatch.setattr(programs.Student, "forward", lambda self, images: forward(self, images) * float("nan"))
    assert "differ from the student's by up to nan" in run(*command, "--overwrite").err


def test_a_network_that_cannot_be_exported_is_one_line(
    run: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum() > 0 else images

    monkeypatch.setattr(programs.Student, "forward", forward)
    refused = run("export", runs / "known", "--format", "program", "--output", tmp_path / "a.pt2")
    assert refused.code == 2 and f"{KNOWN} cannot be exported as a graph: " in refused.err
    assert refused.err.count("\n") == 1 and not [*tmp_path.iterdir()]


def test_without_the_data_it_is_checked_on_random_images(run: Run, runs: Path, tmp_path: Path) -> None:
    weights, metadata = read_tensors(runs / "known" / "best.safetensors")
    assert metadata is not None
    metadata["data"]["source"] = str(tmp_path / "gone")
    save_tensors(tmp_path / "student.safetensors", weights, metadata)
    command = ("export", tmp_path / "student.safetensors", "--format", "timm")
    result = run(*command)
    assert result.code == 0 and "is no longer at" in result.err and "on 64 random images" in result.err
    assert (tmp_path / "timm" / f"{KNOWN}.safetensors").exists()
    assert "validation images of digits" in run(*command, "--overwrite", "--data", "digits").err
    refused = run(*command, "--overwrite", "--data", tmp_path / "nowhere")
    assert refused.code == 2 and f"is no longer at {tmp_path / 'nowhere'}" in refused.err


def test_nothing_is_overwritten_unasked(run: Run, runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    command = ("export", runs / "compare" / "kd" / "0", "--check-images", 1, "--output", folder)
    assert run(*command).code == 0
    (folder / "README.md").write_text("mine")
    refused = run(*command)
    assert refused.code == 2 and "exists; give another --output or --overwrite" in refused.err
    (folder / "notes.txt").write_text("mine")
    foreign = run(*command, "--overwrite")
    assert foreign.code == 2 and "holds other files (notes.txt)" in foreign.err
    assert (folder / "README.md").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert run(*command, "--overwrite").code == 0 and (folder / "README.md").read_text() != "mine"
    assert [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nowhere",), "nowhere is neither a run folder nor a checkpoint file"),
        (("nowhere.safetensors",), "no file nowhere.safetensors"),
        (("foreign.pth",), "foreign.pth was not written by irgdistill"),
        (("RUN", "--format", "onxx"), "expected hub, onnx, program or timm; did you mean onnx"),
        (("RUN", "--check-images", 0), "--check-images 0: expected at least 1"),
        (("RUN", "--opset", 18), "--opset needs --format onnx, not with hub"),
        (("RUN", "--format", "timm", "--raw-input"), "--raw-input needs --format onnx or program, not with timm"),
        (("RUN", "--format", "onnx", "--push", "me/x"), "--push needs --format hub, not with onnx"),
        (("RUN", "--format", "program", "--output", "a.onnx"), "the file of --format program ends in .pt2"),
        (("RUN", "--output", "foreign.pth"), "foreign.pth is a file; --format hub writes a folder"),
        (("RUN", "--push", "not a name"), "--push not a name: "),
        (("RUN", "--format", "onnx", "--opset", 7), "--opset 7: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("foreign.pth").write_bytes(b"")
    target, *others = (runs / "compare" / "kd" / "0" if option == "RUN" else option for option in options)
    before = sorted(runs.rglob("*"))
    result = run("export", target, *others)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err
    assert sorted(runs.rglob("*")) == before and [*tmp_path.iterdir()] == [tmp_path / "foreign.pth"]


def test_what_is_not_installed_is_named(run: Run, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    result = run("export", runs / "known", "--format", "onnx")
    assert result.code == 2 and "--format onnx needs onnxscript: pip install 'irgdistill[onnx]'" in result.err


class FakeHub:
    """`HfApi` without a network: what was sent is kept."""

    def __init__(self, has_card: bool = False, error: Exception | None = None) -> None:
        self.has_card, self.error, self.sent = has_card, error, dict[str, Any]()

    def __call__(self, **_: Any) -> FakeHub:
        return self

    def create_repo(self, repo_id: str, exist_ok: bool) -> SimpleNamespace:
        assert exist_ok
        if self.error is not None:
            raise self.error
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def file_exists(self, repo_id: str, filename: str) -> bool:
        assert filename == "README.md"
        return self.has_card

    def upload_folder(self, **options: Any) -> None:
        files = {path.name for path in Path(options["folder_path"]).iterdir()}
        self.sent = {**options, "files": files - set(options["ignore_patterns"] or ())}


@pytest.mark.parametrize("has_card", [False, True])
def test_push_sends_the_folder(
    run: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_card: bool
) -> None:
    hub = FakeHub(has_card)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    command = ("export", runs / "compare" / "kd" / "0", "--check-images", 1, "--output", tmp_path / "hub")
    result = run(*command, "--push", "student")
    assert result.code == 0, result.err
    assert "uploaded to https://huggingface.co/me/student" in result.err
    card = set() if has_card else {"README.md"}
    assert hub.sent["files"] == {"config.json", "model.safetensors", "recipe.yaml"} | card
    assert hub.sent["repo_id"] == "me/student" and "hf-hub:student" in (tmp_path / "hub" / "README.md").read_text()

    there = run(*command, "--push", "student")
    assert there.code == 2 and f"upload what is there: hf upload student {tmp_path / 'hub'}" in there.err
    assert run(*command, "--push", "student", "--overwrite").code == 0 and "README.md" in hub.sent["files"]


def test_push_without_login_or_network_is_one_line(
    run: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        "export",
        runs / "compare" / "kd" / "0",
        "--check-images",
        1,
        "--output",
        tmp_path / "hub",
        "--push",
        "x",
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused = run(*command)
    assert refused.code == 2 and "not logged in to the Hugging Face Hub; run `hf auth login` first" in refused.err
    assert not [*tmp_path.iterdir()]

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub(error=ConnectionError("no\nroute")))
    failed = run(*command)
    assert (
        failed.code == 2
        and f"no route; the folder is complete, upload it later: hf upload x {tmp_path / 'hub'}" in failed.err
    )
    assert (tmp_path / "hub" / "model.safetensors").exists() and "Traceback" not in failed.err
