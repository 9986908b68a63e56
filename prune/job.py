"""Everything that a run needs, opened and checked before long work begins."""

import dataclasses
import functools
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from farms_jax.errors import InputError, listed

from .checkpoints import Checkpoint, choose_tokenizer, open_checkpoint
from .config import BUNDLED, Config, resolve
from .models import Network
from .precision import Precision, choose_precision, converted, largest_magnitude, needs_largest
from .publishing import check_push
from .record import FORMAT
from .texts import Samples, are_token_ids, calibration_samples, evaluation_blocks


class Texts:
    """The texts of a run, each read when it is first asked for: a dry run may need none of them."""

    def __init__(self, config: Config, checkpoint: Checkpoint, vocab_size: int) -> None:
        """Take resolved settings, and the model whose tokenizer is used unless they name another."""
        assert config.length and config.calibration and config.text
        self._config, self._checkpoint = config, checkpoint
        self._sources = {
            "calibration": config.calibration,
            "text": config.text,
            "training": config.recover_text or config.calibration,
        }
        self._common = {
            "length": config.length,
            "special_tokens": config.special_tokens,
            "vocab_size": vocab_size,
        }

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; `None` where the texts are token ids, and no other is given."""
        needed = not are_token_ids(*self._sources.values())
        return choose_tokenizer(self._checkpoint, self._config.tokenizer, needed=needed)

    @functools.cached_property
    def evaluation(self) -> Samples:
        """The blocks that perplexity is measured on."""
        return evaluation_blocks(self._sources["text"], self.tokenizer, limit=self._config.limit, **self._common)

    @functools.cached_property
    def calibration(self) -> Samples:
        """Calibration samples, then those held out, see `Config.held_out`."""
        config = self._config
        return calibration_samples(
            self._sources["calibration"],
            self.tokenizer,
            count=config.samples + config.held_out,
            seed=config.seed,
            held_out=config.held_out,
            **self._common,
        )

    @functools.cached_property
    def training(self) -> Samples | None:
        """What the whole pruned model is trained on; `None` where it is not."""
        config = self._config
        if config.fine_tuning() is None:
            return None
        source, count = self._sources["training"], config.recover_samples or config.samples
        return calibration_samples(
            source, self.tokenizer, count=count, seed=config.seed, flag="--recover-text", **self._common
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs of a run, opened and checked."""

    config: Config  # resolved
    checkpoint: Checkpoint  # the dense model, in the precision that is written
    network: Network
    texts: Texts
    precision: Precision
    weights: str  # SHA-256 of all tensors of the source: names, dtypes, shapes, values; empty in a dry run

    @property
    def key(self) -> str:
        """Hash of all that the pruned weights and the figures depend on: the same key, the same run."""
        facts = [FORMAT, self.config.numbers(), self.weights, version("farms-jax"), version("jax")]
        texts = (self.calibration, self.evaluation, self.training)
        facts += [samples.record["ids_sha256"] for samples in texts if samples]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def calibration(self) -> Samples:
        """Calibration samples: `config.samples` for statistics, then `config.held_out`."""
        return self.texts.calibration

    @property
    def evaluation(self) -> Samples:
        """Blocks that perplexity is measured on."""
        return self.texts.evaluation

    @property
    def training(self) -> Samples | None:
        """Samples that the whole pruned model is trained on; `None` where it is not."""
        return self.texts.training

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; `None` where the texts are token ids, and no other is given."""
        return self.texts.tokenizer

    @property
    def seen(self) -> np.ndarray:
        """Token ids (samples, T) for the statistics."""
        return self.calibration.ids[: self.config.samples]

    @property
    def unseen(self) -> np.ndarray:
        """Token ids (M, T) held out from the statistics, to judge allocations by; none unless one is to be judged."""
        return self.calibration.ids[self.config.samples :]

    @property
    def path(self) -> Path:
        """Directory of the run."""
        config = self.config
        kind = f"{config.groups.replace(':', 'of')}-" if config.groups else ""
        name = f"{self.checkpoint.name}-{config.method}-{config.allocation}-{kind}{config.sparsity:g}-{self.key[:8]}"
        return config.out / "".join(c if c.isalnum() or c in "-._" else "-" for c in name)


def prepare(config: Config) -> Job:
    """Return the job for settings as given on the command line; InputError where a setting or an input is unusable.

    For a dry run, neither texts nor weights are read here.
    """
    config.check()
    if config.push and not config.dry_run:
        check_push(config.push)
    source = open_checkpoint(config.model or str(BUNDLED))
    network = source.network()
    config = resolve(config, network)
    texts, weights, largest = Texts(config, source, network.vocab_size), "", None
    if not config.dry_run:
        _ = texts.evaluation, texts.calibration, texts.training
        weights, largest = _examine(source, needs_largest(config.dtype, source))
    precision = choose_precision(config.dtype, source, largest)
    return Job(config, converted(source, precision), network, texts, precision, weights)


def _examine(checkpoint: Checkpoint, with_largest: bool) -> tuple[str, dict[str, float]]:
    """Return the hash of all tensors, whatever files they are in, and if asked for the largest magnitude of each.

    Raises:
        InputError: a tensor is not finite.
    """
    digest, bad, largest = hashlib.sha256(), [], {}
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    with tqdm(total=total, desc="check weights", unit="B", unit_scale=True, leave=False) as bar:
        for name in sorted(checkpoint.tensors):
            tensor = checkpoint.read(name)
            digest.update(repr([name, str(tensor.dtype), tensor.shape]).encode())
            digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
            if checkpoint.is_weight(name) and not np.isfinite(tensor).all():
                bad.append(name)
            if with_largest:
                largest[name] = largest_magnitude(tensor)
            bar.update(tensor.nbytes)
    if bad:
        named = listed(bad, 8, ", ")
        raise InputError(f"{checkpoint.name}: NaN or Inf in {named}; the checkpoint is damaged, get it again")
    return digest.hexdigest(), largest
