r"""Per-layer rates and decays on a small language model: TempBalance, LLR, AlphaDecay, HTMuon, with FARMS and without.

    python -m experiments.layerwise_transforms --text wiki.valid.tokens wiki.test.raw

Each method trains the same LLaMA, blocks stacked, from the same weights on the same batches, at every rate of
`--rates`; what counts is the validation loss at the method's own best rate, since factors above one are a higher rate
too. Whole matrices are the measure of the methods' papers, windows that of FARMS.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import farms_jax
from experiments._common import BASELINE, FARMS, Result, figure, label, positive, run
from experiments._corpus import encode, read_corpus, train_tokenizer
from experiments._stacked_llama import consecutive, evaluation_loss, llama_config
from experiments.small_llama import Config, decayed, fit, rate_of
from farms_jax import AxisRules
from prune.models import make_network

RULES = AxisRules({r"ends/.*embed.*": None}, stack={r"blocks/.*": 0}, default=farms_jax.TORCH_AXES)
_EMBEDDED = dataclasses.replace(RULES, axes={})  # embeddings, which are the head too, are layers
_DECAY_EVERY, _RATES_EVERY = 50, 50


class Trial(NamedTuple):
    """One training."""

    method: str
    rate: float
    seed: int


def main() -> None:
    """Run the experiment."""
    run("layerwise_transforms", __doc__, options, experiment)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this experiment."""
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="plain text to train on, UTF-8")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 9e-3], help="of AdamW; Muon's are 5x")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--hidden-size", type=positive, default=128, help="features between blocks")
    parser.add_argument("--blocks", type=positive, default=4)
    parser.add_argument("--vocab-size", type=positive, default=1024)


def experiment(args: argparse.Namespace) -> Result:
    """Train by every method at every rate from every seed.

    Args:
        args: the options.

    Returns:
        Rows: one per training. Summary: of each method its best rate, the mean loss there, in nats per token, the
        difference from AdamW's, and the range over the seeds of that difference.
    """
    corpus = read_corpus(args.text, heldout=60_000, validation=60_000, calibration=60_000)
    tokenizer = train_tokenizer(corpus.training, args.vocab_size)
    training, validation = encode(tokenizer, corpus.training), encode(tokenizer, corpus.validation)
    trials = [Trial(*each) for each in _product(args.methods, args.rates, args.seeds)]
    bar = tqdm(trials, desc="layerwise_transforms", unit="training")
    rows = [{**trial._asdict(), "loss": loss_of(trial, args, training, validation)} for trial in bar]
    summary = summarise(rows)
    return Result(rows, summary, {}, draw(rows))


def _product(methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> list[tuple[str, float, int]]:
    return [(method, rate, seed) for method in methods for rate in rates for seed in seeds]


def loss_of(trial: Trial, args: argparse.Namespace, training: np.ndarray, validation: np.ndarray) -> float:
    """Train, and return the lowest validation loss in nats per token."""
    muon = 5.0 if "Muon" in trial.method else 1.0
    config = Config(
        text=(),
        out=Path(),
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        blocks=args.blocks,
        heads=4,
        kv_heads=2,
        length=128,
        batch=4,
        steps=args.steps,
        learning_rate=muon * trial.rate,
        seed=trial.seed,
        evaluate_every=max(1, args.steps // 6),
    )
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "blocks", "heads", "kv_heads", "length")
    network = make_network(llama_config(**{name: getattr(config, name) for name in sizes}))
    sequences = consecutive(validation, config.length)
    trained = fit(network, METHODS[trial.method](config), config, training, sequences)
    return float(evaluation_loss(network, trained.params, sequences))


def _chain(config: Config, *transforms: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), *transforms)


def _adamw(config: Config) -> optax.GradientTransformation:
    return optax.adamw(rate_of(config), b2=0.95, weight_decay=config.weight_decay, mask=decayed)


def _plain(config: Config) -> optax.GradientTransformation:
    return _chain(config, _adamw(config))


def _tempbalance(config: Config, **settings: Any) -> optax.GradientTransformation:
    rates = farms_jax.tempbalance(refresh_every=_RATES_EVERY, axes=RULES, low=0.6, high=1.4, **settings)
    return _chain(config, _adamw(config), rates)


def _llr(config: Config, **settings: Any) -> optax.GradientTransformation:
    every = max(1, config.steps // 100)  # within the first fifth, where the factors are measured
    rates = farms_jax.llr(
        config.steps, r"ends/.*embed.*", refresh_every=every, ramp=max(1, every // 2), axes=_EMBEDDED, **settings
    )
    return _chain(config, _adamw(config), rates)


def _alphadecay(config: Config, **settings: Any) -> optax.GradientTransformation:
    decay = farms_jax.alphadecay(config.weight_decay, refresh_every=_DECAY_EVERY, axes=RULES, **settings)
    rate = optax.scale_by_learning_rate(rate_of(config))
    return _chain(config, optax.scale_by_adam(b2=0.95), optax.masked(decay, decayed), rate)


def _muon(config: Config, *, power: float) -> optax.GradientTransformation:
    def groups(params: Any) -> Any:
        matrices = jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 3 else "other", params["blocks"])
        return {"blocks": matrices, "ends": jax.tree.map(lambda _: "other", params["ends"])}

    matrices = optax.chain(
        farms_jax.scale_by_htmuon(power=power, axes=farms_jax.TORCH_AXES, stack={r"blocks/.*": 0}),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate_of(config)),
    )
    other = _adamw(dataclasses.replace(config, learning_rate=config.learning_rate / 5))
    return _chain(config, optax.partition({"matrix": matrices, "other": other}, groups))


METHODS: Mapping[str, Callable[[Config], optax.GradientTransformation]] = {
    "AdamW": _plain,
    "TempBalance, whole": lambda config: _tempbalance(config, window=None),
    "TempBalance, FARMS": _tempbalance,
    "LLR, whole": lambda config: _llr(config, window=None),
    "LLR, FARMS": _llr,
    "AlphaDecay, whole": lambda config: _alphadecay(config, window=None),
    "AlphaDecay, FARMS": _alphadecay,
    "Muon": lambda config: _muon(config, power=0.0),
    "HTMuon": lambda config: _muon(config, power=0.125),
}


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return of each method the rate with the lowest mean loss, that loss, and how it differs from AdamW's."""
    losses: dict[tuple[str, float], np.ndarray] = {}
    for method, rate in dict.fromkeys((row["method"], row["rate"]) for row in rows):
        own = [row["loss"] for row in rows if (row["method"], row["rate"]) == (method, rate)]
        losses[method, rate] = np.array(own)
    best = {
        method: min((key for key in losses if key[0] == method), key=lambda key: losses[key].mean())
        for method in dict.fromkeys(method for method, _ in losses)
    }
    peer = losses[best.get("AdamW", next(iter(best.values())))]
    return [
        {
            "method": method,
            "rate": rate,
            "loss": float(losses[method, rate].mean()),
            "difference": float((losses[method, rate] - peer).mean()),
            "range": float(np.ptp(losses[method, rate] - peer)),
        }
        for method, rate in best.values()
    ]


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the loss of every training against its rate, one plot for each measure-free, whole and FARMS method."""
    names = list(dict.fromkeys(row["method"].split(",")[0] for row in rows))
    drawing, plots = figure(2.4 * len(names), 3, 1, len(names), sharey=True)
    for axis, name in zip(plots, names, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows if row["method"].split(",")[0] == name):
            own = [row for row in rows if row["method"] == method]
            colour = BASELINE if method.endswith("whole") else FARMS if method.endswith("FARMS") else "black"
            axis.semilogx([row["rate"] for row in own], [row["loss"] for row in own], "o", color=colour, label=method)
        label(axis, name, "learning rate")
        axis.legend(fontsize=7)
    plots[0].set_ylabel("validation loss, nats per token")
    return drawing


if __name__ == "__main__":
    main()
