"""What the taps cost: time and memory of a forward + backward with and without them, eager and compiled.

    python benchmarks/taps.py --json benchmarks/results/taps.json        # on an idle machine
    python benchmarks/taps.py --rounds 5 --no-compile --models resnet18  # a quick look

Both sides are `Tapped` with the same weights, view, images and loss on the logits; one has the taps of a plan against
resnet18, and its loss also holds the pooled vectors, so that the way back through the taps is paid for too. The two are
timed in turn, the order changing with every round. The ratio of the minima and the median of the rounds' ratios (with
the quartiles) are printed; `none` is the same plain network against itself, which shows what the machine can tell.
Memory is exact, not sampled: bytes that autograd saves for the backward (each storage once), and the allocator's peak.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from irgdistill.matching.plan import match
from irgdistill.matching.taps import Tapped
from irgdistill.models.build import build_network

MODELS = ("resnet18", "mobilenetv2_100", "vit_tiny_patch16_224")
PARTNER = "resnet18"


def pair(name: str, device: torch.device) -> tuple[Tapped, Tapped]:
    """The same network in train mode without and with taps."""
    torch.manual_seed(0)
    network = build_network(name, num_classes=10)
    plan = match(build_network(PARTNER, meta=True).levels(), network.levels())
    plain = Tapped(copy.deepcopy(network.model), network.preprocess())
    return plain.to(device).train(), Tapped(network.model, network.preprocess(), plan.student_taps()).to(device).train()


def step(network: nn.Module, images: Tensor) -> None:
    """Forward + backward."""
    logits, features = network(images)
    loss = logits.square().mean()
    for value in features.values():
        loss = loss + value.square().mean()
    loss.backward()
    network.zero_grad(set_to_none=True)


def seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(plain: nn.Module, other: nn.Module, images: Tensor, rounds: int) -> dict[str, Any]:
    """Interleaved times of two networks -> ratios other / plain."""
    for network in (plain, other, plain, other):
        step(network, images)
    times: dict[str, list[float]] = {"plain": [], "other": []}
    for number in range(rounds):
        sides = [("plain", plain), ("other", other)]
        for side, network in sides if number % 2 else sides[::-1]:
            times[side].append(seconds(lambda network=network: step(network, images), images.device))  # type: ignore[misc]
    ratios = [o / p for o, p in zip(times["other"], times["plain"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio_of_minima": round(min(times["other"]) / min(times["plain"]), 4),
        "median_ratio": round(median, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "plain_ms": round(1000 * min(times["plain"]), 2),
        "rounds": rounds,
    }


def saved_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that the forward leaves behind for the backward, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in network.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(images)
    total = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    del output
    return total


def peak_bytes(network: nn.Module, images: Tensor) -> int:
    """The allocator's highest level during one step, above where it began."""
    step(network, images)
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(network, images)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(network, images)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def memory(plain: Tapped, tapped: Tapped, images: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        features = tapped(images).features
    pooled = sum(value.nbytes for value in features.values())
    row: dict[str, Any] = {"taps": len(features), "pooled_bytes": pooled}
    for name, measure in (("saved", saved_bytes), ("peak", peak_bytes)):
        without, with_taps = measure(plain, images), measure(tapped, images)
        row |= {f"{name}_bytes_plain": without, f"{name}_bytes_extra": with_taps - without}
    return row


def compiled(plain: Tapped, tapped: Tapped, images: Tensor, rounds: int, backend: str) -> dict[str, Any]:
    """Graph breaks that the taps add, and the ratio of the compiled steps."""
    breaks = {}
    for side, network in (("plain", plain), ("tapped", tapped)):
        torch._dynamo.reset()
        breaks[side] = torch._dynamo.explain(network)(images).graph_break_count
    torch._dynamo.reset()
    plain.compile(backend=backend)
    tapped.compile(backend=backend)
    return {"graph_breaks": breaks, "backend": backend, **compare(plain, tapped, images, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device, rows = torch.device(args.device), []
    for name in args.models:
        plain, tapped = pair(name, device)
        size = plain.view.size
        images = torch.randint(0, 256, (args.batch, 3, *size), dtype=torch.uint8, device=device)
        row = {
            "model": name,
            "batch": args.batch,
            "none": compare(plain, copy.deepcopy(plain), images, args.rounds),
            "eager": compare(plain, tapped, images, args.rounds),
            "memory": memory(plain, tapped, images),
        }
        if not args.no_compile:
            row["compiled"] = compiled(plain, tapped, images, args.rounds, args.backend)
        rows.append(row)
        for key in ("none", "eager", "compiled", "memory"):
            if key in row:
                print(f"{name:24s} {key:9s} {json.dumps(row[key])}", flush=True)
    if args.json:
        result = {
            "rows": rows,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "command": "python benchmarks/taps.py",
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
