"""Classes of unequal size: exact counts, one order for any number of workers and processes, weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import Run, input_spec, interrupted, position, write_images

from irgdistill.config.schema import AugmentConfig, DataConfig, LossesConfig
from irgdistill.data.dataset import UnreadableImages
from irgdistill.data.loader import Loader, train_loader
from irgdistill.data.open import open_splits
from irgdistill.data.sampling import EpochSampler, balanced_weights, draw_balanced
from irgdistill.errors import UserError
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss
from irgdistill.matching.taps import Output
from irgdistill.runtime.distributed import World

CPU = torch.device("cpu")
LABELS = torch.tensor([0] * 50 + [1] * 7 + [3] * 23)
"""80 images; class 2 has none."""
SMALL = ("--input-size", 16, "--workers", 0, "--batch-size", 12, "--method", "none", "--seed", 3)


def draw(count: int, epoch: int = 0) -> torch.Tensor:
    return draw_balanced(LABELS, count, epoch, torch.Generator().manual_seed(epoch))


@pytest.mark.parametrize("count", [3, 72, 80, 77])
def test_every_class_is_drawn_equally_often(count: int) -> None:
    keys = draw(count)
    counts = Counter(LABELS[keys % 80].tolist())
    assert len(keys) == count and set(counts) == {0, 1, 3}
    assert max(counts.values()) - min(counts.values()) <= 1 and sum(counts.values()) == count


def test_every_image_of_a_class_is_drawn_equally_often() -> None:
    times = torch.bincount(draw(72) % 80, minlength=80)
    assert times[:50].max() == 1 and times[:50].sum() == 24, "24 of the 50"
    assert set(times[50:57].tolist()) == {3, 4} and set(times[57:].tolist()) == {1, 2}


def test_an_image_that_comes_again_has_another_key() -> None:
    keys = torch.cat([draw(80, epoch) for epoch in range(6)])
    assert len(keys.unique()) == len(keys)


def test_which_classes_have_one_more_is_drawn_too() -> None:
    more = set()
    for epoch in range(20):
        counts = Counter(LABELS[draw(80, epoch) % 80].tolist())
        more.add(tuple(sorted(label for label, times in counts.items() if times == 27)))
    assert more == {(0, 1), (0, 3), (1, 3)}


def order(rank: int = 0, size: int = 1, epoch: int = 2, start: int = 0, seed: int = 5) -> list[int]:
    made = EpochSampler(80, 12, seed, World(rank, size), LABELS)
    made.epoch, made.start = epoch, start
    keys = list(made)
    assert len(keys) == len(made)
    return keys


def test_two_processes_share_the_batches_of_one() -> None:
    whole = torch.tensor(order()).view(-1, 12)
    halves = torch.stack([torch.tensor(order(rank, 2)).view(-1, 6) for rank in (0, 1)], dim=1).flatten(1)
    assert len(whole) == 6 and torch.equal(whole.sort(1).values, halves.sort(1).values)
    assert torch.bincount(LABELS[whole.flatten() % 80]).tolist() == [24, 24, 0, 24]


def test_the_order_is_one_of_seed_and_epoch_and_can_be_entered_anywhere() -> None:
    assert order() == order() and order(start=2) == order()[24:]
    assert order() != order(seed=6) and order() != order(epoch=3)


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    write_images(tmp_path / "data" / "train", {"red": 40, "green": 5, "blue": 15})
    write_images(tmp_path / "data" / "val", {"red": 4, "green": 4, "blue": 4}, seed=1)
    return tmp_path / "data"


def loader(data: Path, workers: int = 0) -> Loader:
    config = DataConfig(source=str(data), batch_size=12, workers=workers, balanced=True)
    splits = open_splits(config)
    return train_loader(splits, config, AugmentConfig(), input_spec(16), CPU, 0, UnreadableImages(0))


def test_workers_change_nothing_and_an_image_that_comes_again_is_augmented_anew(uneven: Path) -> None:
    batches = [list(loader(uneven, workers).epoch(1)) for workers in (0, 2)]
    for (a, x), (b, y) in zip(*batches, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)
    images, labels = (torch.cat(parts) for parts in zip(*batches[0], strict=True))
    assert torch.bincount(labels).tolist() == [20, 20, 20]
    green = images[labels == 1].flatten(1)
    assert len(green.unique(dim=0)) > 15, "five images, four times each"
    assert all(
        torch.equal(a, b) for (a, _), (b, _) in zip(loader(uneven).epoch(1, start=2), batches[0][2:], strict=True)
    )


def test_a_stopped_run_goes_on_to_the_same_student(run: Run, uneven: Path, tmp_path: Path) -> None:
    options = ("--data", uneven, "--student", "cifar_resnet14_x0_5", "--epochs", 2, "--balanced", *SMALL)
    options += ("--set", "losses.ce.class_weights=balanced", "--mixup", 0.2)
    assert run("distill", *options, "--output", tmp_path / "whole").code == 0
    with interrupted(lambda trainer: position(trainer) == 6):
        assert run("distill", *options, "--output", tmp_path / "parts").code == 130
    resumed = run("distill", "--resume", tmp_path / "parts")
    assert resumed.code == 0, resumed.err
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_scikit_learns() -> None:
    utils = pytest.importorskip("sklearn.utils.class_weight")
    labels = [0] * 40 + [1] * 5 + [2] * 15
    expected = utils.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = balanced_weights(labels, ["a", "b", "c"])
    assert weights == pytest.approx(list(expected))
    assert sum(weights[label] for label in labels) / len(labels) == pytest.approx(1)
    with pytest.raises(UserError, match="class 'd' has no training images"):
        balanced_weights(labels, ["a", "b", "c", "d"])


def test_the_cross_entropy_and_nothing_else_is_weighted() -> None:
    torch.manual_seed(0)
    student, teacher = (Output(torch.randn(6, 3), {}) for _ in range(2))
    labels, weights = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0.5, 2.0, 1.0])
    config = LossesConfig.model_validate({"kd": {"weight": 1}, "dkd": {"weight": 1}, "ce": {"label_smoothing": 0.0}})
    plain = build_loss(config, None)(Batch(student, labels, teacher))
    weighed = build_loss(config, None, class_weights=weights)(Batch(student, labels, teacher))
    by_hand = [-float(weights[k] * student.logits[i].log_softmax(0)[k]) for i, k in enumerate(labels.tolist())]
    assert weighed["ce"].item() == pytest.approx(sum(by_hand) / 6, rel=1e-5) != plain["ce"].item()
    assert all(torch.equal(plain[name], weighed[name]) for name in ("kd", "dkd"))


def test_weighted_mixed_targets_are_those_of_their_parts() -> None:
    torch.manual_seed(1)
    student, weights = Output(torch.randn(4, 3), {}), torch.tensor([0.5, 2.0, 1.0])
    loss = build_loss(LossesConfig(), None, class_weights=weights)
    a, b = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 1, 0])
    mixed = 0.3 * F.one_hot(a, 3) + 0.7 * F.one_hot(b, 3)
    parts = [loss(Batch(student, labels))["ce"].item() for labels in (a, b)]
    assert loss(Batch(student, mixed))["ce"].item() == pytest.approx(0.3 * parts[0] + 0.7 * parts[1], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "losses.ce.class_weights=[1,2]"), "holds 2 weights, the data 3 classes"),
        (("--set", "losses.ce.class_weights=[0,0,0]"), "not all 0"),
        (("--set", "losses.ce.class_weights=balansed"), "balansed"),
        (("--set", "losses.ce.class_weights=[1,2,-1]"), "greater than or equal to 0"),
    ],
)
def test_wrong_weights_are_one_line(run: Run, uneven: Path, options: tuple[object, ...], message: str) -> None:
    result = run("distill", "--data", uneven, "--student", "cifar_resnet14_x0_5", *SMALL, *options)
    assert result.code == 2 and result.err.count("\n") == 1 and message in result.err, result.err


@pytest.mark.parametrize("option", ["--balanced", "losses.ce.class_weights=balanced"])
def test_streams_are_refused(run: Run, tmp_path: Path, option: str) -> None:
    import io
    import tarfile

    pytest.importorskip("webdataset")
    for split in ("train", "val"):
        write_images(tmp_path / "one", {"red": 1})
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as file:
            for ending, content in (("png", (tmp_path / "one/red/000.png").read_bytes()), ("cls", b"1")):
                member = tarfile.TarInfo(f"x.{ending}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    options = (option,) if option.startswith("--") else ("--set", option)
    result = run("distill", "--data", f"wds/{tmp_path}", "--student", "cifar_resnet14_x0_5", *SMALL, *options)
    assert result.code == 2 and "is a stream, whose classes cannot be counted beforehand" in result.err
    assert result.err.count("\n") == 1
