"""The small LLaMA that ships: its texts, and its shape and loss; `prune.train_small` trains it."""
