"""Train the small LLaMA in `prune/bundled`, or one like it, on plain text.

python -m experiments.small_llama --text wiki.valid.tokens wiki.test.raw --out prune/bundled

Writes a Hugging Face folder (config, float16 weights, byte-level BPE tokenizer), `heldout.txt` that nothing was
trained on or chosen by, `calibration.txt` that is part of the training text, and `training.json` with all that the
weights depend on.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro
from jax import Array
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.environment import installed_versions
from farms_jax.programs.exits import reported
from farms_jax.programs.files import sha256, write_json, write_text
from prune.models import Network, make_network

from ._corpus import END, Corpus, encode, read_corpus, train_tokenizer
from ._stacked_llama import (
    Params,
    consecutive,
    evaluation_loss,
    from_tensors,
    initial_params,
    llama_config,
    losses,
    to_tensors,
)


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
    evaluate_every: int = 250  # steps between validations


class Trained(NamedTuple):
    """The weights of the lowest validation loss, and how training went."""

    params: Params
    step: int
    history: list[dict[str, float]]


def train(config: Config) -> dict[str, Any]:
    """Train a model, and write its folder.

    Args:
        config: settings.

    Returns:
        The content of `training.json`.

    Raises:
        InputError: a text is too short, or the loss is not finite.
    """
    start = time.monotonic()
    corpus = read_corpus(
        config.text,
        heldout=config.heldout_bytes,
        validation=config.validation_bytes,
        calibration=config.calibration_bytes,
    )
    tokenizer = train_tokenizer(corpus.training, config.vocab_size)
    tokens = {name: encode(tokenizer, getattr(corpus, name)) for name in ("training", "validation", "heldout")}
    for name, ids in tokens.items():
        if ids.size <= config.length:
            raise InputError(f"--text: {ids.size} tokens of {name} text are no more than --length; give more text")
    sizes = ("hidden_size", "intermediate_size", "blocks", "heads", "kv_heads", "length")
    model_config = llama_config(
        vocab_size=tokenizer.get_vocab_size(), **{name: getattr(config, name) for name in sizes}
    )
    network = make_network(model_config)
    validation = consecutive(tokens["validation"], config.length)
    trained = fit(network, _optimizer(config), config, tokens["training"], validation)
    stored = {name: np.asarray(array, np.float16) for name, array in to_tensors(network, trained.params).items()}
    record = _record(network, config, stored, tokens, trained) | {"seconds": round(time.monotonic() - start)}
    _write_folder(config, model_config, corpus, tokenizer, stored, record)
    return record


def draw(ids: np.ndarray, config: Config, step: int) -> np.ndarray:
    """Draw the sequences of a step from random places, a function of seed and step alone.

    Args:
        ids: training tokens (N,), int32.
        config: settings.
        step: counted from 1.

    Returns:
        Shape (batch, length + 1), int32.
    """
    starts = np.random.default_rng((config.seed, step)).integers(0, ids.size - config.length, config.batch)
    return ids[starts[:, None] + np.arange(config.length + 1)]


def rate_of(config: Config) -> optax.Schedule:
    """Return the learning rate by step: a warm-up, then a cosine."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(config.warmup, config.steps - 1), config.steps, config.learning_rate / 10
    )


def decayed(params: Any) -> Any:
    """Tell for each leaf whether its weights decay: all but the norms' do."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)


def _optimizer(config: Config) -> optax.GradientTransformation:
    adamw = optax.adamw(rate_of(config), b2=0.95, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def fit(
    network: Network,
    optimizer: optax.GradientTransformation,
    config: Config,
    training: np.ndarray,
    validation: np.ndarray,
) -> Trained:
    """Train on random sequences of a text.

    Args:
        network: the model.
        optimizer: its optimizer.
        config: settings.
        training: tokens to draw from (N,), int32.
        validation: sequences (M, T), int32.

    Returns:
        The weights of the lowest validation loss.

    Raises:
        InputError: the loss is not finite.
    """

    @jax.jit
    def step(params: Params, opt_state: Any, ids: Array) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(lambda params: losses(network, params, ids).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = initial_params(network, config.seed)
    opt_state = optimizer.init(params)
    best, best_loss, recent = Trained(params, 0, []), np.inf, []
    with tqdm(range(1, config.steps + 1), desc="training", unit="step") as bar:
        for number in bar:
            params, opt_state, loss = step(params, opt_state, draw(training, config, number))
            recent.append(float(loss))
            if not np.isfinite(recent[-1]):
                raise InputError(f"the loss is {recent[-1]} at step {number}; give a lower --learning-rate")
            if number % config.evaluate_every and number != config.steps:
                continue
            measured = float(evaluation_loss(network, params, validation))
            line = {"step": number, "training": float(np.mean(recent)), "validation": measured}
            best.history.append(line)
            bar.set_postfix(line)
            recent.clear()
            if measured < best_loss:
                best, best_loss = Trained(params, number, best.history), measured
    return best


def _record(
    network: Network, config: Config, stored: dict[str, np.ndarray], tokens: dict[str, np.ndarray], trained: Trained
) -> dict[str, Any]:
    """Return what the weights depend on and what came out; the losses are of the weights as stored."""
    params = from_tensors(network, {name: array.astype(np.float32) for name, array in stored.items()})
    apart = {name: consecutive(tokens[name], config.length) for name in ("validation", "heldout")}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in {"text", "out"}}
    return {
        "settings": settings,
        "text_sha256": {path.name: sha256(path) for path in config.text},
        "parameters": sum(array.size for array in stored.values()),
        "tokens": {name: ids.size for name, ids in tokens.items()},
        "tokens_seen": config.steps * config.batch * config.length,
        "kept_step": trained.step,
        "loss": {name: float(evaluation_loss(network, params, ids)) for name, ids in apart.items()},
        "history": trained.history,
        "versions": installed_versions("jax", "optax", "tokenizers"),
    }


def _write_folder(
    config: Config,
    model_config: dict[str, Any],
    corpus: Corpus,
    tokenizer: Tokenizer,
    stored: dict[str, np.ndarray],
    record: dict[str, Any],
) -> None:
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": config.length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(config.out / "config.json", model_config)
    write_text(config.out / "tokenizer.json", tokenizer.to_str())
    write_json(config.out / "tokenizer_config.json", tokenizer_config)
    write_text(config.out / "heldout.txt", corpus.heldout)
    write_text(config.out / "calibration.txt", corpus.calibration)
    write_json(config.out / "training.json", record)
    save_file(stored, config.out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Run the program."""
    config = tyro.cli(Config, prog="experiments.small_llama", description=__doc__)
    with reported("experiments.small_llama"):
        record = train(config)
        measured = ", ".join(f"{name} {loss:.3f}" for name, loss in record["loss"].items())
        print(f"{record['parameters']:,} parameters of step {record['kept_step']}; nats per token: {measured}")
        print(f"written to {config.out}")


if __name__ == "__main__":
    main()
