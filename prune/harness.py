"""A checkpoint as a language model of lm-eval, without torch.

Importing this file registers the class with lm-eval as "farms_jax":
`lm_eval.simple_evaluate(model="farms_jax", model_args={"checkpoint": "path/to/model"}, tasks=[...])`.
Tokenisation, truncation and prefix token are those of lm-eval's own class for torch models.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from farms_jax.errors import InputError

from .checkpoints import Checkpoint, open_checkpoint
from .forward import read_part
from .models import Part, State
from .scoring import Answer, Batch, Request, make_batches, score
from .tokenizing import encode

_log = logging.getLogger(__name__)

# A request of lm-eval: (context, continuation) as text, or None; and both as ids.
_Asked = tuple[tuple[str, str] | None, list[int], list[int]]


class JaxLM(TemplateLM):
    """A checkpoint as a language model of lm-eval; it scores text and does not generate any."""

    def __init__(
        self,
        checkpoint: Checkpoint | str,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        batch_tokens: int = 4096,
        stream_tokens: int | None = None,
        special_tokens: bool = True,
    ) -> None:
        """Check the checkpoint's tensors against its network and load them.

        Args:
            checkpoint: the model, or what `open_checkpoint` takes.
            tokenizer: a tokenizer of `transformers`; default: the checkpoint's own.
            max_length: longer input loses its start; default: the model's number of positions.
            batch_tokens: tokens of one forward pass, padding included; bounds the memory besides the weights.
            stream_tokens: `None` holds the whole model in memory, in float32; a number reads it anew, block by
                block, for every group of inputs of that many tokens, whose activations are held instead.
            special_tokens: let the tokenizer add those that it adds by default, such as a first BOS.

        Raises:
            InputError: a tensor is missing or of another shape, or a number is out of its range.
        """
        super().__init__()
        self._checkpoint = open_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
        self.network = self._checkpoint.network()
        self.max_length = self.network.max_length if max_length is None else max_length
        if not 1 <= self.max_length <= self.network.max_length:
            raise InputError(f"max_length must be 1 to {self.network.max_length} for this model, got {max_length}")
        if batch_tokens < 1 or (stream_tokens is not None and stream_tokens < 1):
            raise InputError(f"tokens at a time must be above 0, got {batch_tokens=} {stream_tokens=}")
        self.tokenizer = self._checkpoint.tokenizer() if tokenizer is None else tokenizer
        self._batch_tokens, self._stream_tokens, self._special_tokens = batch_tokens, stream_tokens, special_tokens
        held = self.network.parts if stream_tokens is None else ()
        parts = tqdm(held, desc="load model", leave=False, disable=not held)
        self._held = {part: self._load(part) for part in parts}

    def _load(self, part: Part) -> State:
        return self.network.to_state(part, read_part(self.network, part, self._checkpoint.read))

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that stands before a text without context: BOS, or EOS where there is none."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise InputError("the tokenizer has neither a BOS nor an EOS token; name one in its tokenizer_config.json")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text; none are put before one that begins with the prefix token."""
        del kwargs
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = self._special_tokens and not begun
        return encode(self.tokenizer, string, special_tokens=add_special_tokens).tolist()

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows that overlap as little as possible."""
        windows: list[_Asked] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            found: list[_Asked] = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += found
            owners += [number] * len(found)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [answer for answer, _ in self._loglikelihood_tokens(windows, disable_tqdm)])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raise an InputError: the paper's tasks compare likelihoods, none generates."""
        del disable_tqdm
        raise InputError(
            f"{requests[0].task_name}: generates text, which the model class farms_jax does not; "
            "take a task that compares likelihoods, or export the model and evaluate it with lm-eval's own classes"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[_Asked], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Answer]:
        del kwargs
        asked = [self._request(*request) for request in requests]
        if cut := sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests):
            _log.warning(
                "%d of %d inputs are longer than %d tokens and lose their start", cut, len(requests), self.max_length
            )
        state_of = self._held.__getitem__ if self._held else self._load
        answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), desc="score", unit=" requests", disable=disable_tqdm) as bar:
            for batches in self._groups(make_batches(asked, self.max_length, self._batch_tokens)):
                for number, answer in score(self.network, state_of, batches):
                    answers[number] = answer
                    bar.update()
                    text = requests[number][0]
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answer)
        return [answers[number] for number in range(len(requests))]

    def _request(self, text: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Request:
        """Cut a request to the tokens that fit; InputError where it cannot be scored."""
        shown = f"the continuation {text[1]!r}" if text else "a window of the text"
        if not context:
            raise InputError(f"the context of {shown} is nothing but spaces; give the task a doc_to_text with words")
        if not 1 <= len(continuation) <= self.max_length:
            raise InputError(f"{shown} has {len(continuation)} tokens, the model takes 1 to {self.max_length}")
        tokens = (*context, *continuation)[-self.max_length - 1 :]
        if max(tokens) >= self.network.vocab_size:
            raise InputError(
                f"{shown} has token {max(tokens)}, outside the model's vocabulary of {self.network.vocab_size}; "
                "use the model's own tokenizer"
            )
        return Request(tokens[:-1], continuation)

    def _groups(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Yield lists of batches that go through the network block by block together."""
        group: list[Batch] = []
        for batch in batches:
            group.append(batch)
            if self._stream_tokens is None or sum(batch.ids.size for batch in group) >= self._stream_tokens:
                yield group
                group = []
        if group:
            yield group


# A call, because the decorator's type would hide the constructor's.
register_model("farms_jax")(JaxLM)
