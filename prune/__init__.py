"""Pruning of large language models: per-block sparsities from their spectra, under magnitude, Wanda, SparseGPT or ADMM.

The way from weights to masks: `job` opens and checks everything; `run` goes through the stages from top to bottom,
each kept by `record`; `scores` measures the layers, `allocation` turns scores into a plan, `pruning` follows it block
by block (`forward`, `methods`, `sparsegpt`, `admm`, `recovery`), `writing` puts every block on disk, trained as
a whole where that is asked for (`fine_tuning`); `results` sums it up.
"""
