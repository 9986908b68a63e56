"""Weights, network and data of a run, opened and checked before anything is computed."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from farms_jax.errors import InputError
from farms_jax.programs.environment import environment
from farms_jax.programs.files import sha256

from . import checkpoints
from .config import Config, resolve
from .fields import FieldData, open_fields
from .flow_config import FlowConfig, file_name
from .generate import generate
from .model import NAMED, ModelConfig, Network, make_network

# Small enough for two cores: the flow to pretrain on is more viscous and slower than the one to fine-tune on.
PRETRAIN_FLOW = FlowConfig(mach=0.1, eta=0.1, zeta=0.1, size=32, count=400, seed=1)
FINETUNE_FLOW = FlowConfig(mach=1.0, eta=0.01, zeta=0.01, size=32, count=160, seed=2)


class Experiment(NamedTuple):
    """Weights, network and data of a run, opened and checked."""

    config: Config  # resolved
    model: ModelConfig
    network: Network
    finetune: FieldData
    pretrain: FieldData | None
    notes: tuple[str, ...]  # on weights and data, for the user

    def facts(self) -> dict[str, Any]:
        """Return what a run's numbers depend on besides its settings: data, weights, versions, machine."""
        data = {"finetune": self.finetune, "pretrain": self.pretrain}
        return {
            "data": {key: f"{value.name} {value.fingerprint}" for key, value in data.items() if value is not None},
            "weights": None if self.config.weights is None else sha256(self.config.weights),
            **environment(),
        }

    def check_same(self, before: dict[str, Any]) -> None:
        """Raise an InputError if data or weights are not those of the run whose facts are given."""
        now = self.facts()  # versions and machine may differ: a run may go on elsewhere
        for what in ("data", "weights"):
            if now[what] != before.get(what):
                raise InputError(
                    f"--resume: the {what} are not those that the run began with (then {before.get(what)}, "
                    f"now {now[what]}); put those back, or start anew"
                )

    def title(self) -> str:
        """Return one line that says what a run does."""
        config = self.config
        size = f"{len(self.finetune.train)} training trajectories"
        return f"DPOT {config.model} on {self.finetune.name}, {size}, {config.epochs} epochs, tb={config.tb}"

    def initial(self, seed: int) -> Any:
        """Return the parameters before any training: given weights, or drawn ones."""
        drawn = self.network.init(jax.random.key(seed))
        if self.config.weights is None:
            return drawn
        return checkpoints.load(self.config.weights, self.model, drawn, self.config.components)[0]


def complete(config: Config) -> Config:
    """Return the config resolved, with the model's shape from the weights if there are some."""
    if config.weights is None:
        return resolve(config)
    state = checkpoints.read(config.weights)
    try:
        found = checkpoints.infer_config(state)
    except InputError as error:
        raise InputError(f"{config.weights}: {error}") from error
    shape = ("width", "depth", "num_blocks", "mlp_ratio", "out_width")
    alike = (name for name, model in NAMED.items() if all(getattr(model, f) == getattr(found, f) for f in shape))
    name = next(alike, None)
    if config.model is None and name is None:
        raise InputError(
            f"{config.weights}: {found.depth} blocks of width {found.width} are none of the models {', '.join(NAMED)}; "
            "give --model, and in --components what to take"
        )
    taken = {
        "model": name,
        "resolution": found.image_size,
        "patch_size": found.patch_size,
        "normalize": found.normalize,
    }
    return resolve(dataclasses.replace(config, **{f: v for f, v in taken.items() if getattr(config, f) is None}))


def prepare(config: Config) -> Experiment:
    """Return the experiment of a resolved config: shapes are checked, then weights, then data.

    Generated data are made unless they exist. An InputError says what cannot be used.
    """
    model = _model_config(config)
    network = make_network(model)
    notes: list[str] = []
    if config.weights is not None:  # before the data are made, which takes longer
        skeleton = jax.eval_shape(network.init, jax.random.key(0))
        notes += checkpoints.load(config.weights, model, skeleton, config.components)[1]
    finetune, pretrain = Path(config.data), config.pretrain_data
    if config.is_generated():
        folder = config.data_dir / "generated"  # of their own: other flows of these names may lie beside it
        finetune = generate(folder / file_name(FINETUNE_FLOW), FINETUNE_FLOW)
        if config.weights is None and pretrain is None and config.pretrain_epochs:
            pretrain = generate(folder / file_name(PRETRAIN_FLOW), PRETRAIN_FLOW)
    needed = config.in_steps + max(config.rollout_steps, config.test_steps or 1)

    def opened(path: Path, **limits: Any) -> FieldData:
        return open_fields(path, resolution=config.resolution, steps_needed=needed, **limits)

    limits = {"limit_test": config.limit_test, "channels": model.in_channels}
    to_finetune = opened(finetune, test=config.test_data, ratio=config.ratio, limit_train=config.limit_train, **limits)
    to_pretrain = None if pretrain is None else opened(pretrain, **limits)
    notes += to_finetune.notes + (to_pretrain.notes if to_pretrain else ())
    if config.weights is None and to_pretrain is None:
        notes.append("No weights given: training starts from random ones; see --weights and --pretrain-data.")
    return Experiment(config, model, network, to_finetune, to_pretrain, tuple(notes))


def _model_config(config: Config) -> ModelConfig:
    assert config.model is not None and config.resolution is not None and config.patch_size is not None
    assert config.normalize is not None
    if config.resolution % config.patch_size:
        raise InputError(f"--resolution {config.resolution} must be a multiple of --patch-size {config.patch_size}")
    return dataclasses.replace(
        NAMED[config.model],
        image_size=config.resolution,
        patch_size=config.patch_size,
        in_steps=config.in_steps,
        out_steps=config.bundle,
        normalize=config.normalize,
    )
