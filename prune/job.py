"""Everything that a run needs, opened and checked before long work begins."""

import dataclasses
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
from .record import FORMAT
from .texts import Samples, are_token_ids, calibration_samples, evaluation_blocks


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs of a run, opened and checked."""

    config: Config  # resolved
    checkpoint: Checkpoint  # the dense model
    network: Network
    calibration: Samples  # `config.samples` for statistics, then `config.held_out`
    evaluation: Samples
    tokenizer: Any  # None where the texts are token ids
    weights: str  # SHA-256 of all tensors: names, dtypes, shapes, values

    @property
    def key(self) -> str:
        """Hash of all that the pruned weights and the figures depend on: the same key, the same run."""
        facts = [FORMAT, self.config.numbers(), self.weights, version("farms-jax"), version("jax")]
        facts += [samples.record["ids_sha256"] for samples in (self.calibration, self.evaluation)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

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
    """Return the job for settings as given on the command line; InputError where a setting or an input is unusable."""
    config.check()
    checkpoint = open_checkpoint(config.model or str(BUNDLED))
    network = checkpoint.network()
    config = resolve(config, network)
    assert config.length and config.calibration and config.text
    in_ids = are_token_ids(config.calibration, config.text)
    tokenizer = choose_tokenizer(checkpoint, config.tokenizer, needed=not in_ids)
    common = {"length": config.length, "special_tokens": config.special_tokens, "vocab_size": network.vocab_size}
    evaluation = evaluation_blocks(config.text, tokenizer, limit=config.limit, **common)
    held_out = config.held_out
    calibration = calibration_samples(
        config.calibration,
        tokenizer,
        count=config.samples + held_out,
        seed=config.seed,
        held_out=held_out,
        **common,
    )
    return Job(config, checkpoint, network, calibration, evaluation, tokenizer, _hash(checkpoint))


def _hash(checkpoint: Checkpoint) -> str:
    """Return the hash of all tensors, whatever files they are in; InputError where one is not finite."""
    digest, bad = hashlib.sha256(), []
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    with tqdm(total=total, desc="check weights", unit="B", unit_scale=True, leave=False) as bar:
        for name in sorted(checkpoint.tensors):
            tensor = checkpoint.read(name)
            digest.update(repr([name, str(tensor.dtype), tensor.shape]).encode())
            digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
            if checkpoint.is_weight(name) and not np.isfinite(tensor).all():
                bad.append(name)
            bar.update(tensor.nbytes)
    if bad:
        named = listed(bad, 8, ", ")
        raise InputError(f"{checkpoint.name}: NaN or Inf in {named}; the checkpoint is damaged, get it again")
    return digest.hexdigest()
