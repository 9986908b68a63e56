"""`farms analyze`, `farms compare` and `farms watch`: their options, and what they print and write."""

import contextlib
import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from farms_jax import axis_rules
from farms_jax._layers import SAY_IT
from farms_jax._present import counted, text_table
from farms_jax._tail import Tail
from farms_jax._windows import Window
from farms_jax.diagnosis.columns import COLUMNS, Column, find_column
from farms_jax.diagnosis.compare import Comparison, compare
from farms_jax.diagnosis.exports import check_blocks
from farms_jax.diagnosis.pipeline import Place, diagnose, layers_of
from farms_jax.diagnosis.ranking import Ranking, rank_models
from farms_jax.diagnosis.settings import CommonSettings, Settings
from farms_jax.diagnosis.table import LayerTable
from farms_jax.diagnosis.watch import Rules, watch
from farms_jax.diagnosis.watch_log import WatchLog
from farms_jax.errors import AxesWarning, InputError
from farms_jax.programs.cache import default_folder
from farms_jax.programs.exits import reported
from farms_jax.programs.memory import return_freed_memory
from farms_jax.weights import WeightSource, open_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measuring:
    """How layers are measured."""

    include: tuple[str, ...] = ()
    """Regular expressions of the layers to measure, matched whole; without any, all."""
    exclude: tuple[str, ...] = ()
    """Regular expressions of the layers to leave out, matched whole."""
    axes: str = "auto"
    """What the axes of the arrays count: torch (out, in, ...), flax (..., in, out), maxtext, maxtext-scan-0, tunix,
    big_vision, haiku, equinox, mlx; or a TOML or JSON file with the tables `axes` and `stack`, see the documentation;
    auto goes by the format."""
    rows: int | None = None
    """Rows of a window; by default the largest window that fits."""
    aspect_ratio: float = 1.0
    """Columns over rows of a window."""
    per_axis: int | None = None
    """Window positions on each axis; 10 where no stride is given."""
    stride: int | None = None
    """Rows and columns from one window to the next, instead of --per-axis."""
    tail: Literal["median", "peak", "ks"] = "median"
    """Rule that finds the start of the tail, for windows and for `whole_alpha`."""
    common: Annotated[CommonSettings, tyro.conf.arg(name="")] = CommonSettings()
    cache: bool = True
    """Keep results by the hash of the weights, so that only what changed is measured again."""
    cache_dir: Path | None = None
    """Folder of the kept results; by default in the user's cache folder."""

    def options(self) -> dict[str, Any]:
        """Return the options of `diagnose`."""
        return {
            "include": self.include,
            "exclude": self.exclude,
            "axes": self.axis_rules(),
            "cache": (self.cache_dir or default_folder()) if self.cache else None,
            "progress": True,
            **vars(self.settings()),
        }

    def axis_rules(self) -> Any:
        """Return what --axes names; `None` for the format's own."""
        if self.axes == "auto":
            return None
        if self.axes in axis_rules.NAMED:
            return axis_rules.NAMED[self.axes]
        if not Path(self.axes).exists():
            raise InputError(f"--axes {self.axes}: neither auto, {', '.join(axis_rules.NAMED)}, nor a file")
        return axis_rules.read_rules(Path(self.axes))

    def settings(self) -> Settings:
        """Return what to measure; a value out of its range is an `InputError`."""
        try:
            window = Window(self.rows, self.aspect_ratio, self.stride, self.per_axis)
            return Settings(window=window, tail=Tail(self.tail), **vars(self.common))
        except ValueError as error:
            raise InputError(str(error)) from error


_Model = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
_Folder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_DIR")]
_Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analyze(Measuring):
    """Measure every layer of a model: alpha and its interval, aspect-ratio bias, noise, a status, what to do now.

    Several models are measured alike, and ranked in one table.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL ...")]
    """A Hugging Face folder, a .safetensors, .gguf, .npz, .msgpack, .keras or .h5 file, a .pt, .pth, .bin or .ckpt of
    torch.save (with the extra torch), an Orbax checkpoint, or a run directory."""
    html: Path | None = None
    """Write one self-contained report for a browser."""
    csv: Path | None = None
    """Write all columns as CSV."""
    json: Path | None = None
    """Write everything as JSON; `farms compare` reads it. Of several models, as --csv, the table of models."""
    rates: Path | None = None
    """Write factors of the learning rate by layer (TempBalance) as JSON, for Torch's parameter groups and for optax."""
    recipe: Path | None = None
    """Write a recipe of llm-compressor, in YAML, that prunes more where alpha is large; see --sparsity and --each."""
    sparsity: float = 0.5
    """Fraction of the blocks' weights that --recipe removes, in (0, 1)."""
    each: Literal["block", "layer"] = "block"
    """What has a sparsity of its own in --recipe: a block, by its mean alpha, or a layer."""
    table: _Flag = False
    """Print the table of all layers, however long; without, up to 20 layers."""
    sort: str | None = None
    """Column to sort the table by, which is printed then, as the table heads it or by its full name: the largest first,
    names and statuses in their order. By default the order of the network. Several models: column of their table."""
    ascending: _Flag = False
    """Sort the smallest first."""
    explain: _Flag = False
    """List every array of the model, with whether it is a layer and why not, and measure nothing."""

    def run(self) -> None:
        """Measure, write, print."""
        if not self.models:
            raise InputError("MODEL: give a model, or several; see farms analyze --help")
        if not 0 < self.sparsity < 1:
            raise InputError(f"--sparsity: must be above 0 and below 1, got {self.sparsity:g}")
        if len(self.models) > 1 and not self.explain:
            self._rank()
            return
        outputs = _checked({"--html": self.html, "--csv": self.csv, "--json": self.json, "--rates": self.rates})
        recipe = _checked({"--recipe": self.recipe})
        sort = None if self.sort is None else _sort_column(self.sort, COLUMNS)
        options = self.options()
        for model in self.models if self.explain else ():
            with open_weights(model, axes=options["axes"]) as source:
                _explain(source, *layers_of(source, self.settings(), self.include, self.exclude))
        if self.explain:
            return
        (model,) = cast("tuple[str, ...]", self.models)
        with open_weights(model, axes=options["axes"]) as source:
            if recipe:
                check_blocks(layers_of(source, self.settings(), self.include, self.exclude)[0])
            diagnosis = diagnose(source, **options)
        if sort is not None:
            diagnosis = diagnosis.sort(sort.name, descending=bool(sort.format) and not self.ascending)
        written = _write(diagnosis, outputs) + _write(diagnosis, recipe, sparsity=self.sparsity, each=self.each)
        diagnosis.show(table=True if self.table or sort else None)
        sys.stdout.write(written or "--html report.html writes the whole report\n")
        _end_if(diagnosis.damaged)

    def _rank(self) -> None:
        """Measure several models under the same settings, write and print the table of them."""
        if refused := [flag for flag in ("html", "rates", "recipe") if getattr(self, flag) is not None]:
            raise InputError(f"--{refused[0]}: is of one model, and {len(self.models)} are given; give one")
        outputs = _checked({"--csv": self.csv, "--json": self.json})
        ranking = rank_models(self.models, **self.options())
        if self.sort is not None:
            column = _sort_column(self.sort, Ranking.possible)
            ranking = ranking.sort(column.name, descending=bool(column.format) and not self.ascending)
        written = _write(ranking, outputs)
        ranking.show()
        sys.stdout.write(written)
        _end_if(ranking.damaged)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Measuring):
    """Set two models side by side: what moved, what moved most first."""

    a: _Model
    """The model before: see `farms analyze`; or a diagnosis written with --json."""
    b: _Model
    """The model after, or the folder of a LoRA adapter of the first."""
    html: Path | None = None
    """Write one self-contained report for a browser."""
    csv: Path | None = None
    """Write all columns as CSV."""
    json: Path | None = None
    """Write everything as JSON."""
    directions: int = 10
    """Leading singular vectors of each layer whose spaces are compared, for the overlaps and angles; 0 for none."""
    sort: str = "alpha_change"
    """Column to sort by, largest magnitude first."""

    def run(self) -> None:
        """Measure both, print, write."""
        outputs = _checked({"--html": self.html, "--csv": self.csv, "--json": self.json})
        _sort_column(self.sort, Comparison.possible)  # before any long work
        # What was not asked for is as in the diagnosis that one of the models is.
        usual = vars(Settings())
        options = {name: value for name, value in self.options().items() if name not in usual or value != usual[name]}
        comparison = compare(self.a, self.b, directions=self.directions, **options)
        comparison = comparison.sort(self.sort, descending=True, magnitude=True)
        written = _write(comparison, outputs)
        comparison.show()
        sys.stdout.write(written or "--html changes.html writes the whole report\n")
        _end_if(any(comparison.damaged.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch(Measuring):
    """Follow a training run's checkpoints; alert when a layer's alpha falls low, it explodes, dies or grows spikes."""

    run_dir: _Folder
    """Directory that a training writes its checkpoints to."""
    every: float = 30.0
    """Seconds from one look at the directory to the next."""
    once: _Flag = False
    """Measure the checkpoints that exist, and end."""
    ww_alpha_below: Annotated[float, tyro.conf.arg(aliases=("--alpha-below",))] = Rules.ww_alpha_below
    """Alert when WeightWatcher's alpha of the whole matrix falls below this."""
    spikes: int = Rules.spikes
    """Alert when at least this many eigenvalues stand beyond the bulk of noise, where none did before."""
    scale: float = Rules.scale
    """Alert when a layer's norm is so many times larger or smaller than in the checkpoint before."""
    out: Path | None = None
    """Where alerts.jsonl and the diagnoses go; RUN_DIR/farms by default."""

    def run(self) -> None:
        """Look, print, write, again and again."""
        if not 0 < self.every < float("inf"):
            raise InputError(f"--every {self.every:g}: must be a number of seconds above 0")
        if not self.scale > 1:
            raise InputError(f"--scale {self.scale:g}: must be above 1")
        run, rules = Path(self.run_dir), Rules(self.ww_alpha_below, self.spikes, self.scale)
        out = self.out or run / "farms"
        log, every = WatchLog(run, out), None if self.once else self.every
        count = again = 0
        for seen in watch(run, rules=rules, every=every, earlier=log.earlier(), **self.options()):
            told = seen.diagnosis.headline() if seen.diagnosis else "cannot be measured"
            sys.stdout.write(f"{time.strftime('%H:%M:%S')} {seen.checkpoint}: {told}\n")
            news = log.add(seen)
            for alert in news:
                sys.stdout.write(f"  ALERT {': '.join(filter(None, (alert.rule, alert.layer, alert.message)))}\n")
            sys.stdout.flush()
            count, again = count + len(news), again + len(seen.alerts) - len(news)
        told = f", {again} more told before" if again else ""
        sys.stdout.write(f"{counted(count, 'alert')}{told}; written to {out}\n")


def main(name: str) -> None:
    """Run `farms analyze`, `farms compare` or `farms watch`; a mistake is one line on stderr, and exit status 2.

    Exit status 1 of the first two: layers with NaN or Inf, or that cannot be read, are told and left out.
    """
    options = {"farms analyze": Analyze, "farms compare": Compare, "farms watch": Watch}[name]
    return_freed_memory()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home it tells at length where its fonts are
    with reported(name, when_stopped="; what was measured is kept, the same command goes on"), _warnings_told(name):
        tyro.cli(options, prog=name).run()


@contextlib.contextmanager
def _warnings_told(name: str) -> Generator[None]:
    """Tell each warning of the library once, in one line and in the words of the command line."""
    told: set[str] = set()

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        text = str(message).replace(SAY_IT, "say it with --axes NAME or --axes FILE, or leave them out with --exclude")
        if text not in told:
            told.add(text)
            sys.stderr.write(f"{name}: {text}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("always", AxesWarning)
        warnings.showwarning = tell
        yield


def _end_if(damaged: object) -> None:
    """End with exit status 1 where layers could not be measured, so that scripts do not go on with such a model."""
    if damaged:
        sys.stdout.flush()
        sys.exit(1)


def _checked(outputs: Mapping[str, Path | None]) -> dict[str, Path]:
    """Return the outputs that were asked for; a folder in place of a file is found before any long work."""
    wanted = {flag: path for flag, path in outputs.items() if path is not None}
    for flag, path in wanted.items():
        if path.is_dir():
            raise InputError(f"{flag} {path}: a folder; give the name of a file")
    return wanted


def _write(result: LayerTable, outputs: Mapping[str, Path], **options: Any) -> str:
    """Write a result by flag and path before it is shown, and return in lines where to."""
    for flag, path in outputs.items():
        try:
            getattr(result, f"write_{flag[2:]}")(path, **options)
        except BrokenPipeError:  # of --json /dev/stdout: nobody reads on
            raise
        except OSError as error:
            remedy = "free space, or name another file; what was measured is kept"
            raise InputError(f"{flag} {path}: cannot be written ({error.strerror or error}); {remedy}") from error
    return "".join(f"written to {path}\n" for path in outputs.values())


def _sort_column(name: str, columns: Sequence[Column]) -> Column:
    try:
        return find_column(name, columns)
    except InputError as error:
        raise InputError(f"--sort: {error}") from error


def _explain(source: WeightSource, layers: Mapping[str, Place], left_out: Iterable[tuple[str, str]]) -> None:
    why = {name: f"left out: {reason}" for name, reason in left_out}
    for leaf in {place.leaf.name: place.leaf for place in layers.values()}.values():
        read = f"a convolution of {leaf.shape[1]} positions" if leaf.is_kernel else "a layer"
        why[leaf.name] = f"{len(leaf.layers)} layers, each {read}" if leaf.axes.stack else read
    cells = [
        [name, "x".join(map(str, tensor.shape)) or "scalar", str(tensor.dtype), why[name]]
        for name, tensor in source.tensors.items()
    ]
    sys.stdout.write(text_table(["array", "shape", "dtype", "used"], cells, left=(0, 1, 2, 3)) + "\n")
    sys.stdout.write(f"{source.name}: {len(layers)} layers of {len(cells)} arrays\n")
