"""Where settings come from: presets, overrides, validation, dump. Imports no torch.

What a run uses is built in this order, later wins: defaults, preset, `--set key.path=value`, explicit flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from irgdistill.errors import UserError, nearest
from irgdistill.settings import Config

QUOTE = "'"
WANTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "expected a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "expected a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "expected true or false"),
    **dict.fromkeys(("dict_type", "model_type"), "expected keys with values"),
    "list_type": "expected a list, such as [A, B]",
    **dict.fromkeys(("tuple_type", "too_long"), "expected two values, such as [A, B]"),
    "path_type": "expected a path",
    "finite_number": "expected a finite number",
}
"""What pydantic's kinds of error say to someone who knows no Python."""


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
        raise UserError(where + _explain(error.errors())) from None


def _explain(errors: Iterable[Any]) -> str:
    """One sentence for each key that is wrong, whichever of its parts or alternatives pydantic complains of."""
    sentences: dict[str, list[str]] = {}
    known = set(keys())
    for error in errors:
        parts = [str(part) for part in error["loc"]]
        path = next((key for n in range(len(parts)) if (key := ".".join(parts[: n + 1])) in known), ".".join(parts))
        kind = error["type"]
        if kind == "missing" and parts[-1].isdecimal():
            kind = "tuple_type"
        if kind == "missing":
            sentences[f"{'.'.join(parts)} is missing"] = []
            continue
        if kind == "extra_forbidden":
            sentences[f"unknown key {path!r}{nearest(path, known)}"] = []
            continue
        allowed = error["msg"].removeprefix("Value error, ")
        if kind == "literal_error":
            words = error["ctx"]["expected"]
            allowed = f"expected {words}{nearest(str(error['input']), words.split(QUOTE)[1::2])}"
        allowed = WANTED.get(kind, allowed).replace("Input should be", "expected a value")
        sentences.setdefault(f"{path} = {error['input']!r}: ", []).append(f"{allowed[0].lower()}{allowed[1:]}")
    return "; ".join(what + ", or ".join(dict.fromkeys(why)) for what, why in sentences.items())


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """All dotted keys that can be set."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


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
