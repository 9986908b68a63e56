"""Settings of a pruning run."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from farms_jax import Window
from farms_jax.errors import InputError

from .fine_tuning import FineTuning
from .methods import Groups
from .models import Network
from .recovery import Recovery

BUNDLED = Path(__file__).parent / "bundled"

Method = Literal["magnitude", "wanda", "wanda_variant", "sparsegpt", "admm"]
Dtype = Literal["source", "float32", "float16", "bfloat16"]
Allocation = Literal["uniform", "alphapruning", "farms", "owl", "dlp", "atp", "ends", "sensitivity", "search"]

SPECTRAL: tuple[Allocation, ...] = ("alphapruning", "farms")  # those by the alphas of the weights' spectra
# Half the range of sparsities where --epsilon is not given. farms, alphapruning: the middle of the values that the
# papers search; owl: lambda of its paper; dlp: alpha of its code; atp: none is published, half of beta * (blocks - 1);
# ends, sensitivity: of trials on SmolLM2-135M at a sparsity of 0.7, with Wanda.
EPSILON: dict[Allocation, float] = {
    "alphapruning": 0.3,
    "farms": 0.3,
    "owl": 0.08,
    "dlp": 0.15,
    "atp": 0.15,
    "ends": 0.13,
    "sensitivity": 0.15,
}
# Added to the Hessian's diagonal, relative to its mean, where --damping is not given: as in the methods' public code.
DAMPING: dict[Method, float] = {"sparsegpt": 0.01, "admm": 0.1}
# Learning rate where --recover-rate is not given.
RECOVER_RATE = {"blocks": 6e-4, "lora": 1e-3, "full": 1e-4}
# Tried by --epsilon auto; 0 is the uniform allocation.
EPSILONS_SCALE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
EPSILONS_SHIFT = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2)
_BASELINES: dict[str, tuple[Allocation, ...]] = {
    "uniform": ("uniform",),
    "farms": ("farms",),
    "both": ("uniform", "farms"),
    "none": (),
}
# Settings that change no number: a run given again with others of them is the same run.
ELSEWHERE = ("out", "spill", "dry_run", "fresh", "push")  # of where and how, not of what
_NO_NUMBERS = (*ELSEWHERE, "baseline")
_POSITIVE = (
    *("samples", "length", "limit", "per_axis", "rows", "damping", "aspect_ratio"),
    *("recover_steps", "recover_rate", "recover_samples", "search_generations", "search_minutes"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One pruning run. `None` stands for a default that depends on the model."""

    model: str | None = None
    """Hugging Face folder, FILE.gguf, or hub id (owner/name). Default: the small LLaMA that comes with the program."""
    sparsity: float | None = None
    """Fraction of the block weights to remove, in [0, 1). Default: 0.5, or N/M with --groups."""
    method: Method = "wanda"
    """magnitude needs no calibration; wanda and its variant need norms of inputs, sparsegpt and admm their Hessians.
    These two also update the weights that stay."""
    allocation: Allocation = "farms"
    """Sparsity of each block: the same (uniform); by alpha of whole matrices (alphapruning) or of windows (farms); by
    outliers (owl), medians (dlp); rising with depth (atp); less for the first and the last (ends); by the measured
    harm of pruning it alone (sensitivity); the best of all these, and what an evolution finds from there (search)."""
    granularity: Literal["block", "layer"] = "block"
    """Layers of a block share one sparsity, as in the papers, or each has its own."""
    epsilon: str | None = None
    """Half the range of sparsities: relative for farms and alphapruning, absolute for the others; or auto: the value
    with the lowest perplexity on calibration text held out for it. Default: 0.3, 0.08 (owl), 0.13 (ends), 0.15."""
    search_generations: int = 100
    """Generations of --allocation search, after all other allocations were tried."""
    search_minutes: float | None = None
    """End the generations after this time, where it comes first; what was found by then counts."""
    budget: Literal["exact", "reference"] = "exact"
    """exact meets the global sparsity; reference clips as the papers' code does, and removes less."""
    groups: str | None = None
    """N:M, such as 2:4: N of every M consecutive inputs are removed. With an allocation other than uniform, N differs
    from block to block and --sparsity is the global budget."""
    calibration: str | None = None
    """Calibration text: c4, wikitext2, or a file: text, or documents under "text" in json, jsonl, csv, parquet or arrow
    (also .gz, .bz2, .xz, .zst), or token ids in npy or npz. Default: c4."""
    samples: int = 128
    """Calibration sequences."""
    length: int | None = None
    """Tokens in a sequence, for calibration and evaluation. Default: 2048, or the most that the model takes."""
    seed: int = 0
    """Seed of the calibration samples."""
    text: str | None = None
    """Text to measure perplexity on: wikitext2, c4, or a file. Default: wikitext2."""
    limit: int | None = None
    """Number of blocks of the text to evaluate, from the first on."""
    special_tokens: bool = True
    """Let the tokenizer add those it adds by default, such as a first BOS."""
    tokenizer: str | None = None
    """Folder of a tokenizer to use instead of the model's own."""
    rows: int | None = None
    """Rows of FARMS windows. Default: the smallest dimension of a block's weights, at most 2000 (the paper's)."""
    per_axis: int = 10
    """Window positions per axis; the paper's are 10 and 15."""
    aspect_ratio: float = 1.0
    """Columns over rows of a window."""
    tail: Literal["peak", "median", "ks"] = "peak"
    """Rule for the start of the power-law tail."""
    damping: float | None = None
    """Added to the Hessian's diagonal, relative to its mean; raised tenfold where it is too little. Default: 0.01 for
    sparsegpt, 0.1 for admm."""
    recover: Literal["none", "blocks", "lora", "full"] = "none"
    """Train the weights that stay: in each block after it is pruned, to do again what it did dense (blocks); or in the
    whole pruned model, on text, which must fit into memory: by masked adapters (lora), or themselves (full)."""
    recover_steps: int = 200
    """Steps of AdamW: for each half of a block, attention and feed-forward network, or for the whole model."""
    recover_rate: float | None = None
    """Learning rate of these steps at its peak. Default: 0.0006 (blocks), 0.001 (lora), 0.0001 (full)."""
    recover_text: str | None = None
    """Text that lora and full train on, as for --calibration. Default: the calibration text."""
    recover_samples: int | None = None
    """Sequences of that text. Default: as many as calibration samples; of the same text, the same."""
    dtype: Dtype = "source"
    """Precision of the written model: source, float32, float16 or bfloat16. The source's is, for a quantised GGUF file,
    float16, or bfloat16 where float16 has no range for its numbers."""
    baseline: Literal["auto", "uniform", "farms", "both", "none"] = "auto"
    """Also prune uniformly, by farms, or both, for comparison, without writing a model; auto: both for the bundled
    model, but what --allocation names."""
    push: str | None = None
    """OWNER/NAME on the Hugging Face hub to upload the model to, with its card; a new repository is private."""
    dry_run: bool = False
    """Print the allocation and the size it would give; evaluate and prune nothing."""
    spill: Path | None = None
    """Folder for activations, where memory is too small for them (samples x length x hidden size x 4 bytes)."""
    fresh: bool = False
    """Start anew even where the same run was begun or finished before."""
    out: Path = Path("runs")
    """Folder for run directories."""

    def check(self) -> None:
        """Raise an InputError that names the flag where a value is out of its range."""
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise InputError(f"--sparsity must be in [0, 1), the fraction to remove; got {self.sparsity}")
        groups = self.groups_of()
        if groups and self.allocation == "uniform" and self.sparsity not in {None, groups.sparsity}:
            raise InputError(
                f"--sparsity {self.sparsity} is not --groups {self.groups}; leave it out, or choose an --allocation "
                "under which N differs from block to block"
            )
        for field in _POSITIVE:
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise InputError(f"--{field.replace('_', '-')} must be above 0, got {value}")
        if groups and self.target > 1 - 1 / groups.size:
            raise InputError(f"--sparsity {self.target} is beyond --groups {self.groups}: one of each group stays")
        if self.length == 1:
            raise InputError("--length must be at least 2: perplexity predicts tokens from those before them")
        if self.push is not None and not re.fullmatch(r"[^/\s]+/[^/\s]+", self.push):
            raise InputError(f"--push must be OWNER/NAME of the hub, got {self.push!r}")
        if self.seed < 0:
            raise InputError(f"--seed must not be below 0, got {self.seed}")
        if self.method == "wanda_variant" and (self.allocation != "uniform" or self.groups):
            raise InputError("--method wanda_variant chooses its own rows: it needs --allocation uniform, no --groups")
        if self.allocation == "search" and self.epsilon is not None:
            raise InputError("--epsilon: --allocation search takes each allocation's own; leave it out")
        if self.allocation == "search" and self.dry_run:
            raise InputError("--dry-run: --allocation search prunes to find one; look at another --allocation")
        if self.budget == "reference" and self.allocation not in {*SPECTRAL, "uniform"}:
            raise InputError("--budget reference is defined for farms and alphapruning; leave it out")
        self.half_range()  # these two raise where their own settings are wrong
        self.window(1)

    @property
    def target(self) -> float:
        """Fraction of the block weights to remove: as given, or of N:M."""
        if self.sparsity is not None:
            return self.sparsity
        groups = self.groups_of()
        return groups.sparsity if groups else 0.5

    def half_range(self) -> float | None:
        """Return epsilon as a number, 0 for an allocation that has none; `None` where it is to be searched."""
        try:
            given = None if self.epsilon in {None, "auto"} else float(str(self.epsilon))
        except ValueError:
            raise InputError(f"--epsilon must be a number in [0, 1) or auto, got {self.epsilon!r}") from None
        if given is not None and not 0 <= given < 1:
            raise InputError(f"--epsilon must be in [0, 1) or auto, got {self.epsilon}")
        if self.allocation not in EPSILON:
            return 0.0
        if self.epsilon == "auto":
            return None
        return EPSILON[self.allocation] if given is None else given

    @property
    def held_out(self) -> int:
        """Number of calibration sequences beside `samples`, which no statistic sees: allocations are judged by them."""
        if self.allocation == "search":
            return self.samples
        is_judged = self.allocation == "sensitivity" or self.half_range() is None
        return max(self.samples // 4, 1) if is_judged else 0

    def groups_of(self) -> Groups | None:
        """Return N:M as numbers, `None` without `--groups`."""
        if self.groups is None:
            return None
        match = re.fullmatch(r"(\d+):(\d+)", self.groups)
        groups = Groups(int(match[1]), int(match[2])) if match else Groups(0, 0)
        if not 0 < groups.removed < groups.size:
            raise InputError(f"--groups must read N:M with 0 < N < M, such as 2:4; got {self.groups!r}")
        return groups

    def recovery(self) -> Recovery | None:
        """Return how blocks are trained after they are pruned, `None` where they are not."""
        if self.recover != "blocks":
            return None
        return Recovery(self.recover_steps, self.recover_rate or RECOVER_RATE[self.recover], self.seed)

    def fine_tuning(self) -> FineTuning | None:
        """Return how the whole pruned model is trained, `None` where it is not."""
        if self.recover not in ("lora", "full"):  # noqa: PLR6201 (a tuple narrows the type)
            return None
        rate = self.recover_rate or RECOVER_RATE[self.recover]
        return FineTuning(self.recover, self.recover_steps, rate, self.seed)

    def window(self, smallest: int) -> Window | None:
        """Return the windows to analyse, for the smallest dimension of a block's weights; `None`: whole matrices."""
        if self.allocation == "alphapruning":
            return None
        return Window(self.rows or min(smallest, 2000), self.aspect_ratio, per_axis=self.per_axis)

    def baselines(self) -> tuple[Allocation, ...]:
        """Return the allocations to prune by for comparison, those of `auto` once it is resolved."""
        return _BASELINES[self.baseline]

    def numbers(self) -> dict[str, object]:
        """Return the settings on which the pruned weights or the figures depend."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _NO_NUMBERS}


def resolve(config: Config, network: Network) -> Config:
    """Return the config with a sparsity, text sources and a length; InputError where the network cannot have them."""
    bundled = config.model is None
    length = config.length or min(2048, network.max_length)
    if length > network.max_length:
        raise InputError(f"--length {length} is more than the {network.max_length} positions of the model")
    groups = config.groups_of()
    for layer, (_, inputs) in network.layer_shapes().items():
        if groups and inputs % groups.size:
            raise InputError(
                f"--groups {config.groups}: the {inputs} inputs of {layer} are no multiple of {groups.size}; "
                "choose an M that divides them"
            )
    return dataclasses.replace(
        config,
        sparsity=config.target,
        length=length,
        damping=config.damping or DAMPING.get(config.method),
        recover_rate=config.recover_rate or RECOVER_RATE.get(config.recover),
        calibration=config.calibration or (str(BUNDLED / "calibration.txt") if bundled else "c4"),
        text=config.text or (str(BUNDLED / "heldout.txt") if bundled else "wikitext2"),
        baseline=_baseline(config, bundled=bundled) if config.baseline == "auto" else config.baseline,
    )


def _baseline(config: Config, *, bundled: bool) -> Literal["uniform", "farms", "both", "none"]:
    if not bundled:
        return "none"
    if config.allocation == "farms" or config.method == "wanda_variant":  # which has no allocation but uniform
        return "uniform"
    return "farms" if config.allocation == "uniform" else "both"
