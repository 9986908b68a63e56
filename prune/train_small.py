"""Train the small LLaMA that ships with the project, or one like it, on plain text.

python -m prune.train_small --text wiki.valid.tokens wiki.test.raw --out prune/bundled

Writes a Hugging Face folder (config, float16 weights, byte-level BPE tokenizer), `heldout.txt` that nothing was
trained on or chosen by, `calibration.txt` that is part of the training text, and `training.json` with all that the
weights depend on. Stopped or killed, the same command goes on.
"""

import contextlib
import dataclasses
import json
import shutil
import time
import zipfile
import zlib
from collections.abc import Generator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from safetensors.numpy import save
from tokenizers import Tokenizer
from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.exits import reported, run_and_end
from farms_jax.programs.files import atomic, sha256, write_json, write_text
from farms_jax.programs.locking import locked

from .models import Network, make_network
from .small.model import (
    Params,
    blocks_of,
    evaluation_loss,
    from_tensors,
    initial_params,
    llama_config,
    losses,
    to_tensors,
)
from .small.text import END, Corpus, encode, read_corpus, train_tokenizer

CHECKPOINT = "unfinished.npz"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; the defaults made the model that ships."""

    text: tuple[Path, ...]  # files in order; the texts not trained on are cut from the end of the last
    out: Path  # folder to write
    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 320
    blocks: int = 8
    heads: int = 6
    kv_heads: int = 2
    length: int = 256  # tokens of a sequence, and the longest that the model will know
    batch: int = 4  # sequences of a step
    steps: int = 3500
    learning_rate: float = 3e-3  # highest
    warmup: int = 100  # steps to the highest rate; a cosine then ends at a tenth of it
    weight_decay: float = 0.1  # of all but the norms
    seed: int = 0
    heldout_bytes: int = 60_000  # at least; whole articles where the text has any
    validation_bytes: int = 60_000  # likewise: not trained on, decides which step's weights are kept
    calibration_bytes: int = 120_000  # likewise, of the training text
    evaluate_every: int = 250  # steps between validations, each of which also writes the checkpoint


class TrainState(NamedTuple):
    """Everything that the next step depends on, and the best weights so far. Arrays only."""

    params: Params
    opt_state: Any
    best: Params
    best_loss: Array  # shape=(), dtype=float32
    best_step: Array  # shape=(), dtype=int32


class Progress(NamedTuple):
    """Where a training stands: JSON-ready, kept in the checkpoint."""

    step: int = 0
    seconds: float = 0.0
    history: tuple[dict[str, float], ...] = ()


def train(config: Config, until: int | None = None) -> dict[str, Any] | None:
    """Train a model, or go on with one, and write its folder.

    Args:
        config: settings.
        until: stop after this step, as if killed; None trains to the end.

    Returns:
        The content of `training.json`; None where `until` stopped it.

    Raises:
        InputError: a setting or a text cannot be used, the folder has a checkpoint of other settings or texts, or
            another process is training there.
    """
    for name in ("steps", "batch", "length", "evaluate_every"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    corpus = read_corpus(config.text, config.heldout_bytes, config.validation_bytes, config.calibration_bytes)
    tokenizer = train_tokenizer(corpus.training, config.vocab_size)
    tokens = {name: encode(tokenizer, getattr(corpus, name)) for name in ("training", "validation", "heldout")}
    for name, ids in tokens.items():
        if ids.size <= config.length:
            raise InputError(f"--text: {ids.size} tokens of {name} text are no more than --length; give more text")
    sizes = ("hidden_size", "intermediate_size", "blocks", "heads", "kv_heads", "length")
    shape = {name: getattr(config, name) for name in sizes}
    model_config = llama_config(vocab_size=tokenizer.get_vocab_size(), **shape)
    network = make_network(model_config)
    facts = _facts(config)
    with _alone(config.out):
        state, progress = _restore(config.out / CHECKPOINT, _initial_state(network, config), facts)
        state, progress = _run(network, config, tokens, state, progress, until)
        if progress.step < config.steps:
            return None
        stored = {name: np.asarray(array, np.float16) for name, array in to_tensors(network, state.best).items()}
        record = facts | _results(network, config, stored, tokens, state, progress)
        _write_folder(config, model_config, corpus, tokenizer, stored, record)
        (config.out / CHECKPOINT).unlink(missing_ok=True)
    return record


@contextlib.contextmanager
def _alone(out: Path) -> Generator[None]:
    """Keep the folder for this process. The lock is in a folder of its own, gone at the end: the model is all there."""
    folder = out / "unfinished"
    with locked(folder):
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def draw(ids: np.ndarray, config: Config, step: int) -> np.ndarray:
    """Sequences of a step, from random places: a function of seed and step alone, so a resumed run draws the same.

    Args:
        ids: shape (N,), int32.
        config: settings.
        step: counted from 1.

    Returns:
        Shape (batch, length + 1), int32.
    """
    starts = np.random.default_rng((config.seed, step)).integers(0, ids.size - config.length, config.batch)
    return ids[starts[:, None] + np.arange(config.length + 1)]


def _facts(config: Config) -> dict[str, Any]:
    """What the weights depend on, JSON-ready: all settings but where texts and results lie."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in {"text", "out"}}
    return {"settings": settings, "text_sha256": {path.name: sha256(path) for path in config.text}}


def _initial_state(network: Network, config: Config) -> TrainState:
    params = initial_params(network, config.seed)
    return TrainState(params, _optimizer(config).init(params), params, jnp.float32(jnp.inf), jnp.int32(0))


def _optimizer(config: Config) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(config.warmup, config.steps - 1), config.steps, config.learning_rate / 10
    )

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)

    adamw = optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def _run(
    network: Network,
    config: Config,
    tokens: dict[str, np.ndarray],
    state: TrainState,
    progress: Progress,
    until: int | None,
) -> tuple[TrainState, Progress]:
    """Takes the steps that are left, and a checkpoint at every validation."""
    optimizer = _optimizer(config)

    @jax.jit
    def step(params: Params, opt_state: Any, ids: Array) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(lambda params: losses(network, params, ids).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    validation = blocks_of(tokens["validation"], config.length)
    stop = config.steps if until is None else min(until, config.steps)
    recent, clock = [], time.monotonic() - progress.seconds
    with tqdm(total=config.steps, initial=progress.step, desc="training", unit="step") as bar:
        for done in range(progress.step + 1, stop + 1):
            params, opt_state, loss = step(state.params, state.opt_state, draw(tokens["training"], config, done))
            state = state._replace(params=params, opt_state=opt_state)
            recent.append(float(loss))
            if not np.isfinite(recent[-1]):
                raise InputError(f"the loss is {recent[-1]} at step {done}; give a lower --learning-rate")
            bar.update()
            bar.set_postfix(loss=f"{recent[-1]:.3f}", best=f"{float(state.best_loss):.3f}", refresh=False)
            if done % config.evaluate_every and done != config.steps:
                continue
            measured = evaluation_loss(network, state.params, validation)
            if measured < state.best_loss:
                state = state._replace(best=state.params, best_loss=measured, best_step=jnp.int32(done))
            line = {"step": done, "training": float(np.mean(recent)), "validation": float(measured)}
            progress = Progress(done, time.monotonic() - clock, (*progress.history, line))
            recent.clear()
            _save(config.out / CHECKPOINT, state, progress, _facts(config))
    return state, progress


def _save(path: Path, state: TrainState, progress: Progress, facts: dict[str, Any]) -> None:
    leaves = {f"leaf{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(state))}
    about = json.dumps({"facts": facts, "progress": progress._asdict()})
    with atomic(path) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, about=np.array(about), **leaves)


def _restore(path: Path, state: TrainState, facts: dict[str, Any]) -> tuple[TrainState, Progress]:
    if not path.exists():
        return state, Progress()
    leaves, tree = jax.tree.flatten(state)
    try:
        with zipfile.ZipFile(path) as archive:
            if (array := archive.testzip()) is not None:  # NumPy alone would not see damage to an array's shape
                raise ValueError(f"{array} does not have its checksum")
        with np.load(path, allow_pickle=False) as file:
            about, arrays = json.loads(str(file["about"])), [file[f"leaf{number}"] for number in range(len(leaves))]
    # What a damaged zip archive comes to: RuntimeError where a flag of it says that it is encrypted.
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}); remove it to start anew") from error
    if about["facts"] != facts:
        raise InputError(f"{path} is of a training with other settings or texts; give those, or remove it")
    restored = jax.tree.unflatten(tree, list(map(jnp.asarray, arrays)))
    return restored, Progress(**{**about["progress"], "history": tuple(about["progress"]["history"])})


def _results(
    network: Network,
    config: Config,
    stored: dict[str, np.ndarray],
    tokens: dict[str, np.ndarray],
    state: TrainState,
    progress: Progress,
) -> dict[str, Any]:
    """What came out; the losses are of the weights as stored."""
    params = from_tensors(network, {name: array.astype(np.float32) for name, array in stored.items()})
    apart = {name: blocks_of(tokens[name], config.length) for name in ("validation", "heldout")}
    return {
        "parameters": sum(array.size for array in stored.values()),
        "tokens": {name: ids.size for name, ids in tokens.items()},
        "tokens_seen": config.steps * config.batch * config.length,
        "kept_step": int(state.best_step),
        "loss": {name: float(evaluation_loss(network, params, ids)) for name, ids in apart.items()},
        "history": progress.history,
        "seconds": round(progress.seconds),
        "versions": {name: metadata.version(name) for name in ("jax", "optax", "tokenizers")},
    }


def _write_folder(
    config: Config,
    model_config: dict[str, Any],
    corpus: Corpus,
    tokenizer: Tokenizer,
    stored: dict[str, np.ndarray],
    record: dict[str, Any],
) -> None:
    """The weights last: a folder with weights is a whole one."""
    write_json(config.out / "config.json", model_config)
    write_text(config.out / "tokenizer.json", tokenizer.to_str())
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": config.length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(config.out / "tokenizer_config.json", tokenizer_config)
    write_text(config.out / "heldout.txt", corpus.heldout)
    write_text(config.out / "calibration.txt", corpus.calibration)
    write_json(config.out / "training.json", record)
    with atomic(config.out / "model.safetensors") as part:
        part.write_bytes(save(stored, metadata={"format": "pt"}))


def main() -> None:
    """Run the program; a mistake in settings or texts is one line on stderr, and exit status 2."""
    config = tyro.cli(Config, prog="prune.train_small", description=__doc__)
    with reported("prune.train_small", "; the same command goes on"):
        record = train(config)
        assert record is not None
        measured = ", ".join(f"{name} {loss:.3f}" for name, loss in record["loss"].items())
        print(f"{record['parameters']:,} parameters of step {record['kept_step']}; nats per token: {measured}")
        print(f"written to {config.out}")


if __name__ == "__main__":
    run_and_end(main)
