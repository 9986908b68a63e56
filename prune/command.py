"""The command that makes a run again."""

import dataclasses
import shlex
from pathlib import Path

from .config import BUNDLED, ELSEWHERE, Config


def command_line(config: Config, *, short: bool = False) -> str:
    """Return a run's command, for a shell, from its resolved settings; texts of the bundled model are its defaults.

    `short` names files and folders without the folders above them, for readers elsewhere.

    >>> command_line(Config(model="OWNER/NAME", sparsity=0.7, special_tokens=False))
    'farms prune --model OWNER/NAME --sparsity 0.7 --no-special-tokens'
    """
    words = ["farms", "prune"]
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if value == field.default or field.name in ELSEWHERE or str(value).startswith(str(BUNDLED)):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            is_file = short and isinstance(value, str) and Path(value).expanduser().exists()
            words += [f"--{flag}", Path(value).name if is_file else str(value)]
    return shlex.join(words)
