"""Models of the hub: what exists there is asked first, and only what will be read is downloaded."""

import contextlib
import glob
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

from farms_jax.errors import InputError, listed
from farms_jax.weights.folders import read_weight_map, safetensors_files

_SMALL = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "spiece.model")  # config, tokenizer, indices
_SAFETENSORS = ("model.safetensors", "model-*.safetensors")
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def download_tokenizer(repository: str, revision: str | None, flag: str = "--tokenizer") -> Path:
    """Return the folder with all but the weights of a repository; one that is in the hub's cache needs no connection.

    Raises:
        InputError: It cannot be downloaded; the message says why, and begins with the `flag` and the name.
    """
    return _snapshot(repository, revision, _SMALL, flag)


def download_model(repository: str, revision: str | None) -> Path:
    """Return the folder of a model: config, tokenizer, and the weights that a folder would be opened with.

    Those are safetensors, in one file or the shards of an index, and files of Torch only where there are none. Copies
    in other formats or folders stay where they are.

    Raises:
        InputError: It cannot be downloaded, or has no weights that are read.
    """
    folder = download_tokenizer(repository, revision, "--model")
    names = _listed(repository, revision)
    if names is None:  # no connection: what is in the cache; or a mirror that lists nothing
        for patterns in (_SAFETENSORS, (_PICKLE, "pytorch_model-*.bin")):
            found = _weights_in(folder, (path.name for path in folder.iterdir()))
            if not found or not all((folder / name).is_file() for name in found):
                folder = _snapshot(repository, revision, patterns, "--model")
        return folder
    wanted = _weights_in(folder, names)
    if not wanted:
        raise InputError(
            f"--model {repository}: no weights in it that are read (model.safetensors, its shards, or {_PICKLE}), but "
            f"{listed(names, 8, ', ')}; give a repository, or a folder, with them"
        )
    return _snapshot(repository, revision, [glob.escape(name) for name in wanted], "--model")


def _weights_in(folder: Path, filenames: Iterable[str]) -> list[str]:
    """Return the files that hold the weights, of those in a repository; indices are in its `folder` already."""
    names = sorted(name for name in filenames if "/" not in name)
    if found := safetensors_files(folder, names)[1]:
        return found
    if _PICKLE in names:
        return [_PICKLE]
    return sorted(set(read_weight_map(folder / _PICKLE_INDEX).values())) if _PICKLE_INDEX in names else []


def _listed(repository: str, revision: str | None) -> list[str] | None:
    """Return the names of a repository's files; `None` where the hub does not answer."""
    import huggingface_hub  # noqa: PLC0415

    try:
        return huggingface_hub.list_repo_files(repository, revision=revision)
    except Exception:  # of several network libraries; what is wrong with the repository, the download has said
        return None


def _snapshot(repository: str, revision: str | None, patterns: Sequence[str], flag: str) -> Path:
    import huggingface_hub  # noqa: PLC0415

    with _faults(f"{flag} {repository}"):
        # Patterns match below folders too, where checkpoints of the training and other formats are.
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
    return Path(found)


@contextlib.contextmanager
def _faults(where: str) -> Generator[None]:
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
        return
    except errors.GatedRepoError as error:
        fault, remedy = error, "accept its licence on the hub, then run `hf auth login`"
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        fault, remedy = error, "check the name; for a private model run `hf auth login` first"
    except Exception as error:  # of several network libraries
        fault, remedy = error, "check the connection, or give a path that is on this machine"
    reason = (str(fault) or type(fault).__name__).splitlines()[0]
    raise InputError(f"{where}: no folder here, and cannot be downloaded ({reason}); {remedy}") from fault
