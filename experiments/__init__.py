"""The paper's figures and tables, each `python -m experiments.NAME`: numbers, a figure, and where both went."""
