"""The methods IRG is compared with: each against its paper's formula written out as loops, and trained for a moment."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import Result, command, interrupted
from support.processes import in_ranks, trainer_of
from torch import Tensor

from irgdistill.config.loading import load_config
from irgdistill.config.methods import METHODS
from irgdistill.errors import UserError
from irgdistill.losses.adapters import Learner
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss
from irgdistill.losses.terms.logits import decoupled_targets
from irgdistill.losses.terms.maps import attention_distance, attention_loss, fsp_loss, hint_loss
from irgdistill.losses.terms.rocket import rocket_hint
from irgdistill.losses.terms.similarity import probability_loss, rkd_loss, similarity_loss
from irgdistill.matching.levels import Level, Tap
from irgdistill.matching.plan import Pair, Plan
from irgdistill.matching.pooling import energy, feature_map, pool
from irgdistill.matching.taps import Output, Tapped, tap_name
from irgdistill.runtime.distributed import World


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- formulas ---------------------------------------------------------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    exponents = [math.exp(value) for value in values]
    return [value / sum(exponents) for value in exponents]


def test_decoupled_targets_by_hand() -> None:
    student, teacher, labels, temperature, beta = random(5, 4), 2 * random(5, 4, seed=1), [0, 3, 1, 1, 2], 3.0, 6.0
    total = 0.0
    for i, label in enumerate(labels):
        p, q = (softmax([x / temperature for x in logits[i].tolist()]) for logits in (teacher, student))
        total += p[label] * math.log(p[label] / q[label])
        total += (1 - p[label]) * math.log((1 - p[label]) / (1 - q[label]))
        for k in range(4):
            if k != label:
                a, b = p[k] / (1 - p[label]), q[k] / (1 - q[label])
                total += beta * a * math.log(a / b)
    found = decoupled_targets(student, teacher, torch.tensor(labels), temperature, beta)
    assert found.item() == pytest.approx(temperature**2 * total / 5, rel=1e-12)


def test_decoupled_targets_with_the_weights_of_soft_targets_are_soft_targets() -> None:
    """Zhao et al. 2022, equation 6: KD = TCKD + (1 - p_target)·NCKD; with one image beta can be that factor."""
    student, teacher = random(1, 6), random(1, 6, seed=1)
    beta = 1 - teacher.softmax(1)[0, 2].item()
    expected = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(decoupled_targets(student, teacher, torch.tensor([2]), 1.0, beta), expected)


def pooled(x: Tensor, height: int, width: int) -> Tensor:
    """Mean over the cells of a grid that divides the map evenly."""
    b, c, h, w = x.shape
    return x.view(b, c, height, h // height, width, w // width).mean((3, 5))


def test_hint_by_hand() -> None:
    student, teacher = random(2, 3, 4, 4), random(2, 3, 8, 8, seed=1)
    small, total = pooled(teacher, 4, 4), 0.0
    for index in torch.cartesian_prod(*[torch.arange(n) for n in student.shape]).tolist():
        total += (student[tuple(index)].item() - small[tuple(index)].item()) ** 2
    assert hint_loss(student, teacher).item() == pytest.approx(total / student.numel(), rel=1e-12)


def test_attention_by_hand() -> None:
    student, teacher = random(2, 3, 4, 8), random(2, 5, 2, 2, seed=1)
    energies = [
        torch.tensor([[[sum(v**2 for v in column) for column in zip(*row, strict=True)]
                       for row in zip(*image, strict=True)] for image in x.tolist()], dtype=torch.float64)
        for x in (student, teacher)
    ]  # fmt: skip
    small, total = [pooled(x[:, None], 2, 2)[:, 0] for x in energies], 0.0
    for i in range(2):
        maps = []
        for x in small:
            values = [x[i, h, w].item() for h in range(2) for w in range(2)]
            length = math.sqrt(sum(value**2 for value in values))
            maps.append([value / length for value in values])
        total += sum((a - b) ** 2 for a, b in zip(*maps, strict=True))
    assert attention_loss(energy(student), energy(teacher)).item() == pytest.approx(total / (2 * 4), rel=1e-12)


def test_fsp_by_hand() -> None:
    student = random(2, 2, 4, 4), random(2, 3, 4, 4, seed=1)
    teacher = random(2, 2, 8, 8, seed=2), random(2, 3, 4, 4, seed=3)
    total = 0.0
    for i in range(2):
        for m in range(2):
            for n in range(3):
                entries = []
                for first, last in (student, (pooled(teacher[0], 4, 4), teacher[1])):
                    products = [first[i, m, h, w].item() * last[i, n, h, w].item() for h in range(4) for w in range(4)]
                    entries.append(sum(products) / 16)
                total += (entries[0] - entries[1]) ** 2
    assert fsp_loss(student, teacher).item() == pytest.approx(total / (2 * 2 * 3), rel=1e-12)


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def test_rkd_by_hand() -> None:
    student, teacher, count = 3 * random(5, 3), random(5, 4, seed=1), 5
    both = []
    for x in (student.tolist(), teacher.tolist()):
        lengths = {(i, j): math.dist(x[i], x[j]) for i in range(count) for j in range(count)}
        mean = sum(lengths.values()) / (count * (count - 1))
        cosines = {}
        for i, j, k in torch.cartesian_prod(*[torch.arange(count)] * 3).tolist():
            e = [a - b for a, b in zip(x[j], x[i], strict=True)]
            f = [a - b for a, b in zip(x[k], x[i], strict=True)]
            norm = math.hypot(*e) * math.hypot(*f)
            cosines[i, j, k] = sum(a * b for a, b in zip(e, f, strict=True)) / norm if norm else 0.0
        both.append(({key: value / mean for key, value in lengths.items()}, cosines))
    (d_s, a_s), (d_t, a_t) = both
    distance = sum(huber(d_s[key], d_t[key]) for key in d_s) / count**2
    angle = sum(huber(a_s[key], a_t[key]) for key in a_s) / count**3
    assert rkd_loss(student, teacher, 2.0).item() == pytest.approx(distance + 2 * angle, rel=1e-10)
    assert rkd_loss(student, teacher, 0.0).item() == pytest.approx(distance, rel=1e-10)


def test_similarity_by_hand() -> None:
    student, teacher, total = random(4, 2, 3, 3), random(4, 5, 2, 2, seed=1), 0.0
    matrices = []
    for x in (student.flatten(1).tolist(), teacher.flatten(1).tolist()):
        gram = [[sum(a * b for a, b in zip(x[i], x[j], strict=True)) for j in range(4)] for i in range(4)]
        matrices.append([[value / math.hypot(*row) for value in row] for row in gram])
    for i in range(4):
        for j in range(4):
            total += (matrices[0][i][j] - matrices[1][i][j]) ** 2
    assert similarity_loss(student, teacher).item() == pytest.approx(total / 16, rel=1e-12)


def test_probabilities_by_hand() -> None:
    student, teacher, total, count = random(4, 3), random(4, 5, seed=1), 0.0, 4
    rows = []
    for x in (student.tolist(), teacher.tolist()):
        kernel = [
            [(sum(a * b for a, b in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v)) + 1) / 2 for v in x]
            for u in x
        ]
        rows.append([[value / sum(row) for value in row] for row in kernel])
    for q, p in zip(*rows, strict=True):
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert probability_loss(student, teacher, eps=0.0).item() == pytest.approx(total / count, rel=1e-12)


def test_rocket_hint_stops_at_the_booster() -> None:
    student, booster = random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    loss = rocket_hint(student, booster)
    assert loss.item() == pytest.approx(((student - booster) ** 2).sum().item() / 12)
    loss.backward()
    assert student.grad is not None and booster.grad is None


FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rkd": rkd_loss,
    "sp": similarity_loss,
    "pkt": probability_loss,
}
MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fitnet": hint_loss,
    "at": lambda s, t: attention_loss(energy(s), energy(t)),
    "attention": lambda s, t: attention_distance(energy(s), energy(t)),
    "fsp": lambda s, t: fsp_loss((s, s.square()), (t, t.square())),
}


@pytest.mark.parametrize("name", [*FEATURES, *MAPS])
@pytest.mark.parametrize("kind", ["random", "one image", "equal", "zero", "two equal", "half"])
def test_finite_values_and_gradients(name: str, kind: str) -> None:
    shape = (6, 4) if name in FEATURES else (6, 4, 3, 3)
    student, teacher = random(*shape), random(*shape, seed=1)
    if kind == "one image":
        student, teacher = student[:1], teacher[:1]
    elif kind == "equal":
        student = student[:1].repeat(6, *[1] * (student.ndim - 1))
    elif kind == "zero":
        student = torch.zeros_like(student)
    elif kind == "two equal":
        student[1] = student[0]
    elif kind == "half":
        student, teacher = student.to(torch.bfloat16), teacher.to(torch.bfloat16)
    student = student.detach().requires_grad_()
    loss = {**FEATURES, **MAPS}[name](student, teacher)
    loss.backward()
    assert loss.dtype == (torch.float32 if kind == "half" else torch.float64) and loss.isfinite()
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.abs().max() < 1e3
    if kind == "random":
        assert (student.grad.flatten(1).abs().sum(1) > 0).all()
        assert loss > 0 and {**FEATURES, **MAPS}[name](teacher, teacher) == pytest.approx(0, abs=1e-12)


# --- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tap", "shape"),
    [
        (Tap("x", 5, 2, 3, "NCHW"), (4, 5, 2, 3)),
        (Tap("x", 5, 2, 3, "NHWC"), (4, 2, 3, 5)),
        (Tap("x", 5, 2, 3, "BLC", prefix=2), (4, 8, 5)),
        (Tap("x", 5, 2, 3, "BLC"), (4, 24, 5)),
    ],
)
def test_a_map_pools_to_what_the_tap_gives(tap: Tap, shape: tuple[int, ...]) -> None:
    output = random(*shape)
    found = feature_map(output, tap)
    assert found.shape[:2] == (4, 5) and found.shape[2] * 3 == found.shape[3] * 2
    torch.testing.assert_close(found.mean((2, 3)), pool(output, tap))
    if tap.layout == "BLC" and tap.prefix:
        torch.testing.assert_close(found[1, :, 1, 2], output[1, 2 + 3 + 2])
    torch.testing.assert_close(energy(found), found.square().sum(1))
    kept = found.clone()
    output.zero_()
    assert torch.equal(found, kept)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_energies_have_the_gradient_of_the_sum_of_squares(memory: torch.memory_format) -> None:
    x = random(2, 5, 2, 3).contiguous(memory_format=memory).requires_grad_()
    assert torch.autograd.gradcheck(energy, (x,))
    held = x * 1
    found = energy(feature_map((None, held), Tap("x", 5, 2, 3, "NCHW", index=1))).sum()
    held.zero_()  # as networks do that work in place
    (gradient,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(gradient, 2 * x)


def test_a_frozen_network_keeps_energies_and_no_map() -> None:
    block, last = torch.nn.Conv2d(3, 5, 1), torch.nn.ReLU(inplace=True)
    network = Tapped(torch.nn.Sequential(block, last), None, energies=[Tap("0", 5, 4, 6, "NCHW")])
    images = torch.randn(2, 3, 4, 6)
    kept = []
    last.register_forward_pre_hook(lambda *_: kept.append(network._kept[2]["0"]))
    with torch.no_grad():
        frozen = network(images).energies["0"]
        torch.testing.assert_close(frozen, block(images).square().sum(1))
    trained = network(images).energies["0"]
    assert [x.dim() for x in kept] == [3, 4] and trained.requires_grad and torch.equal(trained, frozen)


def test_tokens_that_fill_no_map_are_refused() -> None:
    with pytest.raises(UserError, match="x: 7 tokens do not fill a map of the aspect ratio 2:3"):
        feature_map(random(4, 7, 5), Tap("x", 5, 2, 3, "BLC"))


# --- terms ------------------------------------------------------------------------------------------------------------


def level(network: str, k: int, width: int, side: int, layout: str = "NCHW") -> Level:
    taps = tuple(Tap(f"{network}{k}.{i}", width, side, side, layout) for i in range(2))
    return Level(k, taps[0], taps[-1], "block", taps)


PLAN = Plan(
    (
        Pair("/4", level("t", 2, 6, 8), level("s", 2, 4, 8)),
        Pair("/8", level("t", 3, 7, 4), level("s", 3, 7, 4)),
        Pair("/16", level("t", 4, 9, 2), level("s", 4, 5, 4)),
    )
)


def outputs() -> tuple[Output, Output]:
    def network(taps: list[Tap], seed: int) -> Output:
        maps = {
            tap_name(tap): random(6, tap.channels, tap.height, tap.width, seed=seed + i).float().requires_grad_()
            for i, tap in enumerate(taps)
        }
        return Output(
            random(6, 10, seed=seed).float(),
            {n: x.mean((2, 3)) for n, x in maps.items()},
            maps,
            {n: x.square().sum(1) for n, x in maps.items()},
        )

    return network(PLAN.student_taps(), 10), network(PLAN.teacher_taps(), 20)


@pytest.mark.parametrize("method", ["fitnet", "at", "fsp", "rkd", "sp", "pkt", "dkd"])
def test_every_term_is_its_function_over_the_stages(method: str) -> None:
    torch.manual_seed(0)
    student, teacher = outputs()
    loss = build_loss(load_config(flags={"method": method}).losses, PLAN)
    learner = Learner(torch.nn.Identity(), loss.adapters())
    student = learner(student)  # type: ignore[arg-type]
    labels = torch.arange(6)
    found = loss(Batch(student, labels, teacher))
    assert list(found) == ["ce", method]
    s, t = student.maps, teacher.maps
    if method == "fitnet":
        (layer,) = loss.adapters()["fitnet"].layers
        expected = hint_loss(layer(s["s3.1"]), t["t3.1"])
        assert layer[0].weight.shape == (7, 7, 1, 1)
    elif method == "at":
        s, t = student.energies, teacher.energies
        expected = sum(attention_loss(s[f"s{k}.1"], t[f"t{k}.1"]) for k in (2, 3, 4)) / 3
    elif method == "fsp":
        ends = [s[f"s{k}.{i}"] for k in (2, 3, 4) for i in (0, 1)]
        widened = [layer(x) for layer, x in zip(loss.adapters()["fsp"].layers, ends, strict=True)]
        assert widened[2] is s["s3.0"]
        pairs = [(widened[2 * n : 2 * n + 2], (t[f"t{k}.0"], t[f"t{k}.1"])) for n, k in enumerate((2, 3, 4))]
        expected = sum(fsp_loss(a, b) for a, b in pairs) / 3
    elif method == "dkd":
        expected = decoupled_targets(student.logits, teacher.logits, labels)
    elif method == "sp":
        expected = similarity_loss(s["s4.1"], t["t4.1"])
    else:
        expected = FEATURES[method](student.features["s4.1"], teacher.features["t4.1"])
    torch.testing.assert_close(found[method], expected)
    kinds = {"taps": ("rkd", "pkt"), "maps": ("fitnet", "fsp", "sp"), "energies": ("at",), "grids": ()}
    for role in ("student", "teacher"):
        assert {kind: bool(taps) for kind, taps in loss.where(role).items()} == {
            k: method in m for k, m in kinds.items()
        }


def test_attention_counts_a_stage_the_same_at_any_size() -> None:
    student, teacher = outputs()
    config = load_config(flags={"method": "none", "losses.attention.weight": 1.0}).losses
    found = build_loss(config, PLAN)(Batch(student, torch.arange(6), teacher))
    stages = []
    for k in (2, 3, 4):
        s, t = student.energies[f"s{k}.1"], teacher.energies[f"t{k}.1"]
        small = F.adaptive_avg_pool2d(s, t.shape[-2:]) if k == 4 else s
        stages.append((2 - 2 * F.cosine_similarity(small.flatten(1), t.flatten(1))).mean())
    assert list(found) == ["ce", "attention"]
    torch.testing.assert_close(found["attention"], sum(stages) / 3)


def test_maps_that_cannot_be_laid_out_are_left_out_or_refused() -> None:
    tiles = Pair("/4", level("t", 2, 6, 8, "BTNC"), level("s", 2, 4, 8))
    config = load_config(flags={"method": "at"}).losses
    assert len(build_loss(config, Plan((tiles, PLAN.pairs[1]))).where("teacher")["energies"]) == 1
    with pytest.raises(UserError, match="at compares feature maps, and no matched stage has one"):
        build_loss(config, Plan((tiles,)))
    beside = load_config(flags={"method": "irg+kd+at"}).losses
    assert list(build_loss(beside, Plan((tiles,))).terms) == ["ce", "kd", "edges", "transform"]


# --- many processes ---------------------------------------------------------------------------------------------------


RELATIONS: dict[str, dict[str, Any]] = {name: {} for name in (*FEATURES, "dist", "srd", "crd")} | {
    f"edges {form} {grid}": {"edges.weight": 1.0, "edges.form": form, "edges.grid": grid}
    for form in ("paper", "pearson", "softmax")
    for grid in (1, 4)
}
"""Terms that relate images, with their settings."""


RELATIONS["vrm"] = {"vrm.confidence": 0.1}
VIEWS = torch.tensor([0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11])
"""First views and then second ones, of the images of which two processes hold three each."""


def _terms(world: World) -> dict[str, tuple[float, Tensor]]:
    """Mean over the processes of each term, and the gradient of that mean at all images' maps."""
    plan, count = Plan(PLAN.pairs[:1]), 12 // world.size
    results = {}
    for case, settings in RELATIONS.items():
        order = VIEWS if case == "vrm" and world.size == 1 else torch.arange(12)
        student, teacher = (
            random(12, width, 8, 8, seed=seed)[order[world.rows(count)]].requires_grad_()
            for width, seed in ((4, 0), (6, 1))
        )
        both = [
            Output(x.mean((2, 3)) @ random(x.shape[1], 10, seed=2), {name: x.mean((2, 3))}, {name: x}, grids={name: x})
            for name, x in (("s2.1", student), ("t2.1", teacher.detach()))
        ]
        term = case.split()[0]
        flags = {"method": "none", f"losses.{term}.weight": 1.0}
        flags |= {f"losses.{key}": value for key, value in settings.items()}
        loss = build_loss(load_config(flags=flags).losses, plan, world)
        torch.manual_seed(0)
        learner, labels = (
            Learner(torch.nn.Identity(), loss.adapters().double()),
            torch.arange(12)[world.rows(count)] % 3,
        )
        batch = Batch(learner(both[0]), labels, both[1])  # type: ignore[arg-type]
        loss(batch)  # fills the queue of `crd`
        value = loss(batch)[term]
        (value / world.size).backward()  # DDP's mean
        assert student.grad is not None
        results[case] = float(world.mean(value.detach())), world.gather(student.grad)[order.argsort()]
    return results


def test_relations_span_the_images_of_all_processes(tmp_path: Path) -> None:
    alone = _terms(World())
    for found in in_ranks(2, tmp_path, _terms):
        for case, (value, gradient) in alone.items():
            assert gradient.abs().sum() > 0 and found[case][0] == pytest.approx(value, abs=1e-12), case
            torch.testing.assert_close(found[case][1], gradient, rtol=0, atol=1e-12)


def _steps(world: World, teacher: Path, folder: Path) -> dict[str, Tensor]:
    """Student, regressor and booster after three updates in float64, all batch-norm synchronised.

    The hint fades out before the last: its regressor then has a gradient of zeros, which DDP needs.
    """
    torch.set_default_dtype(torch.float64)
    flags = {"student.name": "cifar_resnet14_x0_5", "student.input_size": 16, "teacher.checkpoint": str(teacher)}
    flags |= {"method": "fitnet", "losses.rocket.weight": 0.3, "losses.fsp.weight": 1.0, "optim.lr": 1e-3}
    flags |= {"data.source": "digits", "data.workers": 0, "data.batch_size": 16, "runtime.sync_bn": True}
    flags |= {"schedule.epochs": 1, "losses.fitnet.fade": [0.0, 0.02]}
    trainer = trainer_of(world, {**flags, "runtime.device": "cpu"}, folder)
    for images, labels in trainer.components.train.epoch():
        run, update = trainer.components, trainer.progress.update
        assert (run.loss.weights(update / run.updates)["fitnet"] == 0) == (update == 2)
        trainer.train_step(images, labels)
        if trainer.progress.update == 3:
            break
    return {name: value.clone() for name, value in trainer.components.trained.state_dict().items()}


def test_what_is_trained_beside_the_student_is_the_same_on_two_processes(
    tmp_path: Path, teachers: dict[str, tuple[Any, ...]]
) -> None:
    teacher = teachers["cifar_resnet20"][1]
    (alone,) = in_ranks(1, tmp_path / "1", _steps, teacher, tmp_path / "run")
    assert {name.split(".")[1] for name in alone if name.startswith("adapters")} == {"fitnet", "fsp", "rocket"}
    for found in in_ranks(2, tmp_path / "2", _steps, teacher, tmp_path / "run"):
        for name, value in alone.items():
            torch.testing.assert_close(found[f"module.{name}"], value, rtol=1e-8, atol=1e-10)


# --- training ---------------------------------------------------------------------------------------------------------

QUICK = ("--preset", "quickstart", "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 32, "--device", "cpu")
QUICK += ("--set", "data.train_images=224")
RIVALS = [name for name, method in METHODS.items() if len(method.weights) == 1 and name != "kd"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, ...]]:
    """Trained for two epochs through the command line, as options."""

    folder, options = tmp_path_factory.mktemp("teachers"), {}
    for name, size in (("cifar_resnet20", 16), ("test_vit", 64)):
        taught = ("--epochs", 2, "--student", name, "--method", "none", "--input-size", size)
        assert command("distill", *QUICK, *taught, "--output", folder / name) == 0
        weights = folder / name / "last.safetensors"
        options[name] = ("--teacher-checkpoint", weights, "--teacher-input-size", size, "--skip-teacher-check")
    return options


@pytest.mark.parametrize("teacher", ["cifar_resnet20", "test_vit"])
@pytest.mark.parametrize("method", RIVALS)
def test_every_method_trains(
    run: Callable[..., Result], teachers: dict[str, tuple[object, ...]], tmp_path: Path, method: str, teacher: str
) -> None:
    options = (*QUICK, "--student", "cifar_resnet14_x0_5", "--method", method, "--output", tmp_path / "run")
    options += ("--set", "data.second_view=rand-m3-n1-inc1") if method in ("vrm", "crld") else ()
    options += ("--set", "losses.crld.confidence=0")
    result = run("distill", *teachers[teacher], *options, "--set", "runtime.log_every=1", "--lr", 0.01)
    assert result.code == 0, result.err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    term = next(iter(METHODS[method].weights))
    assert set(steps[0]["terms"]) == {"ce", term, *(["booster"] if method == "rocket" else [])}
    assert all(math.isfinite(step["loss"]) for step in steps) and steps[-1]["terms"][term] > 0
    import timm

    model: Any = timm.create_model("cifar_resnet14_x0_5", num_classes=10)
    assert set(load_file(tmp_path / "run" / "last.safetensors")) == set(model.state_dict())


def test_every_method_starts_from_the_same_weights(
    teachers: dict[str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from irgdistill.training.setup import prepare

    start: dict[str, Tensor] | None = None
    for method in METHODS:
        flags = {
            "method": method,
            "teacher.name": "cifar_resnet20",
            "teacher.checkpoint": teachers["cifar_resnet20"][1],
        }
        flags |= {"student.name": "cifar_resnet14_x0_5", "seed": 5, "data.second_view": "rand-m3-n1-inc1"}
        weights = prepare(load_config("quickstart", flags=flags)).student.model.state_dict()
        start = start or weights
        assert all(torch.equal(weights[name], start[name]) for name in start), method


@pytest.mark.parametrize("method", ["fitnet", "rocket", "crd"])
def test_what_is_trained_beside_the_student_is_resumed(
    run: Callable[..., Result],
    teachers: dict[str, tuple[object, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """Stopped in the middle of the second epoch: bit for bit the same student as an undisturbed run."""

    options = (*teachers["cifar_resnet20"], *QUICK, "--epochs", 2, "--student", "cifar_resnet14_x0_5")
    options += ("--method", method, "--lr", 0.01, "--ema", 0.9)
    assert run("distill", *options, "--output", tmp_path / "whole").code == 0
    with interrupted(lambda trainer: trainer.progress.update == 9):
        assert run("distill", *options, "--output", tmp_path / "parts").code == 130
    resumed = run("distill", "--resume", tmp_path / "parts")
    assert resumed.code == 0, resumed.err
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
