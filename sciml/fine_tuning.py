"""A run: pretraining where asked, fine-tuning with each setting and seed, table and plots."""

import dataclasses
from pathlib import Path
from typing import Any

from tqdm import tqdm

from farms_jax.programs.files import write_json
from farms_jax.programs.run_directory import SeedDirectory

from . import checkpoints
from .config import TB
from .model import ModelConfig
from .preparation import Experiment
from .results import Results, summarise, table
from .rollout_plots import plot_run
from .stage import Functions, Stage, make_functions, run_test, train_stage
from .steps import Evaluate, make_evaluate


def run_experiment(run: Path, experiment: Experiment) -> str:
    """Pretrain if asked, fine-tune with every setting and seed, write summary and plots; return the results table."""
    for line in (*experiment.notes, f"{experiment.title()} -> {run}"):
        tqdm.write(line)
    config, network, data = experiment.config, experiment.network, experiment.finetune
    evaluate = make_evaluate(network, config)
    pretrained = _pretrain(run, experiment, evaluate)
    starts = {seed: experiment.initial(seed) if pretrained is None else pretrained for seed in config.seeds}
    functions = make_functions(network, config, data, evaluate)
    results: dict[tuple[TB, int], Results] = {}
    for tb in config.settings():
        for seed, params in starts.items():
            stage = Stage(f"{tb}, seed {seed}", tb, seed, config, data, params)
            trained = _train(run / tb / f"seed{seed}", stage, functions, experiment.model)
            # Plots are of the first seed; a large model's parameters times all seeds would fill the memory.
            results[tb, seed] = trained if seed == config.seeds[0] else trained._replace(params=None)
    before = run_test(starts[config.seeds[0]], data.test, config, evaluate)
    summary = summarise(results, before)
    plots = plot_run(run, experiment, results, before)
    write_json(run / "summary.json", {"run": experiment.title(), **summary})
    return table(summary, run, plots)


def _pretrain(run: Path, experiment: Experiment, evaluate: Evaluate) -> Any:
    """Return the pretrained parameters, or `None` if nothing is pretrained."""
    config, model, network, data = experiment.config, experiment.model, experiment.network, experiment.pretrain
    if data is None or not config.pretrain_epochs:
        return None
    pretrain = dataclasses.replace(
        config,
        epochs=config.pretrain_epochs,
        learning_rate=config.pretrain_rate,
        warmup_epochs=config.pretrain_epochs // 5,
        schedule="cycle",
    )
    seed = config.seeds[0]  # one pretraining for all seeds, as if its weights had been downloaded
    stage = Stage("pretrain", "none", seed, pretrain, data, experiment.initial(seed))
    return _train(run / "pretrain", stage, make_functions(network, pretrain, data, evaluate), model).params


def _train(folder: Path, stage: Stage, functions: Functions, model: ModelConfig) -> Results:
    """Train one stage in its folder, and export its weights."""
    directory = SeedDirectory(folder)
    state = train_stage(directory, stage, functions)
    results = Results(state.params, directory.metrics(), directory.layers())
    checkpoints.save(folder / "model.safetensors", state.params, model)
    return results
