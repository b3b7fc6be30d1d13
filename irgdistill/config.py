"""Where settings come from: presets, overrides, validation, dump. Imports no torch.

What a run uses is built in this order, later wins: defaults, preset, `--set key.path=value`, explicit flags.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from irgdistill.errors import UserError, nearest
from irgdistill.settings import Config


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
        _assign(tree, path, value)
    return validate(tree)


def validate(tree: Mapping[str, Any], where: str = "") -> Config:
    """Tree of plain values -> Config. Raises UserError naming field, value and what is allowed."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise UserError(where + "; ".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {path!r}{nearest(path, list(keys()))}"
    if error["type"] == "literal_error":
        allowed = error["ctx"]["expected"]
        near = nearest(str(error["input"]), allowed.split("'")[1::2])
        return f"{path} = {error['input']!r}: expected {allowed}{near}"
    msg = error["msg"].removeprefix("Value error, ")
    return f"{path} = {error['input']!r}: {msg[0].lower()}{msg[1:]}"


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """All dotted keys that can be set."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def check_student(config: Config) -> None:
    """Raises UserError where none is named, by itself or by a checkpoint."""
    if config.student.name is None and config.student.checkpoint is None:
        raise UserError("no student: give --student NAME, any timm name such as mobilenetv2_100")


def dump(config: Config) -> str:
    """Resolved configuration as YAML; `validate(yaml.safe_load(…))` gives it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def presets() -> dict[str, Path]:
    """Name -> file of every preset that comes with the package."""
    here = Path(__file__).parent
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
