"""The file `config.json` of a run directory: written from a dataclass of settings, and read back into one."""

import csv
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from farms_jax.errors import InputError, one_line
from farms_jax.programs.files import write_json

# What reading JSON or CSV of another shape raises.
PARSE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, csv.Error)

T = TypeVar("T")


def write_config(run: Path, config: Any, facts: Mapping[str, Any]) -> None:
    """Write settings, a dataclass of what JSON knows, paths and tuples; and facts, such as data and versions."""
    write_json(run / "config.json", {"config": dataclasses.asdict(config), **facts})


def read_config(run: Path, kind: type[T]) -> tuple[T, dict[str, Any]]:
    """Return the settings, of the dataclass `kind`, and the facts of a run directory.

    Raises:
        InputError: there is no such file, or it is damaged or of another version, with other fields than `kind`.
    """
    path = run / "config.json"
    if not path.is_file():
        raise InputError(f"--resume {run}: there is no {path.name} in it; give the directory that a run printed")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return _restored(facts.pop("config"), kind), facts
    except PARSE_ERRORS as error:
        why = one_line(error)
        raise InputError(f"--resume {run}: {path} is damaged or of another version ({why}); start anew") from error


def _restored(value: Any, kind: Any) -> Any:
    """Turn a value of JSON into what its annotation says: dataclasses, tuples and paths, nested too."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {field.name for field in dataclasses.fields(kind) if field.init}
        if different := sorted(fields ^ set(value)):
            raise TypeError(f"fields {', '.join(different)}")
        return typing.cast(Any, kind)(**{name: _restored(value[name], hints[name]) for name in fields})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {typing.Union, types.UnionType}:
        if value is None and types.NoneType in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not types.NoneType]
        return _restored(value, kinds[0]) if len(kinds) == 1 else value
    if origin is tuple:
        parts = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        return tuple(_restored(part, part_kind) for part, part_kind in zip(value, parts, strict=True))
    return Path(value) if kind is Path else value
