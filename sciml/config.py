"""Settings of a fine-tuning run, and the named recipes of the paper.

Recipes are the cells of Table 4 with the settings of Table 14, `tiny-25-farms` for DPOT-Tiny on 25 % of the data;
`python -m sciml.dpot --recipe list` names all.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, cast

from farms_jax.errors import InputError
from farms_jax.programs.command_line import Seeds

TB = Literal["none", "sigmoid", "farms"]
Model = Literal["mini", "tiny", "small", "medium", "large", "huge"]
SETTINGS: tuple[TB, ...] = ("none", "sigmoid", "farms")
_MAY_BE_ZERO = ("noise", "weight_decay", "pretrain_epochs", "warmup_epochs")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment; `None` is filled in by `resolve`."""

    tb: TB = "farms"
    """none: one rate for all layers (FT). sigmoid: TB_Sigmoid on whole matrices. farms: on windows of one shape."""
    against: tuple[TB, ...] | None = None
    """Other settings to fine-tune with, side by side. Default: on generated data those before `tb`."""
    model: Model | None = None
    """Size of DPOT. Default: that of the weights; else tiny, mini on generated data."""
    data: str = "generated"
    """File or folder to fine-tune on (PDEBench's 2D CFD, or DPOT's `data` layout), or generated: made here, small."""
    test_data: Path | None = None
    """Test trajectories; default: the last tenth of `data`."""
    data_dir: Path = Path("data")
    """Where generated data lie."""
    resolution: int | None = None
    """Points per axis of the model's grid; the data are resampled to it. Default: as the weights; 128; as generated."""
    patch_size: int | None = None
    """Points per axis of a patch. Default: as the weights; 8; 4 on generated data."""
    ratio: float = 1.0
    """Share of the training trajectories that is used (Table 4: 0.05, 0.1, 0.25, 0.5, 1)."""
    limit_train: int | None = None
    """Number of training trajectories to use, after `ratio`. Default: all."""
    limit_test: int | None = None
    """Number of test trajectories to use. Default: 200, as DPOT does."""
    weights: Path | None = None
    """Pretrained weights to start from, .safetensors or .pth (see sciml.convert)."""
    components: tuple[str, ...] = ("all",)
    """Parts to take from the weights: all, or some of patch_embed pos blocks scale_feats cls_head time_agg out."""
    pretrain_data: Path | None = None
    """Pretrain on these trajectories first, instead of starting from weights."""
    pretrain_epochs: int | None = None
    """Epochs of pretraining. Default: 200; 12 on generated data."""
    pretrain_rate: float = 1e-3
    """Peak learning rate of pretraining."""
    epochs: int | None = None
    """Epochs of fine-tuning. Default: 200; 15 on generated data."""
    batch_size: int | None = None
    """Trajectories in a step. Default: 32; 8 on generated data."""
    learning_rate: float | None = None
    """Peak learning rate of fine-tuning. Default: Table 14."""
    schedule: Literal["cycle", "step"] = "cycle"
    """cycle: up and down along cosines. step: multiplied by --step-gamma every --step-size epochs."""
    warmup_epochs: int | None = None
    """Epochs until the peak of a cycle. Default: a fifth of the epochs."""
    step_size: int = 100
    """Epochs between the steps of `step`."""
    step_gamma: float = 0.5
    """Factor of each step of `step`."""
    in_steps: int = 10
    """Time steps the model sees."""
    rollout_steps: int = 1
    """Time steps it predicts in training, each fed back (DPOT's T_ar)."""
    bundle: int = 1
    """Time steps in one prediction (temporal bundling)."""
    noise: float = 0.0
    """Noise on the model's input in training, relative to the norm of the input; DPOT pretrains with 5e-4."""
    test_steps: int | None = None
    """Time steps to predict in tests. Default: all that the data have."""
    normalize: bool | None = None
    """Normalise each sample inside the model. Default: as the weights; no, as published; yes on generated data."""
    weight_decay: float = 1e-6
    """L2, added to the gradient."""
    clip: float = 1e4
    """Bound on the norm of the gradient."""
    scaling: tuple[float, float] = (1.0, 1.0)
    """Table 14's scaling ratio (s, t): factors lie between 10**(-s/2) and 10**(t/2)."""
    slope: float = 10.0
    """Steepness of the sigmoid of alpha."""
    layers: Literal["reference", "all"] = "reference"
    """Analyse what the reference does (Linear, Conv2d), or the complex Fourier weights and the deconvolution too."""
    layer_selection: bool = True
    """Leave the first and the last layer at the global rate."""
    tail: Literal["median", "peak", "ks"] = "median"
    """Rule for the start of the power-law tail."""
    aspect_ratio: float = 1.0
    """Columns over rows of a window (Table 15)."""
    seeds: Seeds = (0,)
    """One network is fine-tuned per seed."""
    out: Path = Path("runs")
    """Folder for run directories."""

    def check(self) -> None:
        """Raise an InputError that names the flag whose value is out of its range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool):  # to Python a bool is an int
                continue
            # NaN is neither.
            if not (value >= 0 if field.name in _MAY_BE_ZERO else value > 0):
                rule = "not be negative" if field.name in _MAY_BE_ZERO else "be above 0"
                raise InputError(f"--{field.name.replace('_', '-')} must {rule}, got {value}")
        if not self.data:
            raise InputError("--data: the recipes run on PDEBench's 2D CFD data; give the file or folder")
        if self.ratio > 1:
            raise InputError(f"--ratio is a share of the training data, in (0, 1]; got {self.ratio}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seed must be different numbers, at least one; got {self.seeds}")
        if min(self.scaling) < 0:
            raise InputError(f"--scaling must not be negative, got {self.scaling}")
        if self.rollout_steps % self.bundle:
            raise InputError(
                f"--rollout-steps {self.rollout_steps} must be a multiple of --bundle {self.bundle}: "
                "a prediction is always compared whole"
            )
        if self.weights is not None and self.pretrain_data is not None:
            raise InputError("--weights and --pretrain-data are two ways to start; give one of them")
        if self.epochs is not None and self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise InputError(f"--warmup-epochs {self.warmup_epochs} must not be above --epochs {self.epochs}")

    def is_generated(self) -> bool:
        """Return whether the data are made here."""
        return self.data == "generated"

    def bounds(self) -> tuple[float, float]:
        """Return the lowest and the highest factor of a layer's rate."""
        return 10 ** (-self.scaling[0] / 2), 10 ** (self.scaling[1] / 2)

    def settings(self) -> tuple[TB, ...]:
        """Return the settings to fine-tune with, in the order of the results table."""
        return tuple(tb for tb in SETTINGS if tb == self.tb or tb in (self.against or ()))


# Paper, Table 14: learning rate by model and subsampling ratio of the data.
TABLE_14: dict[tuple[str, float], float] = {
    **{("tiny", ratio): 2.5e-4 for ratio in (0.05, 0.1, 0.25)},
    **{("tiny", ratio): 5e-4 for ratio in (0.5, 1.0)},
    **{("small", ratio): 1e-4 for ratio in (0.05, 0.1)},
    **{("small", ratio): 2.5e-4 for ratio in (0.25, 0.5, 1.0)},
}
GENERATED = {
    "model": "mini",
    "resolution": 32,
    "patch_size": 4,
    "pretrain_epochs": 12,
    "epochs": 15,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "normalize": True,
}
# Epochs, warm-up (a fifth) and batch of DPOT's configs/dpot_finetune.yaml; the FARMS paper names none.
PUBLISHED = {
    "model": "tiny",
    "resolution": 128,
    "patch_size": 8,
    "pretrain_epochs": 200,
    "epochs": 200,
    "batch_size": 32,
    "limit_test": 200,
    "learning_rate": 2.5e-4,
    "normalize": False,
}


def resolve(config: Config) -> Config:
    """Return the config with defaults for `None`; `limit_train`, `limit_test` and `test_steps` may stay `None`."""
    defaults: dict[str, Any] = dict(GENERATED if config.is_generated() else PUBLISHED)
    defaults["learning_rate"] = TABLE_14.get(
        (config.model or defaults["model"], config.ratio), defaults["learning_rate"]
    )
    defaults["against"] = SETTINGS[: SETTINGS.index(config.tb)] if config.is_generated() else ()
    missing = {field: value for field, value in defaults.items() if getattr(config, field) is None}
    config = dataclasses.replace(config, **missing)
    assert config.epochs is not None
    return config if config.warmup_epochs is not None else dataclasses.replace(config, warmup_epochs=config.epochs // 5)


RECIPES: dict[str, Config] = {
    f"{model}-{round(100 * ratio)}-{tb}": Config(
        model=cast(Model, model), ratio=ratio, tb=tb, data="", learning_rate=rate
    )
    for (model, ratio), rate in TABLE_14.items()
    for tb in SETTINGS
}
