r"""Training quality with a known truth: alignment against alpha (paper, appendix D.2 and Figure 14).

    python -m experiments.teacher_student

The teacher is tanh(x . beta) with a unit vector beta; the student a . tanh(W x), of which only W is trained, by
stochastic gradient descent on inputs that are never seen twice. Alignment is |v . beta|, v the first right singular
vector of W: how well the student has found the one direction there is. Students differ in width, so their W differ in
aspect ratio; of each the checkpoint with the highest alignment is measured. A measure of training quality has to fall
where alignment rises.

The paper gives neither its activations, nor scales, nor rates; here W begins with variance 1 / inputs, the second layer
has a norm of `--gain`, small, so that the student has to learn the feature, and the rate is `--rate` / gain^2. With a
gain near 1 the output fits while W hardly moves, and no measure of W tells students apart.
"""

import argparse
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.linalg import eigh
from scipy.stats import spearmanr
from tqdm import tqdm

import farms_jax
from experiments._common import BASELINE, FARMS, Result, figure, label, positive, run
from farms_jax.errors import InputError

_CHECK = 5  # steps between two measurements of the alignment
_ALIGNMENT = "#009E73"


class Student(NamedTuple):
    """A trained student at its best checkpoint.

    Attributes:
        start: W before training, (width, inputs).
        weights: W, (width, inputs).
        alignment: with the teacher, in [0, 1].
        step: of the checkpoint.
    """

    start: np.ndarray
    weights: np.ndarray
    alignment: float
    step: int


def main() -> None:
    """Run the experiment."""
    run("teacher_student", __doc__, options, experiment)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this experiment."""
    widths = [125, 177, 250, 354, 500, 707, 1000, 1414, 2000]
    parser.add_argument("--inputs", type=positive, default=500, help="dimension of an input; the paper's")
    parser.add_argument("--widths", nargs="+", type=positive, default=widths, help="of the students")
    parser.add_argument("--repeats", type=positive, default=5, help="students of each width")
    parser.add_argument("--steps", type=positive, default=35)
    parser.add_argument("--batch", type=positive, default=1000, help="inputs of a step")
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--gain", type=float, default=0.3, help="norm of the second layer")
    parser.add_argument("--window", type=positive, default=100, help="rows and columns of a FARMS window")


def experiment(args: argparse.Namespace) -> Result:
    """Train and measure students of every width.

    Args:
        args: the options.

    Returns:
        Rows: one per student. Summary: means by width. Facts: `correlation` of alignment with alpha, by method:
        Pearson's and Spearman's over the summary's rows, and Pearson's over students.

    Raises:
        InputError: there are fewer than three widths, or windows do not fit the narrowest student.
    """
    if len(set(args.widths)) < 3:
        raise InputError(f"--widths: a correlation needs at least three different ones, got {args.widths}")
    if args.window > min(*args.widths, args.inputs):
        raise InputError(
            f"--window {args.window} does not fit all of --widths {args.widths} and --inputs {args.inputs}"
        )
    if not (args.gain > 0 and args.rate > 0):
        raise InputError(f"--gain and --rate must be above 0, got {args.gain} and {args.rate}")
    cases = [(width, seed) for width in sorted(set(args.widths)) for seed in range(args.repeats)]
    bar = tqdm(cases, desc="teacher_student", unit="student", leave=False)
    students = [train(args, width, seed) for width, seed in bar]
    rows = [
        {"width": width, "seed": seed, "step": student.step, "alignment": student.alignment}
        for (width, seed), student in zip(cases, students, strict=True)
    ]
    for suffix, part in (("", "weights"), ("_at_start", "start")):
        alphas = measure([getattr(student, part) for student in students], args.window)
        for method, values in alphas.items():
            for row, value in zip(rows, values, strict=True):
                row[method + suffix] = value
    measures = ("alignment", "baseline", "farms", "baseline_at_start", "farms_at_start")
    summary = [
        {
            "width": width,
            **{key: float(np.mean([row[key] for row in rows if row["width"] == width])) for key in measures},
        }
        for width in sorted(set(args.widths))
    ]
    return Result(rows, summary, {"correlation": correlations(summary, rows)}, draw(summary, rows, args.inputs))


def train(args: argparse.Namespace, width: int, seed: int) -> Student:
    """Train a student.

    Args:
        args: the options.
        width: of the student.
        seed: of teacher, student and inputs.

    Returns:
        The student where its alignment is highest.
    """
    teacher_key, weights_key, second_key, inputs_key = jax.random.split(jax.random.key(seed), 4)
    teacher = jax.random.normal(teacher_key, (args.inputs,))
    teacher /= jnp.linalg.norm(teacher)
    weights = jax.random.normal(weights_key, (width, args.inputs)) / args.inputs**0.5
    second = args.gain * jax.random.normal(second_key, (width,)) / width**0.5
    start = np.asarray(weights)
    best = Student(start, start, alignment(weights, teacher), 0)
    for step in range(0, args.steps, _CHECK):
        count = min(_CHECK, args.steps - step)
        key = jax.random.fold_in(inputs_key, step)
        weights = _descend(weights, second, teacher, key, args.rate / args.gain**2, count, args.batch)
        found = alignment(weights, teacher)
        if found > best.alignment:
            best = Student(start, np.asarray(weights), found, step + count)
    return best


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def _descend(weights: Array, second: Array, teacher: Array, key: Array, rate: float, steps: int, batch: int) -> Array:
    """Take steps of stochastic gradient descent, each on a batch of its own."""

    def loss(weights: Array, inputs: Array) -> Array:
        error = jnp.tanh(inputs @ weights.T) @ second - jnp.tanh(inputs @ teacher)
        return (error**2).mean() / 2

    def step(index: Array, weights: Array) -> Array:
        inputs = jax.random.normal(jax.random.fold_in(key, index), (batch, teacher.size))
        return weights - rate * jax.grad(loss)(weights, inputs)

    return jax.lax.fori_loop(0, steps, step, weights)


def alignment(weights: Array, teacher: Array) -> float:
    """Return |v . teacher| of the first right singular vector v of the weights, (width, inputs)."""
    gram = np.asarray(weights.T @ weights)
    last = gram.shape[0] - 1
    _, vector = eigh(gram, subset_by_index=[last, last])
    return float(abs(vector[:, 0] @ np.asarray(teacher)))


def measure(weights: list[np.ndarray], window: int) -> dict[str, list[float]]:
    """Return the alphas of whole matrices, `baseline`, and of square windows of so many rows, `farms`."""
    windows = {"baseline": None, "farms": farms_jax.Window(rows=window)}
    layers = dict(enumerate(weights))
    reports = {m: farms_jax.analyze(layers, window=w, axes=farms_jax.TORCH_AXES) for m, w in windows.items()}
    return {method: jax.device_get(report.alpha).tolist() for method, report in reports.items()}


def correlations(summary: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how alignment and alpha go together, by method."""
    found = {}
    for method in ("baseline", "farms"):
        x, y = ([row[key] for row in summary] for key in ("alignment", method))
        students = np.corrcoef([row["alignment"] for row in rows], [row[method] for row in rows])
        rank = np.asarray(spearmanr(x, y))[0]
        found[method] = {"pearson": float(np.corrcoef(x, y)[0, 1]), "spearman": float(rank)}
        found[method]["pearson_students"] = float(students[0, 1])
    return found


def draw(summary: list[dict[str, Any]], rows: list[dict[str, Any]], inputs: int) -> Figure:
    """Draw by method alignment and alpha against width."""
    drawing, axes = figure(9.6, 3.7, 1, 2)
    found = correlations(summary, rows)
    kinds = (("baseline", "Baseline: whole matrices", BASELINE), ("farms", "FARMS: square windows", FARMS))
    for axis, (method, title, colour) in zip(axes, kinds, strict=True):
        _curves(axis, summary, rows, method, colour)
        axis.axvline(inputs, color="k", lw=0.6, alpha=0.4)
        correlation = found[method]["spearman"]
        label(
            axis, f"{title} (rank correlation {correlation:+.2f})", f"width of the student; {inputs} is square", "alpha"
        )
        axis.yaxis.label.set_color(colour)
    lines = [
        Line2D([], [], color="k", marker="o", ms=4.5, lw=1.4, label="alpha"),
        Line2D([], [], color="k", ls=":", lw=1.2, label="alpha before training"),
        Line2D([], [], color=_ALIGNMENT, marker="s", ms=4.5, ls="--", lw=1.4, label="alignment"),
    ]
    drawing.legend(handles=lines, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    return drawing


def _curves(axis: Axes, summary: list[dict[str, Any]], rows: list[dict[str, Any]], method: str, colour: str) -> None:
    """Draw alpha and, on an axis of its own, alignment: students as dots, means as lines."""
    other = axis.twinx()
    other.spines["top"].set_visible(False)
    other.tick_params(labelsize=8.5, labelcolor=_ALIGNMENT)
    other.set_ylabel("alignment with the teacher", fontsize=9.5, color=_ALIGNMENT)
    axis.tick_params(axis="y", labelcolor=colour)
    x, widths = ([row["width"] for row in table] for table in (rows, summary))
    for plot, key, tint, style in ((other, "alignment", _ALIGNMENT, "s--"), (axis, method, colour, "o-")):
        plot.plot(x, [row[key] for row in rows], ".", color=tint, ms=4, alpha=0.3)
        plot.plot(widths, [row[key] for row in summary], style, color=tint, ms=4.5, lw=1.4)
    axis.plot(widths, [row[f"{method}_at_start"] for row in summary], ":", color=colour, lw=1.2)
    axis.set_xscale("log")
    axis.set_xticks(widths, [str(width) for width in widths], rotation=45)
    axis.minorticks_off()


if __name__ == "__main__":
    main()
