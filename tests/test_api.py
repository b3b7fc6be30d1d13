"""The Python interface: the ten lines train, the loss is the trainer's, types are seen, and importing costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import irgdistill
import irgdistill.models
from irgdistill.api import Distiller, distill, match
from irgdistill.config.loading import load_config
from irgdistill.config.methods import DEFAULT_METHOD, METHODS
from irgdistill.errors import UserError

SIZE = (3, 16, 16)
OURS = sorted(set(METHODS) - {"none", "rocket"})


def network(name: str = "cifar_resnet14_x0_5", seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, num_classes=10, **options)
    return model


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """256 digits as normalised images (256, 3, 16, 16), and their labels."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels[:256] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    return nn.functional.interpolate(images, SIZE[1:]).expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels[:256])


class Small(nn.Module):
    """A network of nobody's library; with `fixed` for images of that size alone."""

    def __init__(self, width: int = 8, fixed: int | None = None) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers = [(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*(nn.Sequential(*layer) for layer in layers))
        self.pool = nn.Flatten() if fixed else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Linear(4 * width * ((fixed or 8) // 8) ** 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.pool(self.layers(x)))
        return out


class Tables(nn.Module):
    """Returns a dictionary."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x.mean((2, 3))}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def train(distiller: Distiller, digits: tuple[Tensor, Tensor], epochs: int) -> list[float]:
    """The README's loop -> mean loss of each epoch."""
    loader = list(zip(digits[0].split(64), digits[1].split(64), strict=True))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for images, labels in loader:
            loss, _ = distiller(images, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() / len(loader)
        losses.append(total)
    return losses


def accuracy(model: nn.Module, digits: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return model.eval()(digits[0]).argmax(1).eq(digits[1]).float().mean().item()


def test_the_loop_trains(digits: tuple[Tensor, Tensor]) -> None:
    teacher, student = network("cifar_resnet20_x0_5", 1), network()
    train(Distiller(None, teacher, method="none"), digits, 12)
    assert accuracy(teacher, digits) > 0.8
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    distiller = Distiller(teacher, student, method="irg+kd")
    losses = train(distiller, digits, 12)
    assert losses[-1] < 0.5 * losses[0] and accuracy(student, digits) > 0.6
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert hooks(student) == hooks(teacher) == 0
    assert set(distiller.state_dict()) == {f"student.{name}" for name in student.state_dict()}

    loss, terms = distiller(digits[0][:64], digits[1][:64])
    weights = {"ce": 1, "kd": 1, "logits": 0.1, "edges": 5, "transform": 1}
    assert set(terms) == set(weights) and loss.requires_grad and not any(v.requires_grad for v in terms.values())
    assert loss.item() == pytest.approx(sum(weights[name] * value.item() for name, value in terms.items()), rel=1e-5)


@pytest.mark.parametrize("method", OURS)
def test_the_loss_is_the_trainers(method: str, tmp_path: Path) -> None:
    """On the same images and weights, adapters included: for every method that has a teacher."""
    from irgdistill.io.console import Report
    from irgdistill.io.run_folder import RunFolder
    from irgdistill.training.setup import prepare
    from irgdistill.training.trainer import build_trainer

    weights = tmp_path / "teacher.pth"
    torch.save(network("cifar_resnet20", 1).state_dict(), weights)
    flags = {"method": method, "student.name": "cifar_resnet14_x0_5", "runtime.device": "cpu", "data.batch_size": 32}
    flags |= {"teacher.name": "cifar_resnet20", "teacher.checkpoint": weights, "losses.edges.blocks": 2}
    flags |= {"runtime.fold_batch_norm": False}  # the bare model is not
    flags |= {"data.second_view": "rand-m3-n1-inc1"} if method in ("vrm", "crld") else {}
    setup = prepare(load_config("quickstart", flags=flags))
    trainer = build_trainer(setup, RunFolder(tmp_path / "run"), Report(quiet=True))
    assert setup.teacher is not None
    images, labels = next(trainer.components.train.epoch())

    teacher, student = network("cifar_resnet20", 1), network()
    student.load_state_dict(setup.student.model.state_dict())
    distiller = Distiller(teacher, student, method, {"losses.edges.blocks": 2})
    distiller.adapters.load_state_dict(trainer.components.adapters.state_dict())

    values = trainer.train_step(images, labels)
    loss, terms = distiller(setup.student.preprocess()(images), labels, setup.teacher.preprocess()(images))
    loss.backward()
    assert {"loss": loss.item(), **terms} == pytest.approx(
        {name: value.item() for name, value in values.items()}, rel=1e-6
    )
    chosen = DEFAULT_METHOD if method == "auto" else method
    assert set(terms) == {"ce", *METHODS[chosen].weights}
    trained_beside = method in ("fitnet", "fsp", "reviewkd", "srd", "crd", "embedding", "encoder")
    assert (len(list(distiller.parameters())) > len(list(student.parameters()))) == trained_beside
    assert all(p.grad is not None for p in distiller.parameters())


def test_without_a_teacher(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:8], digits[1][:8]
    student = network().eval()
    loss, terms = Distiller(None, student, "none")(images, labels)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(student(images), labels).item()) and set(terms) == {
        "ce"
    }


def test_moves_and_modes_and_names(digits: tuple[Tensor, Tensor]) -> None:
    """`to` takes the teacher along, `train` leaves it in eval mode, checkpointed blocks and other layouts work."""
    images, labels = digits[0][:8], digits[1][:8]
    teacher, student = network("cifar_resnet20", 1), network()
    distiller = Distiller(teacher, student).to(torch.float64).train()
    assert {value.dtype for value in teacher.parameters()} == {torch.float64}
    teacher.train()
    expected, _ = distiller(images.double(), labels)
    assert not teacher.training and student.training and not any(p.requires_grad for p in teacher.parameters())
    expected.backward()
    gradient = student.conv1.weight.grad.clone()  # type: ignore[union-attr,operator]

    student.zero_grad()
    student.set_grad_checkpointing()  # type: ignore[operator]
    again, _ = distiller(images.double().to(memory_format=torch.channels_last), labels)
    again.backward()
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(student.conv1.weight.grad, gradient)
    assert hooks(student) == 0


def test_the_plan_of_two_models() -> None:
    teacher, student = network("cifar_resnet20"), network()
    assert [pair.name for pair in match(teacher, student).pairs] == ["/1", "/2", "/4"]
    assert [pair.name for pair in match(teacher, student, skip=[2]).pairs] == ["/1", "/4"]
    assert Distiller(teacher, student, settings={"matching.skip": [2]}).plan == match(teacher, student, skip=[2])
    with pytest.raises(UserError, match=r"unknown key 'matching.levls'; did you mean matching\.levels"):
        match(teacher, student, levls=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Distiller(network(), network(), "irgkd"), "did you mean irg\\+kd"),
        (lambda: Distiller(network(), network(), settings={"losses.kd.wieght": 1}), "did you mean losses.kd.weight"),
        (lambda: Distiller(network(), network(), settings={"optim.lr": 1}), "'optim.lr' does not define the loss"),
        (lambda: Distiller(None, network()), "method 'auto' needs a teacher"),
        (lambda: Distiller(network(), network(), "rocket"), "irgdistill distill --method rocket"),
        (lambda: Distiller(nn.Linear(2, 2), network()), "the teacher: Linear does not run on images"),
        (lambda: Distiller("resnet18", network()), "the teacher is a str, not a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: Distiller(network(), nn.Identity()), r"the student: Identity returns \(1, 3, 224, 224\) for one of"),
        (lambda: Distiller(network(), Small(fixed=16)), "another size: input_size=…"),
        (lambda: match(network(), Tables()), "returns dict for one of images"),
        (lambda: Distiller([], network()), "method 'auto' needs a teacher"),
        (lambda: Distiller([network()], network(), teacher_weights=[1, 2]), "expected 1 positive numbers"),
        (lambda: Distiller(timm.create_model("cifar_resnet20", num_classes=7), network(), "kd"), "7 classes"),
        (lambda: distill(stduent="resnet18"), "no option 'stduent'; did you mean student"),
        (lambda: distill(load_config(), epochs=3), "not both: leave out epochs"),
        (lambda: distill(student="resnet18", method="none"), "no data: give --data"),
    ],
)
def test_bad_input_is_one_line(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_relations_alone_need_no_shared_classes(digits: tuple[Tensor, Tensor]) -> None:
    """The default method chooses by the classes; another can be told to leave out what needs them."""
    teacher = timm.create_model("cifar_resnet20", num_classes=7)
    _, terms = Distiller(teacher, network())(digits[0][:8], digits[1][:8])
    assert set(terms) == {"ce", "edges", "transform", "positions", "embedding"}
    _, terms = Distiller(teacher, network(), "irg+kd+at", {"losses.kd.weight": 0})(digits[0][:8], digits[1][:8])
    assert set(terms) == {"ce", "edges", "transform", "attention"}


@pytest.mark.parametrize("method", ["auto", "encoder", "fitnet"])
def test_networks_of_torchvision_and_your_own(method: str, digits: tuple[Tensor, Tensor]) -> None:
    """Two steps; every term is finite, and the student's first layer learns from the teacher too."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    pairs = [(models.resnet18(num_classes=10), models.mobilenet_v3_small(num_classes=10)), (Small(16), Small())]
    images = nn.functional.interpolate(digits[0][:8], (64, 64))
    for teacher, student in pairs:
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        distiller = Distiller(teacher, student, method, {"losses.ce.weight": 0})
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
        for _ in range(2):
            loss, terms = distiller(images, digits[1][:8])
            assert all(value.isfinite() for value in terms.values()) and len(terms) > 1
            optimizer.zero_grad()
            loss.backward()
            first = next(student.parameters())
            assert first.grad is not None and first.grad.isfinite().all() and first.grad.any()
            optimizer.step()
        assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
        assert hooks(student) == hooks(teacher) == 0


def test_a_network_for_one_size_is_matched_at_that_size(digits: tuple[Tensor, Tensor]) -> None:
    teacher, student = Small(16, fixed=16), Small(fixed=16)
    plan = match(teacher, student, input_size=16, teacher_input_size=(16, 16))
    assert [pair.student.exit.module for pair in plan.pairs] == ["layers.1.2", "layers.2.2"]
    loss, terms = Distiller(teacher, student, input_size=16, teacher_input_size=16)(digits[0][:8], digits[1][:8])
    assert loss.isfinite() and "edges" in terms


def test_several_teachers_are_the_trainers_mean(digits: tuple[Tensor, Tensor]) -> None:
    """Terms on stages are means over the teachers, logits means of probabilities; each has images of its own."""
    images, labels = digits[0][:8], digits[1][:8]
    larger = nn.functional.interpolate(images, (24, 24))
    a, b, student = network("cifar_resnet20", 1), Small(16), network().eval()
    settings = {"losses.ce.weight": 0, "losses.kd.weight": 0, "losses.logits.weight": 0}
    _, of_a = Distiller(a, student, "irg+kd", settings)(images, labels)
    _, of_b = Distiller(b, student, "irg+kd", settings)(images, labels, larger)
    both = Distiller([a, b], student, "irg+kd", settings, teacher_weights=[3, 1])
    _, terms = both(images, labels, [images, larger])
    assert terms["edges"].item() == pytest.approx((3 * of_a["edges"] + of_b["edges"]).item() / 4, rel=1e-5)
    assert len(both.plans) == 2 and both.plan is both.plans[0]
    assert not {id(p) for p in both.parameters()} & {id(p) for teacher in (a, b) for p in teacher.parameters()}

    hinton = {"losses.kd.temperature": 1}
    _, terms = Distiller((a, b), student, "kd", hinton, teacher_weights=[3, 1])(images, labels)
    with torch.no_grad():
        mean = (3 * a(images).softmax(1) + b(images).softmax(1)) / 4
        expected = nn.functional.kl_div(student(images).log_softmax(1), mean, reduction="batchmean")
    assert terms["kd"].item() == pytest.approx(expected.item(), rel=1e-5)
    _, twice = Distiller([a, a], student, "kd")(images, labels)
    _, once = Distiller(a, student, "kd")(images, labels)
    assert twice["kd"].item() == pytest.approx(once["kd"].item(), rel=1e-5)
    with pytest.raises(UserError, match="teacher_images holds 3 tensors: expected one, or one for each of 2"):
        both(images, labels, [images] * 3)


def test_hints_fade_with_the_progress_that_is_told(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:8], digits[1][:8]
    distiller = Distiller(timm.create_model("cifar_resnet20", num_classes=10), network())
    told = [distiller(images, labels, progress=progress) for progress in (0, 0.45, 0.7)]
    assert [set(terms) - set(told[2][1]) for _, terms in told] == [{"attention"}, {"attention"}, set()]
    weights = load_config().with_method(DEFAULT_METHOD).losses.weights()
    expected = [sum(value * weights[name] for name, value in terms.items()) for _, terms in told]
    expected[1] -= 50 * told[1][1]["attention"]
    torch.testing.assert_close(torch.stack([loss for loss, _ in told]), torch.stack(expected))


def test_a_run_in_one_call(tmp_path: Path) -> None:
    options = {"preset": "quickstart", "student": "cifar_resnet14_x0_5", "method": "none", "epochs": 1, "device": "cpu"}
    summary = distill(output=tmp_path / "run", **options)
    assert summary.pop("folder") == str(tmp_path / "run")
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    flags = {"student.name": "cifar_resnet14_x0_5", "method": "none", "schedule.epochs": 1, "runtime.device": "cpu"}
    again = distill(load_config("quickstart", flags=flags), output=str(tmp_path / "again"))
    assert again["last_top1"] == summary["last_top1"]
    with pytest.raises(UserError, match="holds a finished run"):
        distill(output=tmp_path / "run", **options)


def test_importing_costs_no_torch() -> None:
    code = (
        "import sys, irgdistill\n"
        "from irgdistill import load_config, Config, UserError\n"
        "assert 'Distiller' in dir(irgdistill) and load_config('quickstart').schedule.epochs == 8\n"
        "assert not {'torch', 'timm', 'torchvision'} & set(sys.modules)\n"
        "import types\n"
        "assert all(getattr(irgdistill, name) is not None for name in irgdistill.__all__)\n"
        "from irgdistill import *\n"
        "assert isinstance(distill, types.FunctionType) and 'torch' in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match=r"attribute '?distil\b"):
        irgdistill.distil  # noqa: B018


@pytest.mark.slow
def test_types_are_seen(tmp_path: Path) -> None:
    """mypy reads the package's types from outside of it (not those of torch: they take a minute)."""
    pytest.importorskip("mypy")
    assert (Path(irgdistill.__file__).parent / "py.typed").exists()
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n[mypy-torch.*,timm.*,torchvision.*,numpy.*]\nfollow_imports = skip\n"
    )
    (tmp_path / "user.py").write_text(
        "from irgdistill import Distiller, distill, match\n"
        "reveal_type(distill())\n"
        "reveal_type(match(1, 2))\n"
        "Distiller(None, None, method=3)\n"
    )
    command = [sys.executable, "-m", "mypy", "user.py"]
    first, second, third, end = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True
    ).stdout.splitlines()
    assert first.endswith('Revealed type is "dict[str, Any]"') and second.endswith('"irgdistill.matching.plan.Plan"')
    assert "[arg-type]" in third and end.startswith("Found 1 error")
