"""Paths: folders and uncompressed .tar archives of class folders; without labels, folders of any images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from irgdistill.data.class_folders import ClassFolders
from irgdistill.data.decoding import is_image_name
from irgdistill.data.search import ImageSearch
from irgdistill.data.sources import source
from irgdistill.data.splits import VAL, Source, Splits, hold_out, hold_out_unlabelled
from irgdistill.data.unlabelled import PlainImages
from irgdistill.errors import UserError, nearest

if TYPE_CHECKING:
    from irgdistill.config import DataConfig


def open_unlabelled(config: DataConfig, val_only: bool, classes: Sequence[str] | int) -> Splits:
    """Open a folder for training without labels. Raises UserError.

    Training images lie in any folders. Validation images lie in class folders of the teacher's `classes` (any folders
    if there are none), or have no labels either.
    """
    root = Path(str(config.source))
    if not root.is_dir():
        raise UserError(f"no folder {str(root)!r}: with --no-labels images are read from a folder or a named data set")
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
    train_root = root / (config.train_split or "train")
    if config.train_split and not train_root.is_dir():
        raise UserError(f"no split {config.train_split!r} in {root}{nearest(config.train_split, _folders(root))}")
    val_root = _find_val(root, config)
    search = ImageSearch(config.search_limit)
    if not train_root.is_dir() or val_root is None:
        return _hold_out_unlabelled(root, train_root if train_root.is_dir() else root, names, search, config)
    val, labelled = _unlabelled_val(val_root, names, search, config)
    train = val if val_only else PlainImages(train_root, search, config.exif_orientation)
    if isinstance(val, ClassFolders):
        return replace(_pair(train, val, names or _folders(val_root), search), empty=_empty(val, val_root))
    return _pair(train, val, names, search, labelled)


@source("", local=True, open_unlabelled=open_unlabelled)
def open_path(config: DataConfig, val_only: bool = False) -> Splits:
    """Open `train` and `val`, folders or archives of class folders; or hold out a part of one. Raises UserError."""
    root = Path(str(config.source))
    if root.is_file() and root.suffix == ".tar":
        return _open_archive(root, config)
    if root.is_file():
        raise UserError(f"--data {root} is a file: expected a folder, or an uncompressed .tar of class folders")
    train_root = root / (config.train_split or "train")
    train_tar = train_root.with_name(f"{train_root.name}.tar")
    if train_root.is_dir():
        return _open_folders(root, train_root, config, val_only)
    if train_tar.is_file():
        return _open_archives(root, train_tar, config)
    if config.train_split:
        raise UserError(f"no split {config.train_split!r} in {root}{nearest(config.train_split, _splits(root))}")
    classes = _class_folders(root)
    if config.val_fraction is None:
        raise UserError(
            f"{root} has no train/ folder; to hold out a part of its class folders, give --val-fraction 0.1"
        )
    search = ImageSearch(config.search_limit)
    return _hold_out_of_folders(root, classes, search, config, config.val_fraction)


def _open_folders(root: Path, train_root: Path, config: DataConfig, val_only: bool) -> Splits:
    """train/ and val/, each of class folders."""
    classes = _class_folders(train_root)
    val_root = _find_val(root, config)
    search = ImageSearch(config.search_limit)
    if val_root is None:
        fraction = _held_out(root, config, f"{', '.join(_val_names(config))} folder beside train/")
        return _hold_out_of_folders(train_root, classes, search, config, fraction)
    looked = ImageSearch(config.search_limit)  # apart from `search`, which counts each file once

    def no_images(path: Path, name: str) -> bool:
        return (path / name).is_dir() and next(looked.walk(path / name), None) is None

    _check_same_classes(classes, _class_folders(val_root), train_root, val_root, no_images)
    val = ClassFolders(val_root, classes, search, config.exif_orientation)
    train = val if val_only else _train_folders(train_root, classes, search, config)
    empty = [] if val_only else _empty(train, train_root)
    return replace(_pair(train, val, classes, search), empty=[*empty, *_empty(val, val_root)])


def _hold_out_of_folders(
    root: Path, classes: list[str], search: ImageSearch, config: DataConfig, fraction: float
) -> Splits:
    images = _train_folders(root, classes, search, config)
    splits = hold_out(images, images.labels(), classes, fraction)
    return replace(splits, left_out=str(search), empty=_empty(images, root))


def _train_folders(root: Path, classes: Sequence[str], search: ImageSearch, config: DataConfig) -> ClassFolders:
    """The training images. Raises UserError as `ClassFolders`, or if all but one of its folders are empty."""
    images = ClassFolders(root, classes, search, config.exif_orientation)
    if images.empty and len(classes) - len(images.empty) == 1:
        more = ", …" if len(images.empty) > 3 else ""
        raise UserError(
            f"{root} holds images of one class; expected at least two (without images: "
            f"{', '.join(images.empty[:3])}{more})"
        )
    return images


def _empty(images: ClassFolders, root: Path) -> list[str]:
    return [f"{name} in {root.name}" for name in images.empty]


def _hold_out_unlabelled(
    root: Path, train_root: Path, classes: list[str], search: ImageSearch, config: DataConfig
) -> Splits:
    """Hold out the share that the settings give, else a small one."""
    if config.val_split:
        _held_out(root, config, f"train/ beside {config.val_split}")
    images = PlainImages(train_root, search, config.exif_orientation)
    splits = hold_out_unlabelled(images, str(train_root), config.val_fraction)
    return replace(splits, classes=classes, left_out=str(search))


def _open_archives(root: Path, train_tar: Path, config: DataConfig) -> Splits:
    """train.tar and val.tar, each of class folders."""
    from irgdistill.data.tar import TarSource

    search = ImageSearch(config.search_limit)
    train = TarSource(train_tar, search, config.exif_orientation)
    val_tar = _find_val(root, config, ".tar")
    if val_tar is None:
        fraction = _held_out(root, config, f"{', '.join(_val_names(config))} .tar beside {train_tar.name}")
        return replace(hold_out(train, train.labels(), train.classes, fraction), left_out=str(search))
    val = TarSource(val_tar, search, config.exif_orientation)
    empty = {train_tar: train.empty, val_tar: val.empty}
    _check_same_classes(train.classes, val.classes, train_tar, val_tar, lambda path, name: name in empty[path])
    return _pair(train, val, train.classes, search)


def _open_archive(path: Path, config: DataConfig) -> Splits:
    """One .tar of train/ and val/, or of class folders alone, of which a part is held out."""
    from irgdistill.data.tar import TarSource

    search = ImageSearch(config.search_limit)
    archive = TarSource(path, search, config.exif_orientation)
    parts = archive.parts()
    for given in (config.train_split, config.val_split):
        if given and given not in parts:
            raise UserError(f"no folder {given!r} of class folders in {path}{nearest(given, parts)}")
    train = parts.get(config.train_split or "train")
    val = next((parts[name] for name in _val_names(config) if name in parts), None)
    if train and val:
        return Splits(archive, archive, archive.classes, train, val, left_out=str(search))
    if config.val_fraction is None:
        raise UserError(f"{path} has no train/ and val/; to hold out a part of its images, give --val-fraction 0.1")
    chosen = train or range(len(archive))
    labels = archive.labels()
    splits = hold_out(archive, [labels[i] for i in chosen], archive.classes, config.val_fraction)
    train, val = ([chosen[i] for i in part] for part in (splits.train_indices, splits.val_indices))
    return replace(splits, train_indices=train, val_indices=val, left_out=str(search))


def _pair(train: Source, val: Source, classes: list[str], search: ImageSearch, labelled: bool = True) -> Splits:
    left_out = str(search)
    return Splits(train, val, classes, range(len(train)), range(len(val)), labelled=labelled, left_out=left_out)


def _val_names(config: DataConfig) -> Sequence[str]:
    return [config.val_split] if config.val_split else VAL


def _find_val(root: Path, config: DataConfig, suffix: str = "") -> Path | None:
    """The validation folder, or archive, in `root`."""
    paths = (root / f"{name}{suffix}" for name in _val_names(config))
    return next((path for path in paths if (path.is_file() if suffix else path.is_dir())), None)


def _held_out(root: Path, config: DataConfig, missing: str) -> float:
    """The share to hold out. Raises UserError if none was given, or a validation split was."""
    if config.val_split or config.val_fraction is None:
        near = nearest(config.val_split, _splits(root)) if config.val_split else ""
        raise UserError(f"{root} has no {missing}{near}; to hold out a part, give --val-fraction 0.1")
    return config.val_fraction


def _check_same_classes(
    classes: Sequence[str], others: Sequence[str], one: Path, two: Path, empty: Callable[[Path, str], bool]
) -> None:
    """Raises UserError if the classes of two folders or archives differ; `empty` tells which have no images."""
    if others != classes:
        only = [(name, one) for name in sorted(set(classes) - set(others))]
        only += [(name, two) for name in sorted(set(others) - set(classes))]
        shown = []
        for name, path in only[:4]:
            bare = next((each for each in (one, two) if empty(each, name)), None)
            shown.append(
                f"{name} in {bare.name} is there and holds no images" if bare else f"{name} only in {path.name}"
            )
        more = f" and {len(only) - 4} more" if len(only) > 4 else ""
        raise UserError(f"class folders of {one} and {two} differ: {', '.join(shown)}{more}")


def _unlabelled_val(root: Path, classes: list[str], search: ImageSearch, config: DataConfig) -> tuple[Source, bool]:
    """Validation images and whether they have labels: those in class folders do, which must be the teacher's."""
    folders = _folders(root)
    if not folders or any(is_image_name(path.name) for path in root.iterdir()):
        return PlainImages(root, search, config.exif_orientation), False
    unnamed = classes == [str(i) for i in range(len(classes))]
    if classes and folders != classes and not (unnamed and len(folders) == len(classes)):
        raise UserError(
            f"the {len(folders)} folders of {root} ({', '.join(folders[:3])}, …) are not the teacher's {len(classes)} "
            f"classes ({', '.join(classes[:3])}, …): without labels, put the images into {root} itself"
        )
    return ClassFolders(root, folders, search, config.exif_orientation), True


def _splits(root: Path) -> list[str]:
    """Names of the folders and archives in `root`."""
    return [*_folders(root), *(path.stem for path in root.glob("*.tar"))]


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(root: Path) -> list[str]:
    classes = _folders(root)
    if not classes:
        raise UserError(f"{root} holds no class folders: expected one folder of images for each class")
    return classes
