"""Config files, their presets and the overrides of single fields on the command line.

A config file is Python with `get_config(preset: str = "tiny") -> ConfigDict`; for a preset that it
does not have it raises `jaxconv.errors.Refused`, or it names them all in a module-level `PRESETS`.
Parsing is that of `ml_collections.config_flags`; what is added here are one-line refusals.
"""

import difflib
import inspect
import math
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxconv.errors import Refused

_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<field>[^=]+)(?P<value>=.*)?", re.DOTALL)
_CLONE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Loaded:
    """A config as its file gives it, with the names that the default workdir is made of."""

    config: ConfigDict
    name: str
    preset: str


def load(argument: str) -> Loaded:
    """Loads `FILE.py` or `FILE.py:PRESET`; relative to here, else to the root of the clone.

    Raises:
        Refused: no such file, no such preset, or a file that is no config.
    """
    match = re.fullmatch(r"(?P<file>.*?\.py)(:(?P<preset>.*))?", argument, re.DOTALL)
    if match is None:
        raise Refused(
            f"--config={argument}: must be a Python file, with a preset if wanted: "
            "configs/NAME.py or configs/NAME.py:PRESET"
        )
    path = _find(match["file"])
    module = runpy.run_path(str(path))
    get_config = module.get("get_config")
    if not callable(get_config):
        raise Refused(f"--config={argument}: {path} must define get_config(preset)")
    preset = match["preset"]
    if preset is None:
        preset = next(iter(inspect.signature(get_config).parameters.values())).default
    presets = module.get("PRESETS")
    if presets is not None and preset not in presets:
        raise Refused(f"--config={argument}: no preset {preset!r}; it may be {_listed(presets)}")
    config = get_config(preset)
    if not isinstance(config, ConfigDict):
        raise Refused(
            f"--config={argument}: get_config returned a {type(config).__name__}; "
            "it must be an ml_collections.ConfigDict"
        )
    if not isinstance(config.get("recipe"), str):
        raise Refused(f"--config={argument}: config.recipe is missing; it must name a recipe")
    config.lock()
    return Loaded(config, path.stem, preset)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts `argv` into overrides (`--config.field=value`, two words made one) and the rest."""
    overrides: list[str] = []
    rest: list[str] = []
    words = iter(range(len(argv)))
    for i in words:
        match = _OVERRIDE.fullmatch(argv[i])
        if match is None:
            rest.append(argv[i])
            continue
        following = argv[i + 1] if i + 1 < len(argv) else None
        if match["value"] is None and following is not None and not following.startswith("--"):
            overrides.append(f"{argv[i]}={following}")
            next(words)
        else:
            overrides.append(argv[i])
    return overrides, rest


def override(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets fields of `config` in place.

    Raises:
        Refused: an unknown field (with the nearest one), a group, or a value of another type.
    """
    for argument in overrides:
        match = _OVERRIDE.fullmatch(argument)
        assert match is not None
        field = match["field"]
        current = _current(config, field)
        if isinstance(current, ConfigDict):
            raise Refused(f"config.{field} is a group; set one of its fields: {_listed(current)}")
        if match["value"] is None and not isinstance(current, bool):
            raise Refused(f"config.{field} has no value; it must be {_kind(config, field)}")
        if match["value"] is None:
            argument = f"--config.{field}={'false' if match['no'] else 'true'}"
        _set(config, field, argument)


def _set(config: ConfigDict, field: str, argument: str) -> None:
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=["", argument]
        )
        values(["", argument])
    except (flags.Error, TypeError, ValueError):
        value = argument.split("=", 1)[1]
        raise Refused(
            f"config.{field}={value!r}: must be {_kind(config, field)}, "
            f"such as {config_value(config, field)!r}"
        ) from None


def config_value(config: ConfigDict, field: str) -> Any:
    """The value at the dotted path `field`."""
    for name in field.split("."):
        config = config[name]
    return config


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON-able values; tuples become lists."""

    def plain(value: Any, field: str) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v, f"{field}.{k}") for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v, f"{field}[{i}]") for i, v in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            raise Refused(f"{field}={value}; it must be finite")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise Refused(
            f"{field} is a {type(value).__name__}; "
            "it must be a number, a string, a bool, None, or a list or group of these"
        )

    return plain(config.to_dict(), "config")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One entry a field that differs: `config.ppo.lr: 0.001 -> 0.01`."""
    before, after = _flat(old, "config"), _flat(new, "config")
    absent = object()
    return [
        f"{field}: {_shown(before.get(field, absent), absent)} -> "
        f"{_shown(after.get(field, absent), absent)}"
        for field in sorted({**before, **after})
        if before.get(field, absent) != after.get(field, absent)
    ]


def _find(file: str) -> Path:
    for path in (Path(file).expanduser(), _CLONE / file):
        if path.is_file():
            return path
    folder = _CLONE / "configs"
    near = sorted(str(p.relative_to(_CLONE)) for p in folder.glob("*.py"))
    hint = f"; it may be {_listed(near)} or another path" if near else ""
    raise Refused(f"--config={file}: no such file{hint}")


def _current(config: ConfigDict, field: str) -> Any:
    """The present value of a field; refuses one that is not there and names the nearest."""
    value: Any = config
    path = "config"
    for name in field.split("."):
        if not isinstance(value, ConfigDict) or name not in value:
            raise Refused(f"config.{field}: no such field; {_hint(config, path, value, name)}")
        value = value[name]
        path = f"{path}.{name}"
    return value


def _hint(config: ConfigDict, path: str, holder: Any, name: str) -> str:
    if not isinstance(holder, ConfigDict):
        return f"{path} is not a group"
    near = difflib.get_close_matches(name, list(holder), n=1)
    if near:
        return f"did you mean {path}.{near[0]}?"
    # Right name, wrong group: the last parts of all fields.
    elsewhere = [known for known in _flat(config.to_dict(), "config") if known.endswith("." + name)]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"{path} has {_listed(holder)}"


def _kind(config: ConfigDict, field: str) -> str:
    *group, name = field.split(".")
    holder = config_value(config, ".".join(group)) if group else config
    kind = holder.get_type(name)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, f"a {kind.__name__}")


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}.{name}")
        else:
            flat[f"{prefix}.{name}"] = value
    return flat


def _shown(value: Any, absent: object) -> str:
    return "absent" if value is absent else repr(value)


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names)
