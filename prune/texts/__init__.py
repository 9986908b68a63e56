"""Texts to calibrate and evaluate on, as token ids."""

from .samples import (
    Samples as Samples,
    calibration_samples as calibration_samples,
    evaluation_blocks as evaluation_blocks,
    tokenizer_fingerprint as tokenizer_fingerprint,
)
from .sources import are_token_ids as are_token_ids
