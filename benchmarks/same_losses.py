"""Checks that a change of the code changes no number: seeded losses and weights of every method, bit for bit.

    python benchmarks/same_losses.py --output before.json      # at the old commit
    python benchmarks/same_losses.py --against before.json     # at the new one

Every method trains 20 updates of cifar_resnet20 -> cifar_resnet14_x0_5 on 640 digits, on the CPU in float32 with one
thread: plainly, with EMA, with mixup, with accumulation, from a teacher cache, and in two gloo processes. Recorded are
the total loss and every term of every batch as hexadecimal floats, and the SHA-256 of all tensors in last.safetensors.
A combination that is refused is recorded by its exit code. Exit code 1: something differs. Compare on one machine only:
another processor rounds otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = ["none", "kd", "irg", "mtk", "irg+kd", "kd+at", "irg+kd+at", "logits", "dkd", "fitnet", "at", "fsp", "rocket"]
METHODS += ["rkd", "sp", "pkt"]
"""Those of version 0.1."""
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "ema": ["--ema", "0.9"],
    "mixup": ["--mixup", "0.3"],
    "accumulate": ["--accumulate", "2", "--epochs", "2"],
    "cache": ["--set", "data.views=1"],
    "ranks": ["--backend", "gloo"],
}
COMMON = ["--data", "digits", "--input-size", "16", "--batch-size", "32", "--workers", "0", "--device", "cpu"]
COMMON += ["--amp", "none", "--seed", "5", "--epochs", "1", "--lr", "0.05", "--set", "data.train_images=640"]
COMMON += ["--set", "runtime.log_every=1", "--skip-teacher-check", "--quiet"]


def command(words: list[str], log: Path | None = None, environment: dict[str, str] | None = None) -> int:
    """Run `irgdistill WORDS` here -> exit code; with `log`, write the result of every training step there."""
    os.environ.update(environment or {})
    import torch

    torch.set_num_threads(1)
    from irgdistill.cli import main

    try:
        from irgdistill.training.trainer import Trainer
    except ImportError:  # version 0.1
        from irgdistill.trainer import Trainer  # type: ignore[import-not-found,no-redef]
    step, losses = Trainer.train_step, []

    def recorded(self: Any, *batch: Any) -> Any:
        values = step(self, *batch)
        losses.append({name: float(value).hex() for name, value in values.items()})
        return values

    Trainer.train_step = recorded  # type: ignore[method-assign]
    sys.argv = ["irgdistill", *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    if log is not None:
        log.write_text(json.dumps({"code": code, "losses": losses, "error": said.getvalue()[-300:] if code else ""}))
    return code


def run(words: list[str], folder: Path, ranks: int = 1) -> dict[str, Any]:
    """One training, in a forked process for each rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in place.items()} if ranks > 1 else None
        arguments = ([*words, "--output", str(folder / "run")], folder / f"{rank}.json", environment)
        processes.append(multiprocessing.Process(target=command, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join()
    logs = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    found: dict[str, Any] = {"code": logs[0]["code"]}
    if found["code"]:
        return found | {"error": logs[0]["error"]}
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "run" / "last.safetensors").items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return found | {"losses": [log["losses"] for log in logs], "weights": digest.hexdigest()}


def record(methods: list[str], variants: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        teach = [
            "distill",
            "--method",
            "none",
            "--student",
            "cifar_resnet20",
            *COMMON,
            "--output",
            str(root / "teacher"),
        ]
        for words in (
            teach,
            ["cache-teacher", "--teacher-checkpoint", str(root / "teacher"), "--student", "cifar_resnet14_x0_5"]
            + [word for word in COMMON if word != "--skip-teacher-check"]
            + ["--output", str(root / "cache")],
        ):
            process = multiprocessing.Process(target=_checked, args=(words,))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{' '.join(words)} failed")
        for method in methods:
            for variant in variants:
                words = ["distill", "--method", method, "--student", "cifar_resnet14_x0_5"]
                if variant == "cache":
                    words += ["--teacher-cache", str(root / "cache")]
                else:
                    words += ["--teacher-checkpoint", str(root / "teacher")]
                folder = root / f"{method}-{variant}"
                folder.mkdir()
                results[f"{method} {variant}"] = run(
                    [*words, *COMMON, *VARIANTS[variant]], folder, 2 if variant == "ranks" else 1
                )
                print(f"{method} {variant}: code {results[f'{method} {variant}']['code']}", flush=True)
    return results


def _checked(words: list[str]) -> None:
    sys.exit(command(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the record here")
    parser.add_argument("--against", type=Path, help="compare with this record")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    given = parser.parse_args()
    results = record(given.methods.split(","), given.variants.split(","))
    if given.output:
        given.output.write_text(json.dumps(results))
    if given.against:
        before = json.loads(given.against.read_text())
        keys = ("code", "losses", "weights")
        differ = [
            f"{name}: {key}"
            for name, now in results.items()
            for key in keys
            if now.get(key) != before.get(name, {}).get(key)
        ]
        trained = sum(not value["code"] for value in results.values())
        print("\n".join(differ) or f"equal bit for bit: {len(results)} combinations, {trained} of them trained")
        sys.exit(bool(differ))


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    main()
