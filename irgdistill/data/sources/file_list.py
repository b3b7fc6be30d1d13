"""`FILE.csv`, `FILE.tsv` and `FILE.txt`: image files listed with their labels, and with the split each belongs to."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from irgdistill.data.class_folders import natural_key
from irgdistill.data.sources import source
from irgdistill.data.splits import VAL, Splits, hold_out, hold_out_unlabelled
from irgdistill.data.unlabelled import UNLABELLED, ImageFiles
from irgdistill.errors import UserError, nearest, one_line

if TYPE_CHECKING:
    from irgdistill.config import DataConfig

COLUMNS: Mapping[str, Collection[str]] = {
    "path": ("path", "image", "file", "filename", "file_name", "filepath", "file_path", "image_path"),
    "label": ("label", "class", "target", "category", "class_name"),
    "split": ("split", "set", "subset", "partition"),
}
"""Column -> the names that a header may give it, in any case of letters."""

DELIMITERS = (",", ";", "\t")


class Row(NamedTuple):
    """A row of the list."""

    line: int
    path: str
    label: str
    """Empty: the image has none."""
    split: str


def paths(config: DataConfig) -> list[str]:
    """The image files in the order of the rows. Raises UserError as `read_rows`."""
    return [row.path for row in read_rows(config)]


def open_unlabelled(config: DataConfig, val_only: bool, classes: Sequence[str] | int) -> Splits:
    """Open a list for training without labels. Raises UserError.

    Validation rows keep labels, which must be classes of the teacher, or have none either.
    """
    train, val, others = _split(config, val_only)
    train.sort(key=lambda row: (os.path.basename(row.path), Path(row.path)))
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
    if not val:
        images = ImageFiles([row.path for row in train], config.exif_orientation)
        splits = hold_out_unlabelled(images, str(config.source), config.val_fraction)
        return replace(splits, classes=names, left_out=others)
    labelled = any(row.label for row in val)
    if labelled:
        own = _classes(val)
        numbered = isinstance(classes, int) and len(own) == classes
        names = own if numbered or not names else names
    val_images = _images(config, val, names if labelled else None)
    train_images = val_images if val_only else ImageFiles([row.path for row in train], config.exif_orientation)
    parts = range(len(train_images)), range(len(val_images))
    return Splits(train_images, val_images, names, *parts, labelled=labelled, left_out=others)


@source(".csv", local=True, open_unlabelled=open_unlabelled, paths=paths)
@source(".tsv", local=True, open_unlabelled=open_unlabelled, paths=paths)
@source(".txt", local=True, open_unlabelled=open_unlabelled, paths=paths)
def open_list(config: DataConfig, val_only: bool = False) -> Splits:
    """Open the rows for training and for validation, ordered by path as class folders are; or hold out a part.

    Raises UserError for a bad row, a missing file, no labels, validation labels that no training image has.
    """
    train, val, others = _split(config, val_only)
    classes = _classes(train)
    if not classes:
        raise UserError(f"{config.source} has no labels: add a column label, or train with --no-labels")
    images = _images(config, train, classes, partly=True)
    labels = images.labels()
    unlabelled = [i for i, label in enumerate(labels) if label == UNLABELLED]
    if val_only and not val and config.val_fraction is None:
        val = train
    if val:
        held = _images(config, val, classes)
        splits = Splits(images, held, classes, range(len(images)), range(len(held)))
    else:
        splits = hold_out(images, labels, classes, config.val_fraction or 0.0)
        splits.train_indices = sorted([*splits.train_indices, *unlabelled])
    count = len(splits.train_indices) - len(unlabelled) if unlabelled else None
    return replace(splits, labelled_count=count, left_out=others)


def _split(config: DataConfig, val_only: bool) -> tuple[list[Row], list[Row], str]:
    """Rows for training and for validation, the second empty if a part is to be held out, and what is left out.

    Raises UserError if there are no rows for training, or nothing says how many to hold out. With `val_only` those for
    validation are enough.
    """
    rows = read_rows(config)
    counts = Counter(row.split for row in rows)
    train_name = config.train_split or ("train" if any(counts) else "")
    val_names = [config.val_split] if config.val_split else VAL
    val_name = next((name for name in val_names if name in counts), None)
    for given in (config.train_split, config.val_split):
        if given and given not in counts:
            raise UserError(f"{config.source} has no rows of split {given!r}{nearest(given, counts)}")
    train, val = ([row for row in rows if row.split == name] for name in (train_name, val_name))
    if not train:
        if not (val and val_only):
            raise UserError(f"{config.source} has no rows of split 'train' (there: {', '.join(sorted(counts))})")
        train = val
    if not val and config.labels and config.val_fraction is None and not val_only:
        column = f"no rows of split {' or '.join(VAL)}" if any(counts) else "no column split"
        raise UserError(f"{config.source} has {column}; to hold out a part of its images, give --val-fraction 0.1")
    others = sorted(name for name in counts if name not in (train_name, val_name))
    shown = ", ".join(f"{counts[name]:,} of split {name or '(empty)'}" for name in others)
    return train, val, f"rows left out: {shown}" if others else ""


def _classes(rows: Iterable[Row]) -> list[str]:
    """The labels, in alphabetical order as class folders are; whole numbers by their value."""
    names = {row.label for row in rows if row.label}
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))


def _images(config: DataConfig, rows: list[Row], classes: list[str] | None, partly: bool = False) -> ImageFiles:
    """The images of the rows, sorted by path, with the index of their class; None: without labels.

    `partly`: some may have no label. Raises UserError for a row whose label is missing or unknown.
    """
    rows = sorted(rows, key=lambda row: (natural_key(row.path), row.path))
    index = {name: number for number, name in enumerate(classes or ())}
    for row in rows if classes is not None else ():
        if row.label not in index and (row.label or not partly):
            what = (
                f"no image to train on has the label {row.label!r}" if row.label else "a validation image needs a label"
            )
            raise UserError(f"{config.source}, line {row.line}: {what}{nearest(row.label, index)}")
    return ImageFiles(
        [row.path for row in rows],
        config.exif_orientation,
        None if classes is None else [index.get(row.label, UNLABELLED) for row in rows],
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def read_rows(config: DataConfig) -> list[Row]:
    """All rows. Raises UserError that names file and line: a wrong number of cells, a missing or repeated image."""
    file = Path(str(config.source))
    rows, known = list[Row](), dict[str, int]()
    width, columns, header = 0, dict[str, int](), False
    for line, cells in _lines(file):
        with _located(file, line):
            if not width:
                width, (columns, header) = len(cells), _columns(cells, file, config)
                if header:
                    continue
            if len(cells) != width:
                raise UserError(f"{len(cells)} cell{'s' * (len(cells) != 1)}, expected {width}")
            row = Row(line, *(cells[columns[name]] if name in columns else "" for name in COLUMNS))
            row = row._replace(path=str(file.parent / row.path) if row.path else "")
            if not os.path.isfile(row.path):
                hint = "" if rows or header else "; a header names its column path, or --set data.image_key=NAME does"
                raise UserError(f"no file {row.path}{hint}" if row.path else "no path of an image")
            if known.setdefault(row.path, line) != line:
                raise UserError(f"{row.path} is also in line {known[row.path]}")
            rows.append(row)
    if not rows:
        raise UserError(f"{file} lists no images")
    return rows


def _columns(cells: Sequence[str], file: Path, config: DataConfig) -> tuple[dict[str, int], bool]:
    """Column -> its place by the first row, and whether that is a header. Raises UserError."""
    asked = {"path": config.image_key, "label": config.label_key}
    names = [cell.casefold() for cell in cells]
    for key, name in asked.items():
        if name and name.casefold() not in names:
            setting = "image_key" if key == "path" else "label_key"
            raise UserError(f"no column {name!r}{nearest(name, cells)}: data.{setting} names a column of the header")
    known = {column: [own.casefold()] if (own := asked.get(column)) else words for column, words in COLUMNS.items()}
    found = {
        column: next(number for number, name in enumerate(names) if name in words)
        for column, words in known.items()
        if any(name in words for name in names)
    }
    if "path" in found and not (file.parent / cells[found["path"]]).is_file():
        return found, True
    if len(cells) > len(COLUMNS):
        raise UserError(f"{len(cells)} cells without a header: expected path, label and split")
    return {column: number for number, column in enumerate(COLUMNS) if number < len(cells)}, False


def _lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and stripped cells of every line that is not empty. A .txt without a delimiter has `PATH` or `PATH LABEL`.

    The delimiter is the most frequent one of the first line. Raises UserError.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as text:
            first = text.readline()
            text.seek(0)
            delimiter = max(DELIMITERS, key=first.count)
            if file.suffix.lower() == ".txt" and delimiter not in first:
                for line, words in enumerate(text, 1):
                    if words.strip():
                        yield line, _path_and_label(words.strip(), file)
                return
            reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True)
            for cells in reader:
                if any(map(str.strip, cells)):
                    yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {one_line(error)}") from None


def _path_and_label(words: str, file: Path) -> list[str]:
    if " " not in words or (file.parent / words).is_file():
        return [words, ""]
    path, label = words.rsplit(maxsplit=1)
    return [path, label]


@contextmanager
def _located(file: Path, line: int) -> Iterator[None]:
    """Put the file and the number of the line before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}, line {line}: {error}") from None
