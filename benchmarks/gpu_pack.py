"""Packs what `gpu.py` trains on into one folder, small enough to travel to a machine without a network.

    tar -xf cifar100.tar.xz -C data
    python benchmarks/gpu_pack.py --data data/cifar100 --teacher cifar_resnet56=teacher.safetensors

Writes the teachers' weights under their architecture's name and `gpu-pack/data.tar`: the images as they are, as many of
each class as fit beside the weights into --mib, all validation images first. The folder is ignored by git.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
from itertools import chain, zip_longest
from pathlib import Path

BLOCK = 512
"""A file in a tar takes a header and whole blocks of this size."""


def pack(data: Path, output: Path, bytes_at_most: int) -> dict[str, int]:
    """Write the images of a class folder with train/ and val/ to a tar -> images of each part."""
    kept = {"val": 0, "train": 0}
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as tar:
        size = 0
        for part in kept:
            classes = [sorted(path for path in folder.iterdir()) for folder in sorted((data / part).iterdir())]
            for path in filter(None, chain.from_iterable(zip_longest(*classes))):  # one of each class in turn
                size += BLOCK * (1 + -(-path.stat().st_size // BLOCK))
                if size > bytes_at_most - 20 * BLOCK:
                    break
                tar.add(path, str(path.relative_to(data)))
                kept[part] += 1
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/, a folder for each class")
    parser.add_argument("--teacher", action="append", default=[], metavar="ARCHITECTURE=FILE")
    parser.add_argument("--output", type=Path, default=Path("gpu-pack"))
    parser.add_argument("--mib", type=float, default=58.0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    room = int(arguments.mib * 2**20)
    for teacher in arguments.teacher:
        name, _, file = teacher.partition("=")
        room -= Path(shutil.copyfile(file, arguments.output / f"{name}.safetensors")).stat().st_size
    kept = pack(arguments.data, arguments.output / "data.tar", room)
    print(f"{arguments.output / 'data.tar'}: {kept['train']} training and {kept['val']} validation images")


if __name__ == "__main__":
    main()
