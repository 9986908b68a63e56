"""Pruning of large language models: per-block sparsities from their spectra, under magnitude, Wanda or SparseGPT."""
