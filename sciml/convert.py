"""Convert a DPOT checkpoint of Torch to safetensors: `python -m sciml.convert model_Ti.pth [OUT.safetensors]`.

Only tensors are read, and code in a file is never run. Torch is needed: `pip install "farms-jax[torch]"`.
"""

from farms_jax.programs.commands import launch

if __name__ == "__main__":  # above the imports, of which one may be missing
    launch(f"{__package__}.convert", extra="sciml")

import argparse
from pathlib import Path

from farms_jax.errors import InputError
from farms_jax.programs.exits import reported

from . import checkpoints


def convert(source: Path, target: Path) -> str:
    """Convert one checkpoint, checked tensor by tensor; return a line that says what was written."""
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: the file to write must end in .safetensors")
    if target.resolve() == source.resolve():
        raise InputError(f"{target}: is the checkpoint itself; give another name for the file to write")
    state = checkpoints.read(source)
    config = checkpoints.infer_config(state)
    checkpoints.save(target, checkpoints.from_torch(state, config), config)
    named = checkpoints.fitting_name(state)
    fits = f"fits the model {named}" if named else f"fits none of the named models: {config}"
    return f"{target}: {sum(array.size for array in state.values()):,} parameters; {fits}"


def main(name: str = "sciml.convert") -> None:
    """Run the program, called `name` in its messages; a mistake is one line on stderr, and exit status 2."""
    parser = argparse.ArgumentParser(prog=name, description="Convert a DPOT checkpoint to safetensors.")
    parser.add_argument("source", type=Path, help="checkpoint: .pth or .pt (needs Torch), or .safetensors")
    parser.add_argument("target", type=Path, nargs="?", help="file to write; default: the source's name, .safetensors")
    given = parser.parse_args()
    with reported(name):
        print(convert(given.source, given.target or given.source.with_suffix(".safetensors")))
