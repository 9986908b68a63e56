"""Completion of `farms` in bash and zsh: a script that knows every command and its options."""

import argparse
import contextlib
import io
import re
import sys

from farms_jax.programs.commands import COMMANDS, run_command

_BASH = """\
_farms() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    case $COMP_CWORD:${{COMP_WORDS[1]}} in
        1:*) words={commands!r} ;;
{cases}
    esac
    [[ $COMP_CWORD == 1 || $word == -* ]] && COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _farms farms
"""
_ZSH = "autoload -U bashcompinit && bashcompinit\n"


def main(name: str) -> None:
    """Print the script; `name` is what the program is called in its messages."""
    parser = argparse.ArgumentParser(
        prog=name,
        description="Print a script that completes the commands of farms, the options of those whose packages are "
        "installed, and file names. Written into a file, it is read by `source FILE`.",
    )
    parser.add_argument("shell", choices=["bash", "zsh"])
    shell = parser.parse_args().shell
    cases = [f"        *:{command}) words={' '.join(_options(command))!r} ;;" for command in COMMANDS]
    script = _BASH.format(commands=" ".join(COMMANDS), cases="\n".join(cases))
    sys.stdout.write(_ZSH + script if shell == "zsh" else script)


def _options(command: str) -> list[str]:
    """Return the options of a command as its `--help` has them; none where its packages are not installed."""
    sys.argv = [f"farms {command}", "--help"]
    told, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        run_command(command)
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", told.getvalue())))
