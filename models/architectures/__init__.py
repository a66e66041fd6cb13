"""Names -> networks, and which of them fits a state dict."""

from models.architectures.catalogue import Architecture, admit, get, resolve
from models.architectures.identify import Fit, Match, fit, identify, instantiate

__all__ = ["Architecture", "Fit", "Match", "admit", "fit", "get", "identify", "instantiate", "resolve"]
