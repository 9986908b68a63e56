"""What a training run is made of, and the named recipes of the paper.

Recipes are the rows of Table 13 (`resnet18-ls-ours`) and of the ablations: `table3-...` scaling ratios, `table5-...`
aspect ratios, `table7-...` how a kernel's divisions make one number. `python -m train.cifar --recipe list` names all.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from farms_jax import Window
from farms_jax.errors import InputError
from farms_jax.programs.command_line import Seeds

TempBalance = Literal["none", "tb", "farms"]
Model = Literal["resnet18", "resnet34", "resnet50", "vgg16", "vgg19"]


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment; `None` is filled in by `resolve`."""

    tb: TempBalance = "farms"
    """none: one cosine rate (CAL). tb: TempBalance on whole matrices. farms: on windows of one aspect ratio."""
    dataset: str = "auto"
    """cifar100, cifar10, digits, folder:PATH, or auto: CIFAR-100 where it can be had, else digits."""
    data_dir: Path | None = None
    """Where the data lie, or are downloaded to."""
    model: Model = "resnet18"
    """Network, in its form for small images."""
    width: float | None = None
    """Factor on all channels. Default: 1; 0.25 on digits."""
    layer_selection: bool = True
    """Leave the first and the last layer at the global rate (the papers' LS)."""
    epochs: int | None = None
    """Default: 200; 12 on digits."""
    batch_size: int | None = None
    """Images in a step; the rest of an epoch is dropped. Default: 128; 64 on digits."""
    learning_rate: float | None = None
    """Global rate at the start of its cosine. Default: the paper's Table 13."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD, on every parameter."""
    low: float | None = None
    """Factor of the best trained layer's rate. Default: Table 13."""
    high: float | None = None
    """Factor of the least trained layer's rate. Default: Table 13."""
    mapping: Literal["linear", "sqrt", "log2", "step", "sigmoid"] = "linear"
    """From alphas to factors."""
    tail: Literal["median", "peak", "ks"] = "median"
    """Rule for the start of the power-law tail."""
    rows: int | None = None
    """Rows of the final layer's windows; default: its smaller dimension (Table 15)."""
    per_axis: int = 9
    """Window positions per axis on the final layer (Table 15)."""
    aspect_ratio: float = 1.0
    """Columns over rows of a window (Table 5)."""
    divisions: Literal["mean", "pooled"] = "mean"
    """How the divisions of a kernel make one alpha (Table 7)."""
    norms: Literal["name", "order", "none"] = "name"
    """Which batch norms take their convolution's rate: by name, by order (those of shortcuts too), or none."""
    augment: bool = True
    """Random crop with padding 4, and flip. Digits are never flipped or cropped."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters stay float32."""
    devices: int = 1
    """Number of devices that share every batch evenly; 0: all that JAX sees."""
    seeds: Seeds = (43,)
    """One network is trained per seed; the paper's are 43 37 13."""
    limit_train: int | None = None
    """Number of training images to use, balanced over the classes. Default: all."""
    out: Path = Path("runs")
    """Folder for run directories."""

    def check(self) -> None:
        """Raise an InputError that names the flag where a value is out of its range."""
        for field in ("width", "epochs", "batch_size", "learning_rate", "low", "high", "limit_train", "aspect_ratio"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise InputError(f"--{field.replace('_', '-')} must be above 0, got {value}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seed must be different numbers, at least one; got {self.seeds}")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise InputError(f"--low must not be above --high, got {self.low} and {self.high}")
        try:
            self.window_of_run()  # makes its own checks
        except ValueError as error:
            raise InputError(str(error)) from error

    def window_of_run(self) -> Window | None:
        """Return the windows to analyse with: those of FARMS, also without TempBalance; `None` for tb."""
        sizes = {"rows": self.rows, "aspect_ratio": self.aspect_ratio, "per_axis": self.per_axis}
        window = Window(**sizes, divisions=self.divisions, min_division=1)  # as in the reference
        return None if self.tb == "tb" else window


# Paper, Table 13: initial learning rate, and lowest and highest factor, by model, method and layer selection. Of the
# three CAL rates the one that the paper's scripts use.
TABLE_13: dict[tuple[str, TempBalance, bool], tuple[float, float, float]] = {
    ("resnet18", "none", False): (0.1, 1.0, 1.0),
    ("resnet18", "tb", False): (0.1, 0.6, 1.4),
    ("resnet18", "tb", True): (0.1, 0.2, 1.8),
    ("resnet18", "farms", False): (0.1, 0.1, 1.9),
    ("resnet18", "farms", True): (0.1, 0.1, 1.9),
    ("resnet34", "none", False): (0.05, 1.0, 1.0),
    ("resnet34", "tb", False): (0.1, 0.5, 1.5),
    ("resnet34", "tb", True): (0.1, 0.3, 1.7),
    ("resnet34", "farms", False): (0.1, 0.2, 1.8),
    ("resnet34", "farms", True): (0.1, 0.3, 1.7),
    ("vgg16", "none", False): (0.05, 1.0, 1.0),
    ("vgg16", "tb", False): (0.05, 0.6, 1.4),
    ("vgg16", "tb", True): (0.05, 0.3, 1.7),
    ("vgg16", "farms", False): (0.05, 0.2, 1.8),
    ("vgg16", "farms", True): (0.05, 0.2, 1.8),
    ("vgg19", "none", False): (0.05, 1.0, 1.0),
    ("vgg19", "tb", False): (0.05, 0.6, 1.4),
    ("vgg19", "tb", True): (0.05, 0.2, 1.8),
    ("vgg19", "farms", False): (0.05, 0.2, 1.8),
    ("vgg19", "farms", True): (0.05, 0.4, 1.6),
}
_METHODS = {"none": "cal", "tb": "tb", "farms": "ours"}  # as the paper names them
_RATIOS = ((0.1, 1.9), (0.2, 1.8), (0.3, 1.7), (0.4, 1.6), (0.5, 1.5))
CIFAR: dict[str, Any] = {"epochs": 200, "batch_size": 128, "width": 1.0}
DIGITS: dict[str, Any] = {"epochs": 12, "batch_size": 64, "width": 0.25}


def _recipes() -> dict[str, Config]:
    paper = Config(dataset="cifar100", seeds=(43, 37, 13), **CIFAR)
    recipes = {}
    for (model, tb, selection), (rate, low, high) in TABLE_13.items():
        recipes[f"{model}-{'ls-' if selection else ''}{_METHODS[tb]}"] = dataclasses.replace(
            paper, model=model, tb=tb, layer_selection=selection, learning_rate=rate, low=low, high=high
        )
    for model in ("resnet18", "resnet34", "vgg16", "vgg19"):
        for name in ("tb", "ours"):
            for low, high in _RATIOS:
                best = recipes[f"{model}-ls-{name}"]
                recipes[f"table3-{model}-{name}-{low}"] = dataclasses.replace(best, low=low, high=high)
    # The paper's best FARMS setting: with layer selection on ResNet-18, without on VGG-16.
    for model, best in (("resnet18", recipes["resnet18-ls-ours"]), ("vgg16", recipes["vgg16-ours"])):
        for ratio in (0.5, 0.75, 1.0, 1.5, 2.0):
            recipes[f"table5-{model}-{ratio}"] = dataclasses.replace(best, aspect_ratio=ratio)
        for divisions in ("mean", "pooled"):
            recipes[f"table7-{model}-{divisions}"] = dataclasses.replace(best, divisions=divisions)
    return recipes


RECIPES = _recipes()


def resolve(config: Config, *, small: bool) -> Config:
    """Fill in what is `None`; `small` data, the bundled digits, get a short recipe without augmentation."""
    key = config.model, config.tb, config.layer_selection and config.tb != "none"
    rates = zip(("learning_rate", "low", "high"), TABLE_13.get(key, (0.1, 0.5, 1.5)), strict=True)
    defaults = (DIGITS if small else CIFAR) | dict(rates)
    missing = {field: value for field, value in defaults.items() if getattr(config, field) is None}
    return dataclasses.replace(config, **missing, augment=config.augment and not small)
