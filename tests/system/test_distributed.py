"""One process or many: the same graph, the same gradients, the same student."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.processes import in_ranks, trainer_of
from torch import Tensor

from irgdistill.config.loading import load_config
from irgdistill.data.sampling import EpochSampler
from irgdistill.errors import UserError
from irgdistill.graph import edge_loss, transformation_loss
from irgdistill.io.console import Report
from irgdistill.io.run_folder import RunFolder
from irgdistill.models.build import build_network
from irgdistill.runtime.batch_norm import sync_batch_norm
from irgdistill.runtime.distributed import World
from irgdistill.training.evaluation import evaluate
from irgdistill.training.setup import prepare
from irgdistill.training.state import open_state
from irgdistill.training.trainer import build_trainer

pytestmark = pytest.mark.timeout(600)


# --- relations --------------------------------------------------------------------------------------------------------

IMAGES, WIDTH = 24, 5


def _relations(world: World, scope: str) -> dict[str, tuple[float, Tensor]]:
    """Mean over the processes of each relation's loss, and the gradient of that mean at all images' features."""
    data = torch.randn(4, IMAGES, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    count = IMAGES // world.size
    own = [part[world.rows(count)].requires_grad_() for part in data]
    spans = world if scope == "global" else World()
    results = {}

    def edges() -> Tensor:
        student, teacher = (spans.gather(features) for features in own[:2])
        return edge_loss(student, teacher, spans.rows(len(own[0])), spans.maximum)

    losses = {
        "edges": edges,
        "transform": lambda: transformation_loss([(own[0], own[2])], [(own[1], own[3])], spans.maximum),
    }
    for name, loss in losses.items():
        for part in own:
            part.grad = None
        value = loss()
        (value / world.size).backward()  # DDP's mean
        student = torch.stack([torch.zeros_like(part) if part.grad is None else part.grad for part in (own[0], own[2])])
        gradient = world.gather(student.transpose(0, 1).contiguous())
        results[name] = (float(world.mean(value.detach())), gradient)
    return results


def test_relations_span_the_images_of_all_processes(tmp_path: Path) -> None:
    alone = _relations(World(), "global")
    for size in (2, 4):
        for rank, found in enumerate(in_ranks(size, tmp_path / str(size), _relations, "global")):
            for name, (value, gradient) in alone.items():
                assert found[name][0] == pytest.approx(value, abs=1e-12), (size, rank, name)
                torch.testing.assert_close(found[name][1], gradient, rtol=0, atol=1e-10)
    local = in_ranks(2, tmp_path / "local", _relations, "local")[0]
    for name, (value, gradient) in alone.items():
        assert abs(local[name][0] - value) > 1e-4, name
        assert (local[name][1] - gradient).abs().max() > 1e-5, name


def _equal_features(world: World) -> float:
    features = torch.ones(4, 3, requires_grad=True)
    loss = edge_loss(world.gather(features), torch.rand(8, 3), world.rows(4), world.maximum)
    loss.backward()
    assert features.grad is not None
    return float(loss + features.grad.abs().sum())


def test_equal_features_give_zeros_on_many_processes_too(tmp_path: Path) -> None:
    assert in_ranks(2, tmp_path, _equal_features) == [0.0, 0.0]


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "sizes"), [(12, (1, 2, 3, 6)), (10, (1, 2, 5))])
def test_batches_of_all_processes_are_those_of_one(batch_size: int, sizes: tuple[int, ...]) -> None:
    def batches(size: int, start: int) -> list[list[list[int]]]:
        parts = []
        for rank in range(size):
            order = EpochSampler(50, batch_size, seed=3, world=World(rank, size))
            order.epoch, order.start = 2, start
            keys, share = list(order), batch_size // size
            assert len(order) == len(keys)
            parts.append([keys[i : i + share] for i in range(0, len(keys), share)])
        return [list(batch) for batch in zip(*parts, strict=True)]

    whole = [batch for (batch,) in batches(1, start=1)]
    assert [sorted(batch) for batch in whole] != whole and len(whole) == 50 // batch_size - 1
    for size in sizes:
        for batch, parts in zip(whole, batches(size, start=1), strict=True):
            assert sorted(key for part in parts for key in part) == sorted(batch)
            if batch_size // size % 2 == 0:  # the partner of mixup, the image at the mirror place, is at hand
                partner = dict(zip(batch, reversed(batch), strict=True))
                for part in parts:
                    assert [partner[key] for key in part] == part[::-1]


# --- training ---------------------------------------------------------------------------------------------------------


def _flags(student: str, teacher: Path, **more: Any) -> dict[str, Any]:
    flags = {
        "student.name": student,
        "teacher.name": "cifar_resnet14_x0_5",
        "teacher.checkpoint": str(teacher),
        "teacher.check": False,
        "data.source": "digits",
        "data.batch_size": 8,
        "data.workers": 0,
        "data.val_fraction": 0.02,
        "data.train_images": 448,
        "optim.lr": 0.01,
        "schedule.epochs": 1,
        "runtime.device": "cpu",
        "runtime.gradient_shares_every": 3,
    }
    return flags | more


def _train(world: World, flags: dict[str, Any], folder: Path, steps: int, dtype: str) -> dict[str, Any]:
    """Weights, mean losses and metrics after some steps."""
    torch.set_default_dtype(getattr(torch, dtype))
    trainer = trainer_of(world, flags, folder)
    losses = []
    for images, labels in trainer.components.train.epoch():
        values = trainer.train_step(images, labels)
        losses.append(world.mean(torch.stack(list(values.values())).detach()))
        if len(losses) == steps:
            break
    assert len(losses) == steps
    for model in trainer.components.local_models:
        world.average_statistics(model)
    weights = {name: value.clone() for name, value in trainer.components.student.model.state_dict().items()}
    metrics = evaluate(
        trainer.components.evaluated, trainer.components.validation, trainer.components.autocast, world=world
    )
    return {"weights": weights, "losses": torch.stack(losses), "images": metrics.images, "top1": metrics.top1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(build_network("cifar_resnet14_x0_5", num_classes=10).model.state_dict(), path)
    return path


def _largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert list(a) == list(b)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_training_is_the_same_on_1_2_and_4_processes(tmp_path: Path, teacher: Path) -> None:
    more = {"student.input_size": 64, "augment.mixup": 0.4, "optim.accumulate": 2, "losses.edges.blocks": 2}
    more |= {"optim.lr": 1e-3}  # at 1e-2 the edges of this network make a rounding error grow fivefold with every step
    flags = _flags("test_convnext", teacher, **more)
    found = {n: in_ranks(n, tmp_path / str(n), _train, flags, tmp_path / f"run{n}", 12, "float64") for n in (1, 2, 4)}
    (alone,) = found[1]
    for size in (2, 4):
        for other in found[size]:
            assert _largest_difference(alone["weights"], other["weights"]) < 1e-8
            torch.testing.assert_close(other["losses"], alone["losses"], rtol=0, atol=1e-5)
            assert (other["images"], other["top1"]) == (alone["images"], pytest.approx(alone["top1"], abs=1e-4))
    assert alone["images"] == 39, "an odd number of images, so that the processes hold unequal shares"
    local = {**flags, "runtime.graph_scope": "local"}
    other = in_ranks(2, tmp_path / "local", _train, local, tmp_path / "run_local", 4, "float64")[0]
    assert (alone["losses"][:4] - other["losses"]).abs().max() > 1e-3


def _broken(world: World, flags: dict[str, Any], folder: Path) -> str:
    """What a step says in which the second process's total is not finite."""
    trainer = trainer_of(world, flags, folder)
    total = trainer.components.loss.total
    if world.rank == 1:
        trainer.components.loss.total = lambda raw, weights: total(raw, weights) * torch.inf  # type: ignore[method-assign]
    with pytest.raises(UserError) as refused:
        trainer.train_step(*next(iter(trainer.components.train.epoch())))
    return str(refused.value)


@pytest.mark.parametrize("every", [0, 1])
def test_a_loss_that_is_not_finite_stops_all_processes(tmp_path: Path, teacher: Path, every: int) -> None:
    flags = _flags("cifar_resnet14_x0_5", teacher) | {"runtime.gradient_shares_every": every}
    for said in in_ranks(2, tmp_path / "said", _broken, flags, tmp_path / "run"):
        assert "the loss is not finite at update 1, epoch 1 (total)" in said


def _compiler(world: World, *args: Any) -> bool:
    _train(world, *args, 1, "float32")
    return "torch._inductor.compile_fx" in sys.modules


def test_no_compiler_is_imported_unasked(tmp_path: Path, teacher: Path) -> None:
    """It takes seconds."""
    flags = _flags("cifar_resnet14_x0_5", teacher)
    assert in_ranks(1, tmp_path / "eager", _compiler, flags, tmp_path / "run1") == [False]


def test_synchronised_batch_norm_makes_many_processes_one(tmp_path: Path, teacher: Path) -> None:
    """In float64 to rounding. In float32 with a smooth activation: a ReLU that flips is no rounding error any more."""
    flags = _flags("cifar_resnet14_x0_5", teacher, **{"runtime.sync_bn": True, "optim.lr": 1e-3})
    (alone,) = in_ranks(1, tmp_path / "1", _train, flags, tmp_path / "run1", 8, "float64")
    for other in in_ranks(2, tmp_path / "2", _train, flags, tmp_path / "run2", 8, "float64"):
        assert _largest_difference(alone["weights"], other["weights"]) < 1e-8
    more = {"runtime.sync_bn": True, "student.input_size": 64, "data.batch_size": 32, "optim.lr": 1e-4}
    flags = _flags("test_efficientnet", teacher, **more)
    (alone,) = in_ranks(1, tmp_path / "3", _train, flags, tmp_path / "run3", 8, "float32")
    synced = in_ranks(2, tmp_path / "4", _train, flags, tmp_path / "run4", 8, "float32")[0]
    weights = [{k: v for k, v in run["weights"].items() if "running" not in k} for run in (alone, synced)]
    assert _largest_difference(*weights) < 1e-5
    apart = {**flags, "runtime.sync_bn": False}
    apart = in_ranks(2, tmp_path / "5", _train, apart, tmp_path / "run5", 4, "float32")[0]
    assert (alone["losses"][:4] - apart["losses"]).abs().max() > 1e-3


def _statistics(world: World, name: str) -> dict[str, Any]:
    """One step in float64 of a network with batch-norm on this process's share of some images."""
    torch.manual_seed(1)
    model = build_network(name, num_classes=3).model.double().train()
    keys = list(model.state_dict())
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model = sync_batch_norm(model, world)
    assert list(model.state_dict()) == keys
    logits = model(images[world.rows(8 // world.size)])
    (logits.square().mean() / world.size).backward()
    gradients = {key: world.sum(p.grad) for key, p in model.named_parameters() if p.grad is not None}
    return {"logits": world.gather(logits.detach()), "gradients": gradients, "state": model.state_dict()}


@pytest.mark.parametrize("name", ["cifar_resnet14_x0_5", "test_byobnet"])
def test_batch_norm_over_all_processes_equals_that_of_one(tmp_path: Path, name: str) -> None:
    """`test_byobnet` has timm's batch-norm with activation."""
    alone = _statistics(World(), name)
    for found in in_ranks(2, tmp_path, _statistics, name):
        torch.testing.assert_close(found["logits"], alone["logits"], rtol=0, atol=1e-10)
        assert _largest_difference(found["gradients"], alone["gradients"]) < 1e-10
        assert _largest_difference(found["state"], alone["state"]) < 1e-10


def _run(world: World, flags: dict[str, Any], folder: Path, stop: int | None, resume: bool) -> dict[str, Tensor]:
    """A whole run, or one that a signal stops after `stop` updates; or the rest of it."""
    config = load_config(flags=flags)
    run = RunFolder(folder)
    trainer = build_trainer(prepare(config), run, Report(run.metrics, quiet=not world.main), world)
    trainer.checkpointer.resume(open_state(run)[0]) if resume else trainer.start()
    if stop is not None:
        step = trainer.train_step

        def counted(*args: Any) -> Any:
            if trainer.progress.update == stop and world.rank == world.size - 1:  # one process alone is told to stop
                trainer.signals.received = 15
            return step(*args)

        trainer.train_step = counted  # type: ignore[method-assign]
        with pytest.raises(Exception, match="all saved; resume with"):
            trainer.fit()
    else:
        trainer.fit()
    return {name: value.clone() for name, value in trainer.components.evaluated.model.state_dict().items()}


def test_a_run_of_two_processes_goes_on_where_it_stood(tmp_path: Path, teacher: Path) -> None:
    more = {"data.batch_size": 64, "optim.ema": 0.9, "student.args": {"drop_path_rate": 0.2}}
    flags = _flags("test_resnet", teacher, **more) | {"student.input_size": 64}
    whole = in_ranks(2, tmp_path / "a", _run, flags, tmp_path / "whole", None, False)
    in_ranks(2, tmp_path / "b", _run, flags, tmp_path / "parts", 3, False)
    parts = in_ranks(2, tmp_path / "c", _run, flags, tmp_path / "parts", None, True)
    assert _largest_difference(whole[0], whole[1]) == 0
    assert _largest_difference(whole[0], parts[0]) == 0
    assert _largest_difference(whole[0], parts[1]) == 0


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, teacher: Path) -> None:
    more = {"data.batch_size": 64, "student.input_size": 64, "optim.lr": 1e-3}
    flags = _flags("test_convnext", teacher, **more)
    (whole,) = in_ranks(1, tmp_path / "a", _run, flags, tmp_path / "whole", None, False)
    in_ranks(2, tmp_path / "b", _run, flags, tmp_path / "parts", 3, False)
    (parts,) = in_ranks(1, tmp_path / "c", _run, flags, tmp_path / "parts", None, True)
    assert _largest_difference(whole, parts) < 1e-5
