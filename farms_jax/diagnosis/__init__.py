"""Diagnosis of a model's layers: `diagnose` measures, `compare` sets two models side by side, `watch` follows a run."""

from farms_jax.diagnosis.compare import Comparison as Comparison, compare as compare
from farms_jax.diagnosis.diagnosis import Diagnosis as Diagnosis
from farms_jax.diagnosis.exports import read_rates as read_rates
from farms_jax.diagnosis.pipeline import diagnose as diagnose
from farms_jax.diagnosis.ranking import Ranking as Ranking, rank_models as rank_models
from farms_jax.diagnosis.settings import Settings as Settings
from farms_jax.diagnosis.status import disagreements as disagreements
from farms_jax.diagnosis.watch import Rules as Rules, watch as watch
