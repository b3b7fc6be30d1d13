"""Where settings come from: presets, overrides, validation, dump. Imports no torch.

What a run uses is built in this order, later wins: defaults, preset, `--set key.path=value`, explicit flags.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from irgdistill.config.explain import explain, keys
from irgdistill.config.schema import Config, DataConfig, PluginConfig, refresh
from irgdistill.errors import UserError, nearest
from irgdistill.plugins import import_plugin


def load_config(
    preset: str | None = None, settings: list[str] | None = None, flags: Mapping[str, Any] | None = None
) -> Config:
    """Merge preset < `settings` ("key.path=value") < `flags` ({"key.path": value}) and validate. Raises UserError."""
    tree: dict[str, Any] = load_preset(preset) if preset else {}
    for setting in settings or []:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected key.path=value, such as --set losses.kd.temperature=2")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        _assign(tree, path.strip(), value)
    for path, value in (flags or {}).items():
        _assign(tree, path, [*_listed(tree.get(path)), *_listed(value)] if path == "plugins" else value)
    return validate(tree)


def validate(tree: Mapping[str, Any], where: str = "") -> Config:
    """Tree of plain values -> Config, once its plugins are imported, which may add to what is allowed.

    Raises UserError naming field, value and what is allowed, or as `load_plugin`.
    """
    tree = dict(tree)
    if plugins := _listed(tree.get("plugins")):
        try:
            loaded = [_load(entry) for entry in plugins]
        except UserError as error:
            raise UserError(f"{where}{error}") from None
        tree["plugins"] = [entry for i, entry in enumerate(loaded) if entry not in loaded[:i]]
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(where + explain(error.errors())) from None


def load_plugin(path: str | Path, sha256: str | None = None) -> PluginConfig:
    """Import a Python file that registers terms, methods, data sources or loggers.

    With `sha256` it must have that content. Raises UserError: no such file, other content, a name that is taken, a file
    that does not import; then nothing of it stays registered.
    """
    found, checksum = import_plugin(path, sha256, check=refresh)
    return PluginConfig(path=found, sha256=checksum)


def _load(entry: Any) -> Any:
    """An entry of `plugins`, imported -> the same with its checksum; what is no such entry is left to validation."""
    if isinstance(entry, (str, Path)):
        return load_plugin(entry).model_dump(mode="json")
    if isinstance(entry, Mapping) and isinstance(entry.get("path"), (str, Path)):
        return {**entry, **load_plugin(entry["path"], entry.get("sha256")).model_dump(mode="json")}
    return entry


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def dump(config: Config) -> str:
    """Resolved configuration as YAML; `validate(yaml.safe_load(…))` gives it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def presets() -> dict[str, Path]:
    """Name -> file of every preset that comes with the package."""
    here = Path(__file__).parents[1]
    folder = here / "presets" if (here / "presets").is_dir() else here.parent / "presets"
    return {path.stem: path for path in sorted(folder.rglob("*.yaml"))}


def preset_files(name: str | None = None) -> dict[str, Path]:
    """All presets, or the one of that name. Raises UserError with the nearest."""
    known = presets()
    if name is not None and name not in known:
        raise UserError(f"no preset {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return known if name is None else {name: known[name]}


def load_preset(name: str) -> dict[str, Any]:
    """Preset by name, or any YAML file by path; `extends: NAME` begins with another preset.

    Raises UserError with the nearest names.
    """
    path = presets().get(name) or Path(name)
    if not path.is_file():
        raise UserError(f"no preset {name!r}{nearest(name, presets())} (known: {', '.join(presets())}, or a YAML file)")
    tree = read_yaml(path)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if str(base) not in presets() or base == name:
        raise UserError(f"{path} extends {base!r}{nearest(str(base), presets())} (known: {', '.join(presets())})")
    return _merged(load_preset(base), tree)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Trees of settings, the second one on top."""
    both = {key for key in above if isinstance(below.get(key), dict) and isinstance(above[key], dict)}
    return {**below, **above, **{key: _merged(below[key], above[key]) for key in both}}


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of configuration keys, got {type(tree).__name__}")
    return tree


def _assign(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"unknown key {path!r}{nearest(path, list(keys()))}")
        tree = child
    tree[key] = value


def data_of(target: str, metadata: Mapping[str, Any], asked: DataConfig, given: Collection[str]) -> DataConfig:
    """The remembered data set, with what was asked for now on top.

    Raises UserError: none is remembered or it is gone, or a part to hold out of images that were trained on.
    """
    if "data" not in metadata:
        if asked.source is None:
            raise UserError(f"{target} does not remember a data set; give --data")
        return asked
    remembered = DataConfig.model_validate(metadata["data"])
    if "data.val_fraction" in given and "data.source" not in given and asked.val_fraction != remembered.val_fraction:
        raise UserError(f"{target} is judged on what its run held out; --val-fraction goes with other --data")
    names = {key.removeprefix("data.") for key in given if key.startswith("data.")}
    names |= {"eval_batch_size", "workers"}
    data = remembered.model_copy(update={name: getattr(asked, name) for name in names})
    if data.source and "/" in data.source and Path(data.source).is_absolute() and not Path(data.source).exists():
        raise UserError(f"the data set of {target} is no longer at {data.source}; say where it is with --data")
    return data
