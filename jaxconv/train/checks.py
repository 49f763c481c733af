"""Refusals of config values: one line that names the field, its value and what it may be."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxconv.errors import Refused
from jaxconv.train.config import config_value


def at_least(config, fields: Mapping[str, float]) -> None:
    """Refuses a field below its least value; of a tuple every entry counts."""
    for field, least in fields.items():
        value = config_value(config, field)
        if min(value if isinstance(value, tuple | list) else (value,), default=least - 1) < least:
            raise Refused(f"config.{field}={value}; it must be at least {least}")


def positive(config, fields: Iterable[str]) -> None:
    """Refuses a field that is not above 0."""
    for field in fields:
        if not (value := config_value(config, field)) > 0:
            raise Refused(f"config.{field}={value}; it must be above 0")


def fractions(config, fields: Iterable[str]) -> None:
    """Refuses a field outside 0 to 1."""
    for field in fields:
        if not 0 <= (value := config_value(config, field)) <= 1:
            raise Refused(f"config.{field}={value}; it must be from 0 to 1")


def below_one(config, fields: Iterable[str]) -> None:
    """Refuses a field outside 0 to 1, and 1 itself."""
    for field in fields:
        if not 0 <= (value := config_value(config, field)) < 1:
            raise Refused(f"config.{field}={value}; it must be at least 0 and below 1")


def one_of(config, fields: Mapping[str, Iterable[str]]) -> None:
    """Refuses a field that is none of its names."""
    for field, known in fields.items():
        value, known = config_value(config, field), tuple(known)
        if value not in known:
            raise Refused(f"config.{field}={value!r}; it may be {', '.join(known)}")


def naming(prefix: str, make: Callable[[], Any]) -> Any:
    """What `make` returns; its refusals name the part of the config that they are about."""
    try:
        return make()
    except Refused as error:
        raise Refused(f"{prefix}{error}") from None
