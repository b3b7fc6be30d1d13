"""Load, merge, validate and dump settings. Imports no torch.

A run's settings are merged in this order, later ones win: defaults, preset, `--set key.path=value`, options.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from irgdistill.config.explain import explain
from irgdistill.config.network_files import check_function, join_function, split_function
from irgdistill.config.plain_yaml import load_yaml
from irgdistill.config.renamed import current_key, current_keys, with_earlier_defaults
from irgdistill.config.schema import Config, DataConfig, PluginConfig, refresh
from irgdistill.config.settings import keys, of_any_teacher, options
from irgdistill.config.sources import find_source, is_remote
from irgdistill.errors import UserError, nearest, one_line
from irgdistill.plugins import import_plugin

FURTHER = "teachers"
"""The section that is a list."""


NETWORK_NAMES = ("teacher.name", "student.name")


def load_config(
    preset: str | None = None, settings: Sequence[str] | None = None, flags: Mapping[str, Any] | None = None
) -> Config:
    """Merge preset < `settings` ("key.path=value") < `flags` ({"key.path": value}) and validate.

    Raises UserError; warns about keys that have another name now.
    """
    tree: dict[str, Any] = load_preset(preset) if preset else {}
    files = list[PluginConfig]()
    for setting in settings or []:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected key.path=value, such as --set losses.kd.temperature=2")
        try:
            value = load_yaml(text)
        except yaml.YAMLError:
            value = text
        assign(tree, path.strip(), _imported(path.strip(), value, files))
    for path, value in (flags or {}).items():
        value = _imported(path, value, files)
        assign(tree, path, [*_listed(tree.get(path)), *_listed(value)] if path == "plugins" else value)
    if files:
        assign(tree, "plugins", [*_listed(tree.get("plugins")), *(file.model_dump(mode="json") for file in files)])
    names = {setting.key: setting.flag.name for setting in options().values() if setting.flag}
    return validate(tree, typed={key: names[key] for key in flags or {} if key in names})


def _imported(path: str, value: Any, files: list[PluginConfig]) -> Any:
    """The value of the key `path`. If it is a network FILE.py:FUNCTION, import the file and add it to `files`.

    For what the user typed alone: no file names another one to be run. Raises UserError as `import_function`.
    """
    if of_any_teacher(path) not in NETWORK_NAMES or not isinstance(value, str) or split_function(value) is None:
        return value
    name, file = import_function(value)
    files.append(file)
    return name


def import_function(name: str) -> tuple[str, PluginConfig]:
    """Import the file of FILE.py:FUNCTION -> the name with the absolute path, and the file as a plug-in.

    Raises UserError: no such file, or one that does not import.
    """
    path, function = check_function(name)
    try:
        return join_function(path, function), load_plugin(path)
    except UserError as error:
        raise UserError(str(error).replace("--plugin ", "", 1)) from None


def validate(tree: Mapping[str, Any], where: str = "", typed: Mapping[str, str] | None = None) -> Config:
    """Tree of plain values -> Config, after its plugins are imported, which may add to what is allowed.

    `typed`: key -> the option that set it. Raises UserError with the field, the value and what is allowed, or as
    `load_plugin`.
    """
    tree = current_keys(tree)
    if plugins := _listed(tree.get("plugins")):
        try:
            loaded = [_load(entry) for entry in plugins]
        except UserError as error:
            raise UserError(f"{where}{error}") from None
        tree["plugins"] = [entry for i, entry in enumerate(loaded) if entry not in loaded[:i]]
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(where + explain(error.errors(), typed)) from None


def validate_saved(tree: Mapping[str, Any], where: str = "") -> Config:
    """`validate` for the settings of a saved run, which an older version may have written."""
    return validate(with_earlier_defaults(tree), where)


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
    """Write a configuration as YAML; `read_yaml` reads it back. Characters that are not seen are escaped."""
    tree = config.model_dump(mode="json")
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return text if text.replace("\n", "").isprintable() else yaml.safe_dump(tree, sort_keys=False)


def presets() -> dict[str, Path]:
    """Name -> file of every preset of the package."""
    here = Path(__file__).parents[1]
    folder = here / "presets" if (here / "presets").is_dir() else here.parent / "presets"
    return {path.stem: path for path in sorted(folder.rglob("*.yaml"))}


def preset_files(name: str | None = None) -> dict[str, Path]:
    """All presets, or the one of that name. Raises UserError with the nearest names."""
    known = presets()
    if name is not None and name not in known:
        raise UserError(f"no preset {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return known if name is None else {name: known[name]}


def load_preset(name: str) -> dict[str, Any]:
    """Read a preset by name, or any YAML file by path; `extends: NAME` starts from another preset.

    Raises UserError with the nearest names.
    """
    path = presets().get(name) or Path(name)
    if not path.is_file():
        raise UserError(f"no preset {name!r}{nearest(name, presets())} (known: {', '.join(presets())}, or a YAML file)")
    tree = current_keys(read_yaml(path))
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if str(base) not in presets() or base == name:
        raise UserError(f"{path} extends {base!r}{nearest(str(base), presets())} (known: {', '.join(presets())})")
    return _merged(load_preset(base), tree)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two trees of settings; `above` wins."""
    both = {key for key in above if isinstance(below.get(key), dict) and isinstance(above[key], dict)}
    return {**below, **above, **{key: _merged(below[key], above[key]) for key in both}}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping. Raises UserError."""
    try:
        tree = load_yaml(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of configuration keys, got {type(tree).__name__}")
    return tree


def assign(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the key `path` in a tree of plain values; `teachers.0.name` is in the first entry of a list.

    Raises UserError for a key below one that is no section, and for a further teacher after one that is missing.
    """
    *sections, key = current_key(path).split(".")
    if sections[:1] == [FURTHER] and len(sections) == 2 and sections[1].isdecimal():
        entries = list(tree.get(FURTHER) or ())
        number = int(sections[1])
        if number > len(entries):
            raise UserError(f"{path}: the next further teacher is teachers.{len(entries)}")
        entry = entries[number] if number < len(entries) else {}
        if not isinstance(entry, dict):
            raise UserError(f"unknown key {path!r}{nearest(path, keys())}")
        tree[FURTHER] = [*entries[:number], {**entry, key: value}, *entries[number + 1 :]]
        return
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"unknown key {path!r}{nearest(path, keys())}")
        tree = child
    tree[key] = value


def data_of(
    target: str,
    recorded: Mapping[str, Any] | None,
    asked: DataConfig,
    given: Collection[str],
    plugins: Sequence[PluginConfig] = (),
) -> DataConfig:
    """The data set that a checkpoint records, with the keys in `given` taken from `asked`.

    What a file records never makes the tool reach for the network: that takes a typed `--data` or `--download`.
    Raises UserError: no data set is recorded, it is gone or would be looked up, or `--val-fraction` would hold out
    training images; or as `load_plugin`, if the data source is none that this process knows.
    """
    if recorded is None:
        if asked.source is None:
            raise UserError(f"{target} records no data set; give --data")
        return asked
    own = validate_saved({"data": recorded}, f"{target}: ").data
    if "data.val_fraction" in given and "data.source" not in given and asked.val_fraction != own.val_fraction:
        raise UserError(f"{target} is evaluated on the images its run held out; --val-fraction needs another --data")
    names = {key.removeprefix("data.") for key in given if key.startswith("data.")}
    names |= {"eval_batch_size", "workers"}
    data = own.replaced({name: getattr(asked, name) for name in names})
    named = data.source and not find_source(data.source).word and not Path(data.source).is_absolute()
    if named and not Path(str(data.source)).exists():
        for plugin in plugins:  # the source may be one of theirs
            load_plugin(plugin.path, plugin.sha256)
    if data.source and "data.source" not in given and is_remote(data.source):
        raise UserError(
            f"{target} records the data set {data.source}, which is looked up on the network: allow that with "
            f"--data {data.source}, or give other --data"
        )
    if data.source and "data.download" not in given and not find_source(data.source).local:
        data = data.replaced({"download": False})
    if data.source and "/" in data.source and Path(data.source).is_absolute() and not Path(data.source).exists():
        raise UserError(f"the data set of {target} is no longer at {data.source}; give its place with --data")
    return data
