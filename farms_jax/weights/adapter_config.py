"""What the config of a PEFT adapter says of the weights: which model it changes, and how."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.errors import InputError, printable, short_repr
from farms_jax.weights.reading import read_json

ADAPTER_CONFIG = "adapter_config.json"
MERGE = "merge it with PEFT first: model.merge_and_unload().save_pretrained(FOLDER), and give that folder"
_SAVE_AGAIN = "save the adapter again"
_BASE_ALONE = "give the model that it was trained on alone"
_LARGEST = float(np.finfo(np.float32).max)
# Adapters that add inputs, and those that choose among factors by the input.
_NO_WEIGHTS = {
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
}
_BY_INPUT = {"XLORA", "POLY"}
# Options under which a layer is not its weight plus scale * B A.
_VARIANTS = {
    "layer_replication": "it repeats layers of the model, which is not known here",
    "use_qalora": "QA-LoRA sums its inputs in groups, which is not known here",
    "use_bdlora": "its factors are block-diagonal, which is not known here",
    "kasa_config": "KaSA cuts singular values off the model's weights, which is not known here",
    "monteclora_config": "MonteCLoRA draws its factors at random, which is not known here",
}
_CONDITIONAL = {
    "alora_invocation_tokens": "an activated LoRA works after its invocation tokens alone",
    "arrow_config": "Arrow chooses among adapters token by token",
}
# How factors start without a change of the model's own weights.
_PLAIN_STARTS = {True, False, None, "gaussian", "eva", "orthogonal", "mica"}
_COMPUTED_STARTS = {"pissa", "olora"}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What a LoRA adapter's config says.

    Attributes:
        trained_on: the model, as the config calls it.
        alphas: patterns of modules' names with their alpha, of which the first that fits counts; the last fits all.
        is_dora: whether the lengths of rows are learned apart.
        use_rslora: whether the scale is alpha / sqrt(r), not alpha / r.
        is_transposed: whether weights are (in, out), as in the Conv1D of GPT-2.
        start: "pissa" or "olora" where the product of the first factors was taken off the model's weights, else "".
        parameters: endings of the names of arrays that are changed though they are no `weight` of a module.
        tokens: endings of modules' names with the rows that are replaced; "" for every module.
        saved: names of modules that are saved whole, also such as the model does not have yet.
    """

    trained_on: str
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    is_dora: bool
    use_rslora: bool
    is_transposed: bool
    start: str
    parameters: tuple[str, ...]
    tokens: Mapping[str, list[int]]
    saved: tuple[str, ...]

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of B A."""
        alpha = next(alpha for rule, alpha in self.alphas if rule.fullmatch(module))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def rows(self, module: str) -> list[int] | None:
        """Return which rows of a module's weight are replaced; `None` if the config does not say."""
        return next((rows for end, rows in self.tokens.items() if not end or _ends(module, end)), None)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def read_config(path: Path) -> AdapterConfig:
    """Return what the file of a LoRA adapter's config says.

    Raises:
        InputError: it is damaged, or the adapter is no LoRA, or one whose weights cannot be computed here.
    """
    content = read_json(path, "give the folder of a PEFT adapter")
    _check_kind(path, content)
    tokens = content.get("trainable_token_indices") or {}
    tokens = {"": tokens} if isinstance(tokens, list) else tokens
    names = {option: content.get(option) or [] for option in ("target_parameters", "modules_to_save")}
    are_rows = isinstance(tokens, dict) and all(
        isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows) for rows in tokens.values()
    )
    for option, value in names.items():
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise InputError(f"{path}: {option} {short_repr(value)} is no list of names; {_SAVE_AGAIN}")
    if not are_rows:
        raise InputError(f"{path}: trainable_token_indices {short_repr(tokens)} has no lists of rows; {_SAVE_AGAIN}")
    start = content.get("init_lora_weights")
    return AdapterConfig(
        trained_on=printable(str(content.get("base_model_name_or_path"))),
        alphas=tuple(_read_alphas(path, content)),
        is_dora=bool(content.get("use_dora")),
        use_rslora=bool(content.get("use_rslora")),
        is_transposed=bool(content.get("fan_in_fan_out")),
        start=start.lower() if isinstance(start, str) and start.lower() in _COMPUTED_STARTS else "",
        parameters=tuple(names["target_parameters"]),
        tokens=tokens,
        saved=tuple(names["modules_to_save"]),
    )


def _check_kind(path: Path, content: Mapping[str, Any]) -> None:
    kind = printable(str(content.get("peft_type")))
    if kind in _NO_WEIGHTS:
        raise InputError(f"{path}: an adapter of the kind {kind} adds inputs and changes no weight; {_BASE_ALONE}")
    if kind in _BY_INPUT:
        raise InputError(f"{path}: an adapter of the kind {kind} changes weights by the input; {_BASE_ALONE}")
    if kind != "LORA":
        raise InputError(f"{path}: an adapter of the kind {kind}, only LORA is known; {MERGE}")
    for option, reason in _CONDITIONAL.items():
        if content.get(option):
            raise InputError(f"{path}: {reason}, so it has no weights of its own; {_BASE_ALONE}")
    for option, reason in _VARIANTS.items():
        if content.get(option):
            raise InputError(f"{path}: {reason} ({option}); {MERGE}")
    start = content.get("init_lora_weights")
    start = start.lower() if isinstance(start, str) else start
    if not isinstance(start, bool | str | None) or start not in _PLAIN_STARTS | _COMPUTED_STARTS:
        raise InputError(
            f"{path}: init_lora_weights {short_repr(start)} changed the model's weights before the training in a way "
            f"that the adapter does not tell; {MERGE}"
        )


def _read_alphas(path: Path, content: Mapping[str, Any]) -> list[tuple[re.Pattern[str], float]]:
    patterns = content.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: alpha_pattern {short_repr(patterns)} is no table; {_SAVE_AGAIN}")
    alphas = []
    for pattern, alpha in [*patterns.items(), (".*", content.get("lora_alpha"))]:
        try:
            # PEFT's rule: a key matches the end of a module's name, after a dot.
            rule = re.compile(rf"(.*\.)?({pattern})")
        except (re.error, OverflowError, RecursionError):
            rule = None
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) <= _LARGEST
        if rule is None or not is_number:
            raise InputError(
                f"{path}: lora_alpha or alpha_pattern has {short_repr(pattern)}: {short_repr(alpha)}; {_SAVE_AGAIN}"
            )
        alphas.append((rule, alpha))
    return alphas
