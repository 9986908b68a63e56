"""A checkpoint as a language model of lm-eval, without torch.

Importing this file registers the class with lm-eval as "farms_jax":
`lm_eval.simple_evaluate(model="farms_jax", model_args={"checkpoint": "path/to/model"}, tasks=[...])`.
Tokenisation, truncation and prefix token are those of lm-eval's own class for torch models.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from farms_jax.errors import InputError

from .checkpoints import Checkpoint, open_checkpoint
from .forward import apply_block, apply_embed, reader
from .models import Network, Part, State

_log = logging.getLogger(__name__)

_SHORTEST = 16  # shorter inputs are padded to it: fewer shapes to compile

# What lm-eval hands over: (context, continuation) as text, or None; and as ids.
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


class _Batch(NamedTuple):
    """Inputs that go through the network together; every length is padded to a power of two.

    Attributes:
        ids: distinct inputs (B, T), int32.
        rows: input of each request (R,), int32.
        positions: where its continuation is predicted (R, C), int32.
        targets: its continuation (R, C), int32.
        scored: what of `targets` is no padding (R, C), bool.
        requests: numbers of the requests, R of them less the padding.
    """

    ids: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    scored: np.ndarray
    requests: list[int]


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
            tokenizer: of `transformers`; default: the checkpoint's own.
            max_length: tokens that the model is given at most, longer input loses its start; default: all that it
                has positions for.
            batch_tokens: tokens of one forward pass, padding included; bounds the memory besides the weights.
            stream_tokens: `None` holds the whole model in memory, in float32; a number reads it anew, block by
                block, for every so many tokens, whose activations are held instead.
            special_tokens: let the tokenizer add those that it adds by default, such as a first BOS.

        Raises:
            InputError: a tensor is missing or of another shape, or a number is out of its range.
        """
        super().__init__()
        self._checkpoint = open_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
        self.network = self._checkpoint.network()
        self._read = reader(self._checkpoint.read, self.network)
        self.max_length = self.network.max_length if max_length is None else max_length
        if not 1 <= self.max_length <= self.network.max_length:
            raise InputError(f"max_length must be 1 to {self.network.max_length} for this model, got {max_length}")
        if batch_tokens < 1 or (stream_tokens is not None and stream_tokens < 1):
            raise InputError(f"tokens at a time must be above 0, got {batch_tokens=} {stream_tokens=}")
        self.tokenizer = self._checkpoint.tokenizer() if tokenizer is None else tokenizer
        self._batch_tokens, self._stream_tokens, self._special_tokens = batch_tokens, stream_tokens, special_tokens
        self._held: dict[Part, State] = {}
        held = self.network.parts if stream_tokens is None else ()
        for part in tqdm(held, desc="load model", leave=False, disable=not held):
            self._held[part] = self.network.to_state(part, self._read(part))

    def _state(self, part: Part) -> State:
        return self._held[part] if self._held else self.network.to_state(part, self._read(part))

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, where there is none EOS.

        Raises:
            InputError: the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise InputError("the tokenizer has neither a BOS nor an EOS token; name one in its tokenizer_config.json")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text; none are put before one that begins with the prefix token.

        Args:
            string: the text.
            add_special_tokens: as the tokenizer takes it; default: as the model was told.
            **kwargs: unused.
        """
        del kwargs
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = self._special_tokens and not begun
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows that overlap as little as can be.

        Args:
            requests: lm-eval's; the text is the first argument.
            disable_tqdm: show no progress bar.
        """
        windows: list[_Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            found: list[_Request] = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += found
            owners += [number] * len(found)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm)])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Refuse: the paper's tasks compare likelihoods, none generates.

        Args:
            requests: lm-eval's.
            disable_tqdm: unused.

        Raises:
            InputError: always.
        """
        del disable_tqdm
        raise InputError(
            f"{requests[0].task_name}: generates text, which the model class farms_jax does not; "
            "take a task that compares likelihoods, or export the model and evaluate it with lm-eval's own classes"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations given contexts.

        Args:
            requests: texts, ids of the context, ids of the continuation.
            disable_tqdm: show no progress bar.
            **kwargs: unused.

        Returns:
            For each its log-likelihood, and whether greedy decoding gives it.
        """
        del kwargs
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="score", unit=" requests", disable=disable_tqdm) as bar:
            for batches in self._waves(self._batches(requests)):
                for number, answer in self._answer(batches):
                    answers[number] = answer
                    bar.update()
                    text = requests[number][0]
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answer)
        return [answers[number] for number in range(len(requests))]

    def _inputs(self, request: _Request) -> tuple[int, ...]:
        """Return what the network is given: all but the last token, of those that fit.

        Args:
            request: with ids of context and continuation.

        Returns:
            Token ids, at least as many as the continuation has.

        Raises:
            InputError: a side is empty, the continuation too long, or an id outside the vocabulary.
        """
        text, context, continuation = request
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
        return tokens[:-1]

    def _batches(self, requests: Sequence[_Request]) -> Iterator[_Batch]:
        """Yield batches of distinct inputs, longest first, so that too little memory shows at once."""
        numbers: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            numbers.setdefault(self._inputs(request), []).append(number)
        if cut := sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests):
            _log.warning(
                "%d of %d inputs are longer than %d tokens and lose their start", cut, len(requests), self.max_length
            )
        # An input twice: answers of one token each, as in BoolQ, differ only in what is predicted.
        waiting = sorted(numbers, key=lambda inputs: (-len(inputs), inputs))
        while waiting:
            length = min(max(_power(len(waiting[0])), _SHORTEST), self.max_length)
            most = max(1, self._batch_tokens // length)
            fitting = [inputs for inputs in waiting[:most] if len(inputs) > length // 2 or length <= _SHORTEST]
            rows = min(_power(len(fitting)), most)
            yield _batch(fitting, [numbers[inputs] for inputs in fitting], requests, (rows, length))
            waiting = waiting[len(fitting) :]

    def _waves(self, batches: Iterator[_Batch]) -> Iterator[list[_Batch]]:
        """Yield batches that go through the network block by block together."""
        wave: list[_Batch] = []
        for batch in batches:
            wave.append(batch)
            if self._stream_tokens is None or sum(batch.ids.size for batch in wave) >= self._stream_tokens:
                yield wave
                wave = []
        if wave:
            yield wave

    def _answer(self, batches: list[_Batch]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield the answer to each request by its number.

        Args:
            batches: to score.

        Yields:
            Number of the request; log-likelihood, and whether greedy decoding gives the continuation.

        Raises:
            InputError: the network gives NaN.
        """
        state = self._state("embed")
        activations = [apply_embed(self.network, state, batch.ids) for batch in batches]
        for block in range(self.network.num_blocks):
            state = self._state(block)
            for number, x in enumerate(activations):  # in place: only one batch is held twice
                activations[number] = apply_block(self.network, state, x)
        state = self._state("head")
        for batch, x in zip(batches, activations, strict=True):
            logprobs, greedy = map(np.asarray, _score(self.network, state, x, *batch[1:-1]))
            totals = logprobs.astype(np.float64).sum(1)
            if np.isnan(totals).any():
                raise InputError("the network gives NaN; its weights are damaged, or too large for float32")
            for row, number in enumerate(batch.requests):
                yield number, (float(totals[row]), bool(greedy[row]))


# A call, for the decorator's type would hide the constructor's.
register_model("farms_jax")(JaxLM)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    network: Network,
    state: State,
    x: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
    scored: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities of targets (R, C), 0 at padding, and whether all of a row are the likeliest (R,)."""
    # Only where something is predicted: logits of all positions would be the largest array by far.
    logits = network.head(state, x[rows[:, None], positions])
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return jnp.where(scored, logprobs, 0), jnp.all((logits.argmax(-1) == targets) | ~scored, 1)


def _power(number: int) -> int:
    """Return the smallest power of two that is not below."""
    return 1 << (number - 1).bit_length()


def _batch(
    inputs: Sequence[tuple[int, ...]],
    numbers: Sequence[list[int]],
    requests: Sequence[_Request],
    shape: tuple[int, int],
) -> _Batch:
    """Put inputs into arrays.

    Args:
        inputs: distinct ones.
        numbers: of the requests of each.
        requests: all requests.
        shape: (B, T), at least as large as the inputs.

    Returns:
        The batch. Padding stands behind the inputs, where a causal network does not see it.
    """
    ids = np.zeros(shape, np.int32)
    owners = [(row, number) for row, group in enumerate(numbers) for number in group]
    longest = max(len(requests[number][2]) for _, number in owners)
    size = (_power(len(owners)), _power(longest))
    rows, positions, targets = np.zeros(size[0], np.int32), np.zeros(size, np.int32), np.zeros(size, np.int32)
    scored = np.zeros(size, bool)
    for row, tokens in enumerate(inputs):
        ids[row, : len(tokens)] = tokens
    for place, (row, number) in enumerate(owners):
        continuation, end = requests[number][2], len(inputs[row])
        rows[place] = row
        positions[place, : len(continuation)] = np.arange(end - len(continuation), end)
        targets[place, : len(continuation)] = continuation
        scored[place, : len(continuation)] = True
    return _Batch(ids, rows, positions, targets, scored, [number for _, number in owners])
