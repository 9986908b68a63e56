"""Texts to calibrate and evaluate on, as token ids."""

from prune.texts.samples import (
    Samples as Samples,
    calibration_samples as calibration_samples,
    evaluation_blocks as evaluation_blocks,
    tokenizer_fingerprint as tokenizer_fingerprint,
)
