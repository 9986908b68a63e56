"""The tokenizer of a Hugging Face folder: its tokens are those of `tokenizer.json`, whatever class its config names.

Classes of `transformers` 5 may build a tokenizer anew from the vocabulary and the merges of the file, with their own
way to cut text into words. Where that is another way than the file's, it is the file that the model was trained with.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from farms_jax.errors import InputError
from farms_jax.programs.files import write_json

from ..tokenizing import check_ids, check_tokenizer, encode, tokenizer_faults

_log = logging.getLogger(__name__)

OWN, CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZERS = (OWN, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_OTHER = "give another one with --tokenizer PATH"
# The class that takes tokenizer.json as it is, under the name that all versions know. For some models (Qwen2)
# `transformers` 5 uses the model's class all the same, unless a class from elsewhere is named; that one is not loaded.
_PLAIN = "PreTrainedTokenizerFast"
_AS_IT_IS = ({"tokenizer_class": _PLAIN}, {"tokenizer_class": _PLAIN, "auto_map": {"AutoTokenizer": [_PLAIN, _PLAIN]}})
# Where rules differ: digits, spaces, ends of lines, letters of any kind, marks, code, and words without spaces.
_TEXT = (
    "In 2024 there were 7650841823 of them, 1,234.5 and 00.1; I'M sure they'll say DON'T  do   it.\n\n \n\tNext:\r\n"
    "Stra\u00dfe, na\u00efve cafe\u0301, \ufb01ne \uff21\uff22\uff23, \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\u043c\u0438\u0440, \u3053\u3093\u306b\u3061\u306f\u4e16\u754c, \uc548\ub155, \u0645\u0631\u062d\u0628\u0627, "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \U0001f642\U0001f469\u200d\U0001f467 \u00bd\u00b2 \u201cso\u201d \u2013 "
    "and\u2026 x\u00a0y\u200bz\ndef add(a: int, b=None) -> int:\n    return a+b  # the sum\n\tif (x!=y){z[i]+=1;}//\n"
    "<p>https://a.b/c?d=e&f=%20</p>   "
)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a Hugging Face folder; only files of the folder are read, and none of its code is run.

    It is the one of the class that the folder names, unless that has another rule than `tokenizer.json`: then the
    file's own rule is used, which a message says where tokens differ.

    Raises:
        InputError: There is none, or it cannot be loaded.
    """
    if not any((folder / filename).is_file() for filename in TOKENIZERS):
        raise InputError(f"{folder}: there is no tokenizer in it; give a folder that has one with --tokenizer PATH")
    own, fault = _own(folder), ""
    try:
        tokenizer = _by_class(folder)
        if own is None or _has_rule(tokenizer, own):
            return tokenizer
        if not _gives_tokens(tokenizer, own):
            fault = f"its class {type(tokenizer).__name__} gives other tokens"
    except InputError as error:
        if own is None:
            raise
        fault, unloadable = "its class cannot be loaded", error
        try:
            tokenizer = _as_it_is(folder)
        except InputError:
            raise unloadable from None
    else:
        tokenizer = _as_it_is(folder)
    if not _gives_tokens(tokenizer, own):
        raise InputError(f"{folder}: transformers gives other tokens than {OWN}, which cannot be right; {_OTHER}")
    if fault:
        _log.warning("%s: the tokens are those of %s: %s", folder, OWN, fault)
    return tokenizer


def declare_own_rule(folder: Path) -> None:
    """Have `AutoTokenizer` give the tokens of a folder's `tokenizer.json`: name the plain class where another differs.

    Nothing is changed where the class that is named has the file's rule, or the file cannot be read alone.

    Raises:
        InputError: `AutoTokenizer` gives other tokens whatever class is named.
    """
    own, path = _own(folder), folder / CONFIG
    if own is None or _class_has_rule(folder, own):
        return
    before = path.read_bytes() if path.is_file() else b"{}"
    for change in _AS_IT_IS:
        write_json(path, json.loads(before) | change)
        if _class_has_rule(folder, own):
            if "auto_map" in change:
                _log.warning("%s: AutoTokenizer gives the model's tokens without trust_remote_code alone", folder)
            return
    raise InputError(
        f"{folder}: AutoTokenizer of transformers gives other tokens than {OWN}, whatever class is named; {_OTHER}"
    )


def _class_has_rule(folder: Path, own: Tokenizer) -> bool:
    try:
        return _has_rule(_by_class(folder), own)
    except InputError:  # it cannot be loaded
        return False


def _own(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of `tokenizer.json`; `None` where there is none, or none that can be read alone."""
    if not (folder / OWN).is_file():
        return None
    try:
        with tokenizer_faults(f"{folder / OWN}: cannot be read", _OTHER):
            own = Tokenizer.from_file(str(folder / OWN))
            check_ids(own.get_vocab())
    except InputError:
        return None
    own.no_truncation()
    own.no_padding()
    return own


def _by_class(folder: Path) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415

    with tokenizer_faults(f"{folder}: its tokenizer cannot be loaded", _OTHER):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_tokenizer(tokenizer)
    return tokenizer


def _as_it_is(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast, logging as messages  # noqa: PLC0415

    verbosity = messages.get_verbosity()
    messages.set_verbosity_error()  # it would warn that the class is not the one that is named
    try:
        with tokenizer_faults(f"{folder}: its tokenizer cannot be loaded", _OTHER):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            check_tokenizer(tokenizer)
    finally:
        messages.set_verbosity(verbosity)
    return tokenizer


def _has_rule(tokenizer: Any, own: Tokenizer) -> bool:
    """Return whether a tokenizer cuts and merges text by the file's rule, whatever the text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _gives_tokens(tokenizer, own)
    theirs, ours = (_plainly(json.loads(each.to_str())) for each in (backend, own))
    same = all(theirs[part] == ours[part] for part in ("normalizer", "pre_tokenizer", "model"))
    return same and _same_tokens(tokenizer, own, "a")  # with those that stand at the ends


def _plainly(rule: Any) -> Any:
    """Return a rule without what changes no token: offsets, and empty text for none."""
    if isinstance(rule, dict):
        lists = {"vocab", "merges"} & rule.keys()  # long, and always written alike
        kept = {key: value for key, value in rule.items() if key != "trim_offsets"}
        return {key: value if key in lists else _plainly(value) for key, value in kept.items()}
    return [_plainly(value) for value in rule] if isinstance(rule, list) else rule or None


def _gives_tokens(tokenizer: Any, own: Tokenizer) -> bool:
    """Return whether a tokenizer gives the file's tokens, of a text with everything that rules differ in."""
    ids = sorted(own.get_vocab(with_added_tokens=False).values())
    words = [own.decode([token]) for token in ids[:: max(len(ids) // 2000, 1)]]
    return _same_tokens(tokenizer, own, "".join([_TEXT, *words, _TEXT, " ".join(words)]))


def _same_tokens(tokenizer: Any, own: Tokenizer, text: str) -> bool:
    def same(ends: bool) -> bool:
        theirs = _tokens(lambda: encode(tokenizer, text, special_tokens=ends).tolist())
        return theirs == _tokens(lambda: own.encode(text, add_special_tokens=ends).ids)

    return same(False) and same(True)


def _tokens(encoded: Callable[[], list[int]]) -> list[int] | None:
    """Return tokens, `None` where the text has letters that the tokenizer does not take."""
    try:
        with tokenizer_faults("the text cannot be encoded", _OTHER):
            return encoded()
    except InputError:
        return None
