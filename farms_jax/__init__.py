"""Heavy-tailed weight spectra without aspect-ratio bias."""

__version__ = "0.1.0"
