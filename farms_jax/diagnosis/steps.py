"""What to do after a diagnosis: what stands out, what that usually means, and what to try, with the command for it."""

import re
import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from farms_jax._names import block_of
from farms_jax._present import counted
from farms_jax.diagnosis.columns import Row, number
from farms_jax.diagnosis.exports import prunable
from farms_jax.diagnosis.status import GOOD, UNSURE, UNTOLD
from farms_jax.diagnosis.summary import grouped, telling_types
from farms_jax.errors import listed

_MOST = 0.8  # share of the layers from which on noise is said of the model
LIKE_NOISE = {"undertrained", "spiked", "flat"}
_PRUNED_HERE = {"q", "k", "v", "o", "gate", "up", "down"}  # types of the networks that `farms prune` knows
_HALF = 0.5  # share of a type's or a block's layers from which on it stands out
_PATTERNS = 4  # layers that are named in a command

# What a status usually means, and what to try.
_ADVICE: dict[str, tuple[str, str]] = {
    "degenerate": (
        "dead units, a layer that is not used, a factorised or a strongly pruned one",
        "if it is meant to be so, leave these layers out of what follows; if not, look at them first",
    ),
    "over-correlated": (
        "a few directions carry the layer: often too large a rate, strong weight decay, or too long on too little data",
        "compare with an earlier checkpoint; train on with smaller rates, or less weight decay, for these layers",
    ),
    "undertrained": (
        "training has moved these layers least: frozen, too small a rate, or with little to learn",
        "to train on, give them larger rates; to prune, start with them; a frozen layer needs nothing",
    ),
    "spiked": (
        "noise but for a few directions: training has moved them little, as early on, or their weights share a mean",
        "nothing by itself; if the loss still falls, train longer, with larger rates for these layers",
    ),
    "flat": (
        "their eigenvalues are more equal than noise: an orthogonal initialisation or constraint",
        "nothing, where that is wanted; else train longer, as alpha says little of such layers",
    ),
}
_UNTRAINED = (
    "the model before training or early in it, or another's weights than you meant",
    "check which checkpoint this is; if it is the one, train it longer",
)


class Step(NamedTuple):
    """One step: what was found, what it usually means, what to try, and the commands or lines of Python that do it."""

    found: str
    means: str
    attempt: str
    code: tuple[str, ...] = ()


_TOO_FEW = Step(
    "no layer has enough eigenvalues to be told from noise",
    "depthwise kernels, or matrices of a few outputs or inputs",
    "go by their norms and ranks, not by alpha: the table has them as CSV",
)


def steps(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[Step]:
    """Return what to do, the most urgent first; `facts` has the model's path and format, and its damaged layers."""
    damaged = [_damaged(facts["damaged"])] if facts.get("damaged") else []
    return damaged + _steps_of(rows, facts)


def _damaged(damaged: Mapping[str, str]) -> Step:
    """Return the step of layers that could not be measured, by name with the reason."""
    told = listed([f"{name} ({reason})" for name, reason in damaged.items()], 5, ", ")
    return Step(
        f"{counted(len(damaged), 'layer')} not measured: {told}",
        "NaN or Inf: the training diverged, or numbers went over the range of their dtype; else a damaged file",
        "take an earlier checkpoint, or write this one again; the other layers may be of a run that has gone wrong",
    )


def _steps_of(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[Step]:
    """Return what to do about the layers that were measured."""
    path = "" if facts.get("format") in {None, "pytree"} or not facts.get("path") else shlex.quote(str(facts["path"]))
    telling = [row for row in rows if row.get("status") != UNSURE]
    told = [status for status in _ADVICE if any(row.get("status") == status for row in rows)]
    if count := mostly_noise(rows):  # whose differences are chance
        noise = Step(f"{count} of {len(rows)} layers are as noise, or nearly", *_UNTRAINED)
        return [noise, *(_step(status, rows, path) for status in told if status not in LIKE_NOISE)]
    found = [_step(status, rows, path) for status in told]
    if not found and not facts.get("damaged") and any(row.get("status") == GOOD for row in rows):
        heavy = "all have heavier tails than noise, none too heavy"
        nothing = "nothing, by the weights alone: only held-out data tell whether the model generalises"
        found.append(Step("no layer stands out", heavy, nothing))
    if rows and not telling:
        found.append(_TOO_FEW)
    telling = [row for row in telling if row.get("status") not in UNTOLD and number(row, "alpha") is not None]
    trained = [row for row in telling if row.get("status") not in LIKE_NOISE]
    if trained and len(telling) > 1:
        found.append(_balance(telling, path))
    if any(number(row, "alpha") for row in prunable(rows)):
        found.append(_prune(rows, path))
    return found


def mostly_noise(rows: Sequence[Row]) -> int:
    """Return how many layers are as noise, or nearly, where those are most of several; else 0."""
    count = sum(row.get("status") in LIKE_NOISE for row in rows)
    telling = sum(row.get("status") != UNSURE for row in rows)
    return count if telling > 1 and count >= _MOST * telling else 0


def _step(status: str, rows: Sequence[Row], path: str) -> Step:
    own = [row for row in rows if row.get("status") == status]
    means, attempt = _ADVICE[status]
    of_all = f"{len(own)} of {len(rows)} layers {'is' if len(own) == 1 else 'are'} {status}"
    code: tuple[str, ...] = ()
    if path and status == "degenerate" and len(own) <= _PATTERNS:
        pattern = "|".join(re.escape(row["layer"]) for row in own)
        code = (f"farms analyze {path} --exclude {shlex.quote(pattern)}",)
    elif path and status == "over-correlated":
        code = (f"farms compare EARLIER {path}",)
    return Step(of_all + _where(status, rows), means, attempt, code)


def _where(status: str, rows: Sequence[Row]) -> str:
    """Return which types and blocks have most of a status, or the one layer; empty where none stands out."""
    own = [row["layer"] for row in rows if row.get("status") == status]
    if len(own) == 1:
        return f": {own[0]}"
    types = [(sum(row.get("status") == status for row in group.rows), group) for group in telling_types(rows)]
    types = [(count, group) for count, group in types if count]
    shown = [f"{count} of {len(group.rows)} {group.name}" for count, group in sorted(types, key=lambda pair: -pair[0])]
    held = {
        group.name: count
        for group in grouped(rows, lambda row: block_of(row["layer"]))
        if len(group.rows) > 1
        and (count := sum(row.get("status") == status for row in group.rows)) >= _HALF * len(group.rows)
    }
    # Only where these blocks tell of most of them, and are fewer.
    telling = sum(held.values()) >= _HALF * len(own) and len(held) <= len(own) / 2
    by_block = f"half or more of {listed(list(held), 3, ', ')}" if telling else ""
    if by_block and all(count < _HALF * len(group.rows) or len(group.rows) == 1 for count, group in types):
        return f": {by_block}"
    return "".join(f"{mark} {part}" for mark, part in ((":", listed(shown, 4, ", ")), (";", by_block)) if part)


def _balance(rows: Sequence[Row], path: str) -> Step:
    alphas = [row["alpha"] for row in rows]
    means = sorted((fmean(group.alphas), group.name) for group in telling_types(rows))
    spread = f"alpha goes from {min(alphas):.2f} to {max(alphas):.2f}"
    if len(means) > 1:
        spread += f"; by type from {means[0][0]:.2f} ({means[0][1]}) to {means[-1][0]:.2f} ({means[-1][1]})"
    write = f"farms analyze {path} --rates rates.json" if path else 'diagnosis.write_rates("rates.json")'
    if any("." in row["layer"] for row in rows):
        use = (
            "import json, torch",
            'rates = json.load(open("rates.json"))["factors"]',
            'groups = [{"params": [p], "lr": 1e-4 * rates.get(n, 1.0)} for n, p in model.named_parameters()]',
            "optimizer = torch.optim.AdamW(groups)",
        )
    else:
        use = (
            "import farms_jax.diagnosis, jax, optax",
            'scale = farms_jax.diagnosis.read_rates("rates.json", params)',
            "by_layer = optax.stateless(lambda updates, _: jax.tree.map(jax.numpy.multiply, updates, scale))",
            "optimizer = optax.chain(optax.adamw(1e-3), by_layer)",
        )
    attempt = "if you train on, balance the layers: larger rates (TempBalance) or more decay where alpha is large"
    return Step(spread, "layers differ in how far they are trained", attempt, (write, *use))


def _prune(rows: Sequence[Row], path: str) -> Step:
    layers = prunable(rows)
    means = [fmean(group.alphas) for group in grouped(layers, lambda row: block_of(row["layer"])) if group.alphas]
    code = [f"farms analyze {path} --sparsity 0.5 --recipe recipe.yaml"]
    if not path:
        code = ['diagnosis.write_recipe("recipe.yaml", sparsity=0.5)']
    known = all(row["layer"].startswith("model.") and row.get("type") in _PRUNED_HERE for row in layers)
    if path and known and not any(row.get("type") == "router" for row in rows):
        code.append(f"farms prune --model {path} --sparsity 0.5")
    found = f"the mean alpha of the {len(means)} blocks goes from {min(means):.2f} to {max(means):.2f}"
    attempt = "if you prune, remove more where alpha is large: a recipe for llm-compressor, or farms prune"
    return Step(found, "some blocks can lose more weights than others", attempt, tuple(code))
