"""Image folders and archives -> splits: with class folders, or as they are where labels are not to be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from timm.data import create_dataset

from irgdistill.config import DataConfig
from irgdistill.data.sources.tar import TarSource
from irgdistill.data.sources.unlabelled import IMAGE_SUFFIXES, PlainImages
from irgdistill.data.splits import Source, Splits, TimmSource, hold_out
from irgdistill.errors import UserError, nearest

VAL_FOLDERS = ("val", "validation", "test")


def open_folder(root: Path, config: DataConfig, val_only: bool = False) -> Splits:
    """Of `train/` and `val/`, archives of these, or class folders of which a part is held out. Raises UserError."""
    if root.is_file() and root.suffix == ".tar":
        return _open_archive(root, config)
    if root.is_file():
        raise UserError(f"--data {root} is a file: expected a folder, or an uncompressed .tar of class folders")
    train_root = root / (config.train_split or "train")
    if train_root.is_dir():
        return _open_train_val(root, train_root, config, val_only)
    if train_root.with_name(f"{train_root.name}.tar").is_file():
        return _open_archives(root, train_root.with_name(f"{train_root.name}.tar"), config)
    if config.train_split:
        there = [*_folders(root), *(path.stem for path in root.glob("*.tar"))]
        raise UserError(f"no split {config.train_split!r} in {root}{nearest(config.train_split, there)}")
    classes = _class_folders(root)
    if config.val_fraction is None:
        raise UserError(
            f"{root} has no train/ folder; for class folders alone say how much to hold out, such as --val-fraction 0.1"
        )
    source = _folder_source(root, classes)
    return hold_out(source, source.labels(), classes, config.val_fraction)


def _open_train_val(root: Path, train_root: Path, config: DataConfig, val_only: bool) -> Splits:
    classes = _class_folders(train_root)
    names = _val_names(config)
    val_root = next((root / name for name in names if (root / name).is_dir()), None)
    if val_root is None:
        if config.val_split or config.val_fraction is None:
            raise UserError(
                f"{root} has no {', '.join(names)} folder beside train/{_near_split(config, root)}; "
                "or hold out a part: --val-fraction 0.1"
            )
        source = _folder_source(train_root, classes)
        return hold_out(source, source.labels(), classes, config.val_fraction)
    _check_same(classes, _class_folders(val_root), train_root, val_root)
    val = _folder_source(val_root, classes)
    train = val if val_only else _folder_source(train_root, classes)
    return Splits(train, val, classes, range(len(train)), range(len(val)))


def _check_same(classes: Sequence[str], other: Sequence[str], one: Path, two: Path) -> None:
    if other != classes:
        only = [f"{name} only in {one.name}" for name in sorted(set(classes) - set(other))]
        only += [f"{name} only in {two.name}" for name in sorted(set(other) - set(classes))]
        more = f" and {len(only) - 4} more" if len(only) > 4 else ""
        raise UserError(f"class folders of {one} and {two} differ: {', '.join(only[:4])}{more}")


def _open_archives(root: Path, train_tar: Path, config: DataConfig) -> Splits:
    """train.tar and val.tar, each of class folders."""
    train = TarSource(train_tar)
    names = _val_names(config)
    val_tar = next((path for name in names if (path := root / f"{name}.tar").is_file()), None)
    if val_tar is None:
        if config.val_split or config.val_fraction is None:
            raise UserError(
                f"{root} has no {', '.join(names)} .tar beside {train_tar.name}{_near_split(config, root)}; "
                "or hold out a part: --val-fraction 0.1"
            )
        return hold_out(train, train.labels(), train.classes, config.val_fraction)
    val = TarSource(val_tar)
    _check_same(train.classes, val.classes, train_tar, val_tar)
    return Splits(train, val, train.classes, range(len(train)), range(len(val)))


def _open_archive(path: Path, config: DataConfig) -> Splits:
    """One .tar: of train/ and val/, or of class folders alone, with a part held out."""
    archive = TarSource(path)
    parts = archive.parts()
    for asked in (config.train_split, config.val_split):
        if asked and asked not in parts:
            raise UserError(f"no folder {asked!r} of class folders in {path}{nearest(asked, parts)}")
    train = parts.get(config.train_split or "train")
    val = next((parts[name] for name in _val_names(config) if name in parts), None)
    if train and val:
        return Splits(archive, archive, archive.classes, train, val)
    if config.val_fraction is None:
        raise UserError(f"{path} holds no train/ and val/; of class folders alone hold out a part: --val-fraction 0.1")
    chosen = train or range(len(archive))
    labels = archive.labels()
    splits = hold_out(archive, [labels[i] for i in chosen], archive.classes, config.val_fraction)
    splits.train_indices, splits.val_indices = (
        [chosen[i] for i in part] for part in (splits.train_indices, splits.val_indices)
    )
    return splits


def open_unlabelled_folder(root: Path, config: DataConfig, val_only: bool, classes: Sequence[str] | int) -> Splits:
    """Training images of any folder; validation images with class folders, or as they are. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"no folder {str(root)!r}: with --no-labels images are read from a folder or a named data set")
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
    train_root = root / (config.train_split or "train")
    if config.train_split and not train_root.is_dir():
        raise UserError(f"no split {config.train_split!r} in {root}{nearest(config.train_split, _folders(root))}")
    val_names = _val_names(config)
    val_root = next((root / name for name in val_names if (root / name).is_dir()), None)
    if not train_root.is_dir() or val_root is None:
        if config.val_split or config.val_fraction is None:
            raise UserError(
                f"{root} has no train/ beside {', '.join(val_names)}{_near_split(config, root)}; "
                "or hold out images: --val-fraction 0.1"
            )
        images = PlainImages(train_root if train_root.is_dir() else root)
        splits = hold_out(images, [0] * len(images), ["images"], config.val_fraction)
        return replace(splits, classes=names, labelled=False)
    val, labelled = _val_images(val_root, names)
    train = val if val_only else PlainImages(train_root)
    return Splits(train, val, names, range(len(train)), range(len(val)), labelled=labelled)


def _val_images(root: Path, classes: list[str]) -> tuple[Source, bool]:
    """Images of class folders, which must be the teacher's, True; or of a folder without classes, False."""
    folders = _folders(root)
    if not folders or any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir()):
        return PlainImages(root), False
    anonymous = classes == [str(i) for i in range(len(classes))]
    if folders != classes and not (anonymous and len(folders) == len(classes)):
        raise UserError(
            f"the {len(folders)} folders of {root} ({', '.join(folders[:3])}, …) are not the teacher's {len(classes)} "
            f"classes ({', '.join(classes[:3])}, …): without labels, put the images into {root} itself"
        )
    return _folder_source(root, folders), True


def _folder_source(root: Path, classes: list[str]) -> TimmSource:
    class_map = {name: index for index, name in enumerate(classes)}
    try:
        dataset = create_dataset("", root=str(root), search_split=False, class_map=class_map)
    except RuntimeError:
        raise UserError(f"no images in {root}") from None
    for folder in (root / name for name in classes):
        for below in _folders(folder):
            if any(file.suffix.lower() in IMAGE_SUFFIXES for file in (folder / below).rglob("*")):
                raise UserError(f"{folder / below} holds images deeper than a class folder: put them into {folder}")
    return TimmSource(dataset)


def _val_names(config: DataConfig) -> list[str]:
    return [config.val_split] if config.val_split else list(VAL_FOLDERS)


def _near_split(config: DataConfig, root: Path) -> str:
    """The folder or archive in `root` whose name is near to the validation split that was asked for."""
    there = [*_folders(root), *(path.stem for path in root.glob("*.tar"))]
    return nearest(config.val_split, there) if config.val_split else ""


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(root: Path) -> list[str]:
    classes = _folders(root)
    if not classes:
        raise UserError(f"{root} holds no class folders: expected one folder of images for each class")
    return classes
