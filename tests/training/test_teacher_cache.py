"""A teacher's answers on disk: those of the live teacher, kept whole, refused where they are another's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import Run, command

from irgdistill.config.loading import load_config
from irgdistill.errors import UserError
from irgdistill.io.console import Report
from irgdistill.io.run_folder import RunFolder
from irgdistill.losses.terms.logits import soft_targets
from irgdistill.training import teacher_cache as cache
from irgdistill.training.setup import prepare
from irgdistill.training.stored_logits import pack_logits, unpack_logits
from irgdistill.training.teacher_cache import TeacherCache
from irgdistill.training.trainer import build_trainer

RECIPE = ("--preset", "quickstart", "--student", "cifar_resnet14_x0_5", "--batch-size", 32, "--warmup-epochs", 0)
RECIPE += ("--device", "cpu", "--amp", "none", "--workers", 0, "--set", "data.train_images=224")
WHOLE = [word for term in ("positions", "sp", "fitnet", "fsp") for word in ("--set", f"losses.{term}.weight=1")]
SHORT = ("--epochs", 2, "--set", "runtime.log_every=1", "--set", "runtime.gradient_shares_every=0")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    network = ("--student", "cifar_resnet20_x0_5")
    assert command("distill", *RECIPE, *network, "--epochs", 2, "--method", "none", "--output", folder) == 0
    return folder / "last.safetensors"


@pytest.fixture(scope="module")
def cached(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two views of every image, in several files, stored in three ways."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        for store, logits in (("fp32", "all"), ("fp16", "all"), ("fp32", "8")):
            options = ("--set", "data.views=2") if logits == "8" else ("--views", 2)
            options += ("--store", store, "--logits", logits, "--output", root / f"{store}-{logits}")
            if store == "fp32":
                options += tuple(WHOLE)
            assert command("cache-teacher", *RECIPE, "--teacher-checkpoint", teacher, *options) == 0
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(autouse=True)
def _shards(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("irgdistill.training.teacher_cache.SHARD", "irgdistill.commands.cache_teacher.SHARD"):
        monkeypatch.setattr(module, 175)


def losses(folder: Path) -> torch.Tensor:
    """Total and every term at each update (updates, terms)."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [[record["loss"], *record["terms"].values()] for record in records if record["kind"] == "train"]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "store", "rate", "tolerance"),
    [
        ("irg+kd", "fp32-all", 0.1, 2e-5),
        ("irg+kd", "fp16-all", 1e-6, 1e-3),
        ("kd", "fp32-all", 0.1, 2e-5),
        ("kd", "fp32-8", 1e-6, 0.2),
        ("rkd", "fp32-all", 0.1, 2e-5),
        ("at", "fp32-all", 1e-6, 2e-5),
        ("at", "fp16-all", 1e-6, 1e-3),
        ("positions", "fp32-all", 0.1, 2e-5),
        ("sp", "fp32-all", 1e-6, 2e-5),
        ("fitnet", "fp32-all", 1e-6, 2e-5),
        ("fsp", "fp32-all", 1e-6, 2e-5),
    ],
)
def test_losses_are_those_of_the_live_teacher(
    run: Run,
    teacher: Path,
    cached: dict[str, Path],
    tmp_path: Path,
    method: str,
    store: str,
    rate: float,
    tolerance: float,
) -> None:
    """On the same views, at every update of two epochs; nearly, with the eight largest of ten logits.

    Where the stored numbers are rounded the weights are held: training multiplies any difference.
    """
    common = ("distill", *RECIPE, *SHORT, "--method", method, "--lr", rate)
    live = ("--teacher-checkpoint", teacher, "--set", "data.views=2", "--set", "data.view_seed=0")
    assert run(*common, *live, "--skip-teacher-check", "--output", tmp_path / "live").code == 0
    result = run(*common, "--teacher-cache", cached[store], "--output", tmp_path / "cached")
    assert result.code == 0, result.err
    a, b = losses(tmp_path / "live"), losses(tmp_path / "cached")
    assert len(a) > 10
    torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    if store == "fp32-8":
        assert not torch.allclose(a, b, rtol=1e-4), "eight logits are not ten"


def test_second_views_are_answered_like_first_ones(run: Run, teacher: Path, tmp_path: Path) -> None:
    """Losses on both views, as those of the live teacher; a run on one view, or on others, is refused."""
    views = ("--set", "data.second_view=rand-m9-n1-inc1", "--set", "data.views=2", "--set", "data.view_seed=0")
    folder = tmp_path / "cache"
    making = ("cache-teacher", *RECIPE, *views, "--teacher-checkpoint", teacher, "--store", "fp32", "--output", folder)
    assert run(*making).code == 0
    common = ("distill", *RECIPE, "--epochs", 1, *SHORT[2:], "--method", "crld", "--lr", 1e-6)
    common += ("--set", "losses.attention.weight=9", "--set", "losses.crld.confidence=0")
    cached = ("--teacher-cache", folder)
    live = ("--teacher-checkpoint", teacher, "--skip-teacher-check", "--output", tmp_path / "live")
    assert run(*common, *views, *live).code == 0
    result = run(*common, *views[:2], *cached, "--output", tmp_path / "cached")
    assert result.code == 0, result.err
    a, b = losses(tmp_path / "live"), losses(tmp_path / "cached")
    assert len(a) == 14 and (a[:, 1:] > 0).all()
    torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5)
    for options, message in (
        ((), "crld compares two views of each image: --set data.second_view="),
        (("--method", "kd"), "data.second_view = None, but the teacher cache"),
        ((*views[:2], "--mixup", 0.1), "crld compares two views of each image: leave out --mixup"),
    ):
        refused = run(*common, *cached, *options, "--output", tmp_path / "no")
        assert refused.code == 2 and message in refused.err, refused.err


def test_training_needs_no_teacher_and_sees_its_views(
    run: Run, cached: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No teacher is built, and the student alone is bit for bit the one that trains on these views without a cache."""
    monkeypatch.setattr("irgdistill.training.setup.build_teacher", None)
    folder = cached["fp16-all"]
    command = ("distill", *RECIPE, *SHORT, "--output", tmp_path / "kd", "--teacher-cache", folder)
    command += ("--teacher", "cifar_resnet20_x0_5")
    assert run(*command, "--method", "irg+kd").code == 0
    summary = json.loads((tmp_path / "kd" / "summary.json").read_text())
    assert summary["teacher"] == "cifar_resnet20_x0_5"
    alone = ("distill", *RECIPE, *SHORT, "--method", "none", "--output")
    assert run(*alone, tmp_path / "with", "--teacher-cache", folder).code == 0
    assert run(*alone, tmp_path / "without", "--set", "data.views=2", "--set", "data.view_seed=0").code == 0
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("with", "without"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_an_interrupted_cache_is_finished_and_is_the_same(
    run: Run, teacher: Path, cached: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from irgdistill.commands import cache_teacher as caching
    from irgdistill.runtime.signals import Stopped

    written: list[str] = []
    save = caching.save_tensors

    def stopping(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise Stopped(2)
        written.append(path.name)
        save(path, *rest)

    command = ("cache-teacher", *RECIPE, "--teacher-checkpoint", teacher, "--views", 2, "--store", "fp32")
    command += (*WHOLE, "--output", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(caching, "save_tensors", stopping)
        stopped = run(*command)
    assert stopped.code == 130 and "the same command goes on" in stopped.err
    unfinished = run("distill", *RECIPE, *SHORT, "--teacher-cache", tmp_path / "out", "--output", tmp_path / "run")
    assert unfinished.code == 2 and "is not complete: 2 of 3 files" in unfinished.err
    assert not (tmp_path / "run").exists()
    damaged = tmp_path / "out" / "00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert "2 of 3 files to write" in run(*command).err
    whole = cached["fp32-all"]
    assert (tmp_path / "out" / "cache.json").read_text() == (whole / "cache.json").read_text()
    for path in sorted(whole.glob("*.safetensors")):
        a, b = load_file(path), load_file(tmp_path / "out" / path.name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert "0 of 3 files to write" in run(*command).err
    other = run(*command, "--views", 3)
    assert other.code == 2 and "holds another cache" in other.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "augment.hflip=0.5"), "was made of views of another recipe: hflip 0.5, was 0.0"),
        (("--set", "augment.padding=3"), "views of another recipe: padding 3, was"),
        (("--set", "data.views=3"), "data.views = 3, but the teacher cache"),
        (("--set", "data.view_seed=3"), "data.view_seed = 3, but the teacher cache"),
        (("--set", "data.train_images=200"), "was made of other images: images 200, was"),
        (("--val-fraction", 0.2), "was made of other images: labels"),
        (("--mixup", 0.2), "the output for a mix is not the mix of outputs"),
        (("--method", "fsp"), "fsp compares whole maps of layer1.0, layer1.2"),
        (("--set", "losses.sp.weight=1", "--set", "losses.fsp.weight=1"), "fsp and sp compare whole maps of layer1.0"),
        (("--method", "positions"), "positions compares grids of layer1.2, layer2.2, layer3.2, which"),
        (("--teacher", "cifar_resnet20"), "was made of another teacher: architecture"),
        (("--teacher-checkpoint", "OTHER"), "was made of another teacher: architecture"),
        (("--teacher-checkpoint", "SAME"), "was made of another teacher: weights"),
        (("--taps-teacher", "layer2.1,layer3.2"), "taps layer2.1 of the teacher, which"),
        (("--method", "at", "--taps-teacher", "layer2.0,layer3.2"), "taps layer2.0 of the teacher, which"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    run: Run, teacher: Path, cached: dict[str, Path], tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    if "OTHER" in options or "SAME" in options:
        from safetensors.torch import save_file

        from irgdistill.models.build import build_network

        name = "cifar_resnet20" if "OTHER" in options else "cifar_resnet20_x0_5"
        weights = build_network(name, num_classes=10).model.state_dict()
        save_file(weights, tmp_path / "other.safetensors")
        options = tuple(tmp_path / "other.safetensors" if word in ("OTHER", "SAME") else word for word in options)
        options = ("--teacher", name, *options)
    command = ("distill", *RECIPE, *SHORT, "--teacher-cache", cached["fp16-all"], "--output", tmp_path / "out")
    result = run(*command, *options)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_files_of_a_cache_are_checked(cached: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(cached["fp16-all"], tmp_path / "cache")
    TeacherCache(folder).open()
    shard = folder / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        TeacherCache(folder).open()
    shutil.copy(cached["fp32-all"] / shard.name, shard)
    with pytest.raises(UserError, match="belongs to another teacher cache"):
        TeacherCache(folder).open()
    shard.unlink()
    with pytest.raises(UserError, match="is not complete: 2 of 3 files"):
        TeacherCache(folder).open()
    (folder / "cache.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        TeacherCache(folder)
    with pytest.raises(UserError, match="holds no teacher cache"):
        TeacherCache(tmp_path)


def test_rows_are_found_by_their_keys(cached: dict[str, Path]) -> None:
    store = TeacherCache(cached["fp32-all"])
    store.open()
    every = {name: torch.cat([shard[name] for shard in store._shards]) for name in store._shards[0]}
    keys = [374, 3, 174, 175, 447, 3]
    rows = store.rows(keys)
    assert rows.keys() == every.keys() and "logits" in rows and len(rows) > 3
    assert all(torch.equal(rows[name], every[name][keys]) for name in rows)
    output = store.output(store.teacher_rows(keys))
    found = {"logits": output.logits} | {f"tap {name}": x for name, x in output.features.items()}
    found |= {f"attention {name}": x for name, x in output.energies.items()}
    found |= {f"grid {name}": x for name, x in output.grids.items()}
    found |= {f"map {name}": x for name, x in output.maps.items()}
    assert found.keys() == rows.keys() and all(torch.equal(found[name], rows[name]) for name in rows)


@pytest.mark.parametrize(
    ("method", "kinds"),
    [("kd", set()), ("kd+at", {"attention"}), ("rkd", {"tap"}), ("irg+kd+at", {"attention", "tap"})],
)
def test_only_what_the_terms_compare_is_read(
    method: str, kinds: set[str], cached: dict[str, Path], tmp_path: Path
) -> None:
    flags = {"method": method, "teacher.cache": cached["fp32-all"], "student.name": "cifar_resnet14_x0_5"}
    flags |= {"data.batch_size": 32, "data.train_images": 224, "data.workers": 0, "runtime.device": "cpu"}
    setup = prepare(load_config(preset="quickstart", flags=flags))
    run = build_trainer(setup, RunFolder(tmp_path), Report(quiet=True)).components
    assert run.setup.caches
    assert {name.partition(" ")[0] for name in run.setup.caches[0].rows([0])} == {"logits", *kinds}


def test_the_largest_logits_keep_the_mass_of_the_rest() -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(20, 50)
    rows = pack_logits(logits, 8, torch.float32)
    again = unpack_logits(rows, 50)
    classes = logits.topk(8, dim=1).indices
    expected = logits.softmax(1).gather(1, classes)
    torch.testing.assert_close(again.softmax(1).gather(1, classes), expected)
    rest = again.softmax(1).scatter(1, classes, 0).sum(1)
    torch.testing.assert_close(rest, 1 - expected.sum(1), rtol=1e-4, atol=1e-6)
    errors = [
        float(soft_targets(unpack_logits(pack_logits(logits, k, torch.float32), 50), logits, 1)) for k in (2, 8, 40)
    ]
    assert errors[0] > errors[1] > errors[2] > 0
    assert torch.equal(unpack_logits(pack_logits(logits, None, torch.float32), 50), logits)
    assert cache.DTYPES["fp16"] == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--store", "fp8"), "--store fp8: expected fp16 or fp32"),
        (("--logits", "10"), "--logits 10: expected all, or a number from 1 to 9"),
        (("--views", 0), "--views 0: expected at least 1"),
        (("--mixup", 1), "the output for a mix is not"),
        (("--resume", "x"), "cache-teacher does not take --resume"),
        (("--output", "FULL"), "is not empty and holds no teacher cache"),
    ],
)
def test_what_cannot_be_cached_is_refused(
    run: Run, teacher: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    options = tuple(tmp_path / "full" if word == "FULL" else word for word in options)
    command = ("cache-teacher", *RECIPE, "--teacher-checkpoint", teacher, "--output", tmp_path / "out")
    result = run(*command, *options)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_whole_maps_are_cached_for_a_student(run: Run, teacher: Path, tmp_path: Path) -> None:
    command = ("cache-teacher", "--preset", "quickstart", "--teacher-checkpoint", teacher, "--method", "sp")
    result = run(*command, "--device", "cpu", "--output", tmp_path / "out")
    assert result.code == 2 and "sp compares whole maps: give --student, too" in result.err
    assert not (tmp_path / "out").exists()


def test_a_run_from_a_cache_can_be_tried_beforehand(run: Run, cached: dict[str, Path]) -> None:
    result = run("doctor", *RECIPE, "--method", "kd", "--teacher-cache", cached["fp32-all"], "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["trial"]["step_rate"] > 0


def test_a_comparison_from_a_cache_goes_on(run: Run, cached: dict[str, Path], tmp_path: Path) -> None:
    """The views that its runs took from the cache are no other settings."""
    command = ("compare", *RECIPE, "--epochs", 1, "--methods", "none", "--teacher-cache", cached["fp16-all"])
    assert run(*command, "--seeds", 1, "--output", tmp_path / "out").code == 0
    result = run(*command, "--seeds", 2, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"][0]["seeds"] == [0, 1]
    other = run(*command, "--set", "data.views=3", "--output", tmp_path / "out")
    assert other.code == 2 and "data.views = 3" in other.err
