"""Untrusted checkpoint files -> weights that can be computed with. Nothing in a file is ever imported, called or run."""

from models.checkpoint.limits import Limits, clean_name, listed
from models.checkpoint.reading import Checkpoint, read_checkpoint
from models.checkpoint.state_dict import WEIGHT_KEYS
from models.checkpoint.weights import load_weights

__all__ = ["WEIGHT_KEYS", "Checkpoint", "Limits", "clean_name", "listed", "load_weights", "read_checkpoint"]
