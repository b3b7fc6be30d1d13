"""A tapped network inside DistributedDataParallel on two gloo ranks: outputs and gradients."""

from __future__ import annotations

import socket
from datetime import timedelta

import timm
import torch
import torch.distributed as dist  # noqa: TID251  a test of what the package leaves to its callers
from support.processes import forks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from irgdistill.config.loading import validate
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss
from irgdistill.matching.levels import find_levels
from irgdistill.matching.plan import Plan, match
from irgdistill.matching.taps import Output, Tapped
from irgdistill.models.network import Preprocess

RANKS, SHARD, WAIT = 2, 4, 120
RELATIONS = {"edges": 5.0, "transform": 1.0}
ALL = {"ce": 1.0, "kd": 1.0, "logits": 0.1, **RELATIONS}
INPUT = ((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def pair() -> tuple[Tapped, Tapped, Plan]:
    """Teacher in eval mode, student in train mode and what meets, the same in every process."""
    torch.manual_seed(0)
    teacher, student = timm.create_model("cifar_resnet20"), timm.create_model("cifar_resnet14_x0_5")
    plan = match(find_levels(teacher, (3, 32, 32)), find_levels(student, (3, 32, 32)))
    taught = Tapped(teacher, Preprocess(*INPUT), plan.teacher_taps()).requires_grad_(False).eval()
    return taught, Tapped(student, Preprocess(*INPUT), plan.student_taps(2)).train(), plan


def shard(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 256, (SHARD, 3, 32, 32), generator=generator), torch.arange(SHARD)


def objective(terms: dict[str, float], plan: Plan, student: Output, teacher: Output, targets: Tensor) -> Tensor:
    losses = {name: {"weight": terms.get(name, 0.0)} for name in ("ce", "kd", "logits", "edges", "transform")}
    loss = build_loss(validate({"method": "none", "losses": losses}).losses, plan)
    return loss.total(loss(Batch(student, targets, teacher)), loss.weights())


def gradients(student: Tapped) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}


def alone(rank: int, terms: dict[str, float]) -> tuple[Output, dict[str, Tensor]]:
    """One shard in a process of its own."""
    teacher, student, plan = pair()
    images, targets = shard(rank)
    output = student(images)
    objective(terms, plan, output, teacher(images), targets).backward()
    return output, gradients(student)


def check(rank: int, port: int) -> None:
    """One rank: the same outputs as alone, the gradient averaged over the ranks, for each objective."""
    address, wait = f"tcp://127.0.0.1:{port}", timedelta(seconds=WAIT)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS, timeout=wait)
    try:
        teacher, student, plan = pair()
        wrapped = DistributedDataParallel(student)
        images, targets = shard(rank)
        for terms in (RELATIONS, ALL, RELATIONS):  # an unused parameter would be noticed in the forward after
            both = [alone(other, terms) for other in range(RANKS)]
            output = wrapped(images)
            assert isinstance(output, Output)
            expected = both[rank][0]
            torch.testing.assert_close(output.logits, expected.logits)
            assert list(output.features) == list(expected.features)
            for name, pooled in output.features.items():
                torch.testing.assert_close(pooled, expected.features[name])
            student.zero_grad(set_to_none=True)
            objective(terms, plan, output, teacher(images), targets).backward()
            for name, gradient in gradients(student).items():
                mean = torch.stack([found[name] for _, found in both]).mean(0)
                torch.testing.assert_close(gradient, mean, msg=lambda text, name=name: f"{name}: {text}")
    finally:
        dist.destroy_process_group()


def test_outputs_and_averaged_gradients_on_two_ranks() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    other = forks().Process(target=check, args=(1, port))  # this process is rank 0
    other.start()
    try:
        check(0, port)
    finally:
        other.join(WAIT)
        other.kill()
    assert other.exitcode == 0


def test_relations_alone_leave_no_parameter_unused() -> None:
    """Cross-entropy is part of the sum also at weight 0: the classifier's gradient is zero, not missing."""
    found = alone(0, RELATIONS)[1]
    assert set(found) == {name for name, _ in pair()[1].model.named_parameters()}
    assert {name for name, gradient in found.items() if not gradient.any()} == {"fc.weight", "fc.bias"}
