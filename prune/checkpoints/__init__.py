"""Checkpoints to prune: a Hugging Face folder, a GGUF file, or a model of the hub, all read one tensor at a time.

    checkpoint = open_checkpoint("HuggingFaceTB/SmolLM2-135M")
    checkpoint.config["model_type"]                            # "llama"
    checkpoint.read("model.layers.0.self_attn.q_proj.weight")  # (out, in), as stored

Opening reads headers only, and finds every fault of names, shapes and sizes before long work begins.
"""

from .base import Checkpoint as Checkpoint
from .converted import ConvertedCheckpoint as ConvertedCheckpoint
from .folder import FolderCheckpoint as FolderCheckpoint
from .gguf_checkpoint import GGUFCheckpoint as GGUFCheckpoint
from .opening import (
    choose_tokenizer as choose_tokenizer,
    open_checkpoint as open_checkpoint,
    open_tokenizer as open_tokenizer,
)
