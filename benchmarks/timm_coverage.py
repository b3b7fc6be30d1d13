"""Every name that timm registers, as teacher and as student: plan, forward, losses, gradient, logits, keys.

    python benchmarks/timm_coverage.py                       # all names; interrupted, it goes on where it stopped
    python benchmarks/timm_coverage.py --shard 1/2           # one half, so that two processes share the work
    python benchmarks/timm_coverage.py --only 'vit_*' --redo # names by pattern, also those already measured
    python benchmarks/timm_coverage.py --summary             # counts, and every exception with its reason

A row per name goes to benchmarks/results/timm_coverage.csv as soon as it is known. What a row says:

- Plan, on the meta device at the network's own input size, against resnet18 in both roles: stages that meet. The last
  levels must be the last pair, and two networks with several levels must meet in two stages at least.
- Numbers, on the CPU with random weights drawn as the network's own initialisation draws them (from a pool of random
  numbers, see `quick_random`), 4 random images, 10 classes, through `Tapped` and `build_loss`. As student in train mode
  against resnet18's features: all terms finite, and the gradient of the relation terms alone (edges, transform) on the
  first layer with a weight that the forward reaches is finite and not zero. As teacher in eval mode: the same for
  resnet18. The tapped logits in eval mode equal the untapped model's bit for bit; the state-dict keys stay.
- Batch-norm statistics come from the train pass before the eval pass, or a deep random network would overflow.
- The input is the smallest on a short list where the network runs, has the same levels and blocks as at its own size,
  and a last map of more than one pixel. Networks above `FULL` parameters are made shallower (RegNets narrower) for the
  numbers where the constructor allows it ("cut"); the plan is of the full network in any case.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import gc
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from irgdistill.checks import RELATION_TERMS
from timm.models._registry import _model_entrypoints
from torch import Tensor, nn

from irgdistill.config.loading import validate
from irgdistill.config.schema import LossesConfig, MatchingConfig
from irgdistill.errors import UserError
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss
from irgdistill.matching.levels import Level, find_levels
from irgdistill.matching.plan import Plan, match
from irgdistill.matching.taps import Output, Tapped
from irgdistill.models.build import build_network, known_models, parameters
from irgdistill.models.network import Network

RESULT = Path(__file__).parent / "results" / "timm_coverage.csv"
PARTNER = "resnet18"
BATCH, CLASSES = 4, 10
SIZES = (64, 96, 112, 128, 160, 192, 224, 256, 320)
"""Input sizes tried for the numbers, before the network's own."""
FULL = 120_000_000
"""Parameters up to which the numbers are of the full network."""
LIMIT = 700_000_000
"""Parameters up to which they still are where the constructor offers nothing to cut."""
CUTS = ("depth", "depths", "layers", "num_layers", "n_layers", "num_blocks")
"""Arguments of constructors that hold a number of blocks, or one per stage."""
NARROW = {"w0": 160, "wa": 60.0, "group_size": 112}
"""RegNet derives its stages from these, and has fewer stages where only its depth is cut."""

FIELDS = [
    *("name", "file", "params", "levels", "stages_as_student", "stages_as_teacher", "kinds", "plan"),
    *("logits_equal", "loss_finite", "grad_as_student", "grad_as_teacher", "keys_unchanged"),
    *("numbers", "numbers_params", "input", "seconds", "reason"),
]
CHECKS = ("plan", "logits_equal", "loss_finite", "grad_as_student", "grad_as_teacher", "keys_unchanged")

Row = dict[str, Any]


# -- one name --------------------------------------------------------------------------------------------------------


class Partner:
    """The fixed network on the other side: its levels at its own size, its features at a small one."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = build_network(PARTNER, num_classes=CLASSES)
        self.levels = self.network.levels()
        self.network.input = replace(self.network.input, size=(64, 64))
        self.images = torch.randint(0, 256, (BATCH, 3, 64, 64), dtype=torch.uint8)
        self.targets = torch.arange(BATCH) % CLASSES
        taps = [tap for level in self.levels for tap in (level.entry, *level.blocks) if tap]
        self.tapped = Tapped(self.network.model, self.network.preprocess(), dict.fromkeys(taps))
        self.first = dict(self.network.model.named_parameters())["conv1.weight"]
        with torch.no_grad():
            self.output: Output = self.tapped.train()(self.images)


def check(name: str, partner: Partner) -> Row:
    """Fill one row."""
    started = time.process_time()
    row: Row = dict.fromkeys(FIELDS, "")
    row |= {"name": name, "file": _model_entrypoints[name].__module__, "numbers": "none"}
    try:
        network = build_network(name, num_classes=CLASSES, meta=True)
        row["params"] = parameters(network.model)
        levels = network.levels()
        row["levels"] = " ".join(str(level.level) for level in levels)
        row["kinds"] = " ".join(level.kind for level in levels)
        row["plan"] = check_plans(levels, partner, row)
        if row["plan"]:
            check_numbers(network, levels, partner, row)
    except Exception as error:
        row["reason"] = _add(row["reason"], f"{type(error).__name__}: {error}")
    row["seconds"] = round(time.process_time() - started, 1)
    return row


def check_plans(levels: list[Level], partner: Partner, row: Row) -> bool:
    """Both roles against the partner: the last levels meet, two pyramids in two stages at least."""
    good = True
    for role, plan in zip(("student", "teacher"), _plans(levels, partner), strict=True):
        row[f"stages_as_{role}"] = len(plan.pairs)
        last = getattr(plan.pairs[-1], role)
        depth = len(levels[0].blocks) if len(levels) == 1 else len(levels)
        enough = len(plan.pairs) >= min(2, depth)
        if last.exit != levels[-1].exit or not enough:
            good = False
            row["reason"] = _add(row["reason"], f"as {role}: {len(plan.pairs)} stages, the last ends {last.exit}")
    return good


def check_numbers(full: Network, levels: list[Level], partner: Partner, row: Row) -> None:
    """Real forwards and backwards in both roles."""
    args = shallower(full, levels) if row["params"] > FULL else {}
    if row["params"] > LIMIT and not args:
        row["reason"] = _add(row["reason"], "plan only: too large, and its constructor offers nothing to cut")
        return
    input_size, levels = smallest(full, levels, args)
    with quick_random():
        torch.manual_seed(0)
        network = build_network(full.name, num_classes=CLASSES, input_size=input_size, args=args)
    network.input = replace(network.input, size=input_size or network.input.size)
    row["numbers"], row["numbers_params"] = "cut" if args else "full", parameters(network.model)
    row["input"] = "x".join(map(str, network.input.size))
    as_student, as_teacher = _plans(levels, partner)
    model, keys = network.model, list(network.model.state_dict())
    taps = dict.fromkeys([*as_student.student_taps(), *as_teacher.teacher_taps()])
    preprocess = network.preprocess()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the statistics of the one train pass, not a tenth of them
    tapped = Tapped(model, preprocess, taps)
    with first_weight(model) as first:
        output = tapped.train()(partner.images)
    student = losses(as_student, output, partner.output, partner.targets, row)
    row["grad_as_student"] = _nonzero(student["relation"], first[0])
    del output
    with torch.no_grad():
        output = tapped.eval()(partner.images)
    teacher = losses(as_teacher, partner.tapped(partner.images), output, partner.targets, row)
    row["grad_as_teacher"] = _nonzero(teacher["relation"], partner.first)
    row["loss_finite"] = bool(student["total"].isfinite() and teacher["total"].isfinite())
    tapped_keys = list(tapped.model.state_dict())
    plain = tapped.release()
    with torch.no_grad():
        logits = plain(preprocess(partner.images))
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    row["logits_equal"] = torch.equal(logits, output.logits) and bool(logits.isfinite().all())
    row["keys_unchanged"] = tapped_keys == list(plain.state_dict()) == keys and not any(
        module._forward_hooks or module._forward_pre_hooks for module in plain.modules()
    )


def losses(plan: Plan, student: Output, teacher: Output, targets: Tensor, row: Row) -> dict[str, Tensor]:
    """`total`, and `relation`: the edges and transformations alone."""
    off = {}
    if all(pair.transformation() is None for pair in plan.pairs):
        off["transform"] = {"weight": 0.0}
        row["reason"] = _add(row["reason"], "no transformation: no matched stage has two taps of equal width")
    if student.logits.shape != teacher.logits.shape:  # an encoder without a classifier has no logits to compare
        off |= {"kd": {"weight": 0.0}, "logits": {"weight": 0.0}, "ce": {"weight": 0.0}}
        shape = next(tuple(x.logits.shape) for x in (student, teacher) if x.logits.shape != (BATCH, CLASSES))
        row["reason"] = _add(row["reason"], f"no classifier: its output is {shape}, the relation terms alone were run")
    config: LossesConfig = validate({"method": "irg+kd", "losses": off}).losses
    loss = build_loss(config, plan)
    if "kd" in off:
        del loss.terms["ce"]
    raw = loss(Batch(student, targets, teacher))
    weighted = {name: loss.weights()[name] * value for name, value in raw.items()}
    relation = torch.stack([value for name, value in weighted.items() if name in RELATION_TERMS]).sum()
    return {"total": torch.stack(list(weighted.values())).sum(), "relation": relation}


def _plans(levels: list[Level], partner: Partner) -> tuple[Plan, Plan]:
    """The plans with this network as student and as teacher."""
    config = MatchingConfig()
    return match(partner.levels, levels, config), match(levels, partner.levels, config)


def _nonzero(loss: Tensor, weight: Tensor) -> bool:
    (gradient,) = torch.autograd.grad(loss, weight, allow_unused=True)
    return gradient is not None and bool(gradient.isfinite().all() and gradient.abs().max() > 0)


def _add(reasons: str, reason: str) -> str:
    reason = " ".join(reason.split())[:240]
    return reasons if reason in reasons else f"{reasons}; {reason}".strip("; ")


@contextmanager
def first_weight(model: nn.Module) -> Iterator[list[Tensor]]:
    """Gives a list that the forward inside the block fills: the weights of layers in the order they are reached."""
    found: list[Tensor] = []

    def note(module: nn.Module, _args: Any) -> None:
        found.extend(p for p in module.parameters(recurse=False) if p.ndim > 1 and p.requires_grad)

    leaves = [m for m in model.modules() if next(m.children(), None) is None]
    handles = [leaf.register_forward_pre_hook(note) for leaf in leaves]
    yield found
    for handle in handles:
        handle.remove()


# -- making it cheap -------------------------------------------------------------------------------------------------


def smallest(network: Network, levels: list[Level], args: dict[str, Any]) -> tuple[tuple[int, int] | None, list[Level]]:
    """An input size for the numbers, None for the network's own, and the levels as the project finds them there."""
    height, width = network.input.size
    wanted = [[tap.module for tap in level.blocks] for level in levels]
    for size in [*SIZES, None]:
        if size is not None and (size >= height or size < 2 ** (levels[-1].level + 1)):
            continue
        input_size = None if size is None else (size, round(size * width / height))
        try:
            small = build_network(network.name, num_classes=CLASSES, input_size=input_size, args=args, meta=True)
            found = find_levels(small.model, (3, *(input_size or network.input.size)))
            same = [[tap.module for tap in level.blocks] for level in found] == wanted
            if min(found[-1].exit.height, found[-1].exit.width) > 1 and (same or args):
                return input_size, small.levels()
        except Exception:
            if size is None:
                raise
    raise UserError("no input size gives a last map of more than one pixel")


def shallower(network: Network, levels: list[Level]) -> dict[str, Any]:
    """Constructor arguments that leave few blocks per stage, {} where none is taken; the levels must stay the same."""
    full = parameters(network.model)
    depths = (4, *((2,) * stages for stages in range(5, 1, -1)))
    for args in [*({name: depth} for name in CUTS for depth in depths), NARROW]:
        try:
            cut = build_network(network.name, num_classes=CLASSES, args=args, meta=True)
            if parameters(cut.model) >= full:
                continue
            if [level.level for level in cut.levels()] == [level.level for level in levels]:
                return args
        except Exception:
            continue
    return {}


@contextmanager
def quick_random() -> Iterator[None]:
    """Inside, initialisers copy from a pool of a million random numbers: the same distributions, quickly."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(1_000_003, generator=generator)
    normal = torch.randn(1_000_003, generator=generator)

    def fill(tensor: Tensor, pool: Tensor, scale: float, shift: float) -> Tensor:
        with torch.no_grad():
            flat, start = tensor.view(-1), int(torch.randint(len(pool), ()))
            rows, rest = divmod(max(len(flat) - (len(pool) - start), 0), len(pool))
            head = len(flat) - rows * len(pool) - rest
            flat[:head] = pool[start : start + head]
            flat[head : len(flat) - rest].view(rows, len(pool)).copy_(pool.expand(rows, -1))
            flat[len(flat) - rest :] = pool[:rest]
            return tensor.mul_(scale).add_(shift)

    def uniform_(tensor: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
        return fill(tensor, uniform, high - low, low)

    def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
        return fill(tensor, normal, std, mean)

    def truncated(tensor: Tensor, mean: float, std: float, low: float, high: float, *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            return normal_(tensor, mean, std).clamp_(low, high)

    with (
        patch.object(torch.Tensor, "uniform_", uniform_),
        patch.object(torch.Tensor, "normal_", normal_),
        patch("torch.nn.init._no_grad_trunc_normal_", truncated),
        patch("timm.layers.weight_init._trunc_normal_", truncated),
    ):
        yield


# -- all names -------------------------------------------------------------------------------------------------------


def guarded(name: str, partner: Partner, seconds: float) -> Row:
    """`check` in a forked child: nothing hangs, and a crash costs one row."""

    def work(pipe: Connection) -> None:
        warnings.simplefilter("ignore")
        pipe.send(check(name, partner))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(theirs,))
    child.start()
    theirs.close()
    problem = f"stopped after {seconds:.0f} s"
    try:
        if ours.poll(seconds):
            row: Row = ours.recv()
            return row
    except EOFError:
        child.join()
        problem = f"the process died with {child.exitcode}"
    finally:
        child.kill()
        child.join()
        ours.close()
    return {**dict.fromkeys(FIELDS, ""), "name": name, "file": _model_entrypoints[name].__module__, "reason": problem}


def read(path: Path) -> dict[str, Row]:
    """Rows by name, the latest of each."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def append(path: Path, row: Row) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def rewrite(path: Path) -> None:
    """One row per name, in order of names."""
    rows = read(path)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


def summarise(path: Path) -> None:
    rows = read(path)
    passed = {name for name, row in rows.items() if all(row[check] == "True" for check in CHECKS)}
    missing = [name for name in known_models() if name not in rows]
    print(f"{len(rows)} names, {len(passed)} pass every check, {len(missing)} not yet measured")
    for field in CHECKS:
        print(f"  {field:16s}", dict(Counter(row[field] or "not run" for row in rows.values())))
    print("  numbers         ", dict(Counter(row["numbers"] for row in rows.values())))
    print(
        "  levels          ", dict(Counter("one" if " " not in row["levels"] else "several" for row in rows.values()))
    )
    print("  CPU seconds     ", round(sum(float(row["seconds"] or 0) for row in rows.values())))
    print("\nexceptions:")
    for name in sorted(set(rows) - passed):
        row = rows[name]
        print(f"  {name}: not {', '.join(c for c in CHECKS if row[c] != 'True')}: {row['reason'] or 'no reason'}")
    notes = Counter(rows[name]["reason"] for name in passed if rows[name]["reason"])
    print("\npassed with a note:")
    for note, count in notes.most_common():
        print(f"  {count:4d}  {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th name, beginning with the i-th")
    parser.add_argument("--redo", action="store_true", help="also names that have a row; the new one counts")
    parser.add_argument("--retry", action="store_true", help="also names whose row does not pass every check")
    parser.add_argument("--time-limit", type=float, default=180, metavar="SECONDS", help="per name")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--summary", action="store_true", help="print counts and exceptions, sort the file, and stop")
    args = parser.parse_args()
    if args.summary:
        rewrite(args.result)
        summarise(args.result)
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    index, count = map(int, args.shard.split("/"))
    names = sorted(fnmatch.filter(known_models(), args.only))[index - 1 :: count]
    done = read(args.result)
    if args.retry:
        done = {name: row for name, row in done.items() if all(row[check] == "True" for check in CHECKS)}
    names = [name for name in names if args.redo or name not in done]
    partner = Partner()
    gc.freeze()
    for number, name in enumerate(names, 1):
        row = guarded(name, partner, args.time_limit)
        append(args.result, row)
        passed = "ok" if all(row[check] is True for check in CHECKS) else "EXCEPTION"
        print(f"{number}/{len(names)} {name} {passed} {row['numbers']} {row['seconds']} s {row['reason']}", flush=True)


if __name__ == "__main__":
    main()
