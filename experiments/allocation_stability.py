"""How much the sparsity of each block hangs on the windows (paper, appendix C.8 and Figure 13).

    python -m experiments.allocation_stability --model FILE.gguf

Sparsities of all blocks under every window of Table 6, beside AlphaPruning, which looks at whole matrices. Nothing is
pruned. If `experiments.window_grid` has been run into the same folder on the same settings, its best and worst windows
are marked.
"""

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from experiments import _grid
from experiments._common import BASELINE, NOISE, Result, figure, label, run
from experiments._grid import Setting
from prune.job import prepare


def main() -> None:
    """Run the experiment."""
    run("allocation_stability", __doc__, _grid.options, experiment)


def experiment(args: argparse.Namespace) -> Result:
    """Allocate sparsity to the blocks under all settings.

    Args:
        args: the options.

    Returns:
        Rows: sparsity by setting and block. Summary: by setting the extremes, the mean distance to the mean of all
        windows, and to AlphaPruning. Facts: the `model`, and `deviation`, the standard deviation over windows, averaged
        over blocks, with that over blocks beside it: windows matter little where the first is far below the second.
    """
    job = prepare(_grid.config_of(args))
    settings = _grid.grid(args, job)
    found = {
        setting: _grid.by_block(_grid.allocate(_grid.under(job, setting)))
        for setting in tqdm(settings, desc="allocation_stability", unit="setting")
    }
    windows = np.array([values for setting, values in found.items() if setting.allocation == "farms"])
    alphapruning, mean = found[Setting("alphapruning")], windows.mean(0)
    summary = [
        {
            "setting": str(setting),
            "lowest": float(values.min()),
            "highest": float(values.max()),
            "from_mean_window": float(np.abs(values - mean).mean()),
            "from_alphapruning": float(np.abs(values - alphapruning).mean()),
        }
        for setting, values in found.items()
    ]
    rows = [
        {"setting": str(setting), "block": block, "sparsity": float(value)}
        for setting, values in found.items()
        for block, value in enumerate(values)
    ]
    deviation = {"over_windows": float(windows.std(0).mean()), "over_blocks": float(mean.std())}
    drawing = draw(found, perplexities(args.out / "window_grid.json", job.weights, args), job.checkpoint.name)
    return Result(rows, summary, {"model": job.checkpoint.name, "deviation": deviation}, drawing)


def perplexities(path: Path, weights: str, args: argparse.Namespace) -> dict[str, float]:
    """Read perplexities by setting of `experiments.window_grid`; none where it ran on something else, or not at all."""
    if not path.is_file():
        return {}
    found = _grid.read_json(path)
    same = all(found["settings"].get(key) == getattr(args, key) for key in ("sparsity", "epsilon", "tail"))
    if not same or found.get("weights") != weights:
        return {}
    return {row["setting"]: row["perplexity"] for row in found["summary"]}


def draw(found: dict[Setting, np.ndarray], perplexity: dict[str, float], model: str) -> Figure:
    """Draw sparsity against block: windows thin and coloured by their size, the best and the worst thick."""
    drawing, (axis,) = figure(9.6, 4.0)
    for setting, style in _styles(found, perplexity).items():
        axis.plot(range(len(found[setting])), found[setting], **style)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    label(axis, f"{model}: sparsity of each block, a line per setting", "block", "fraction of weights removed")
    return drawing


def _styles(found: Collection[Setting], perplexity: Mapping[str, float]) -> dict[Setting, dict[str, Any]]:
    """Return how to draw every setting, in the order of the legend: one entry per window size, and the marked ones."""
    windows = [setting for setting in found if setting.rows]
    sizes = sorted({setting.rows or 0 for setting in windows})
    colours = dict(zip(sizes, mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(sizes))), strict=True))
    styles: dict[Setting, dict[str, Any]] = {
        Setting("uniform"): {"color": NOISE, "ls": ":", "lw": 1.2, "label": "uniform"},
        Setting("alphapruning"): {"color": BASELINE, "ls": "--", "lw": 2, "label": "AlphaPruning: whole matrices"},
    }
    ranked = sorted((setting for setting in windows if str(setting) in perplexity), key=lambda s: perplexity[str(s)])
    marked = {ranked[0]: "best", ranked[-1]: "worst"} if len(ranked) > 1 else {}
    for size in sizes:
        thin = [setting for setting in windows if setting.rows == size and setting not in marked]
        for setting in thin:
            styles[setting] = {"color": colours[size], "lw": 1, "alpha": 0.8}
        if thin:
            styles[thin[0]]["label"] = f"windows of {size} rows"
    for setting, place in marked.items():
        styles[setting] = {"color": colours[setting.rows or 0], "lw": 2.8, "label": f"{place} perplexity: {setting}"}
    return styles


if __name__ == "__main__":
    main()
