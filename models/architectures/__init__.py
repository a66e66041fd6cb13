"""Names -> networks, and which of them fits a state dict."""

from models.architectures.catalogue import ARCHITECTURES, Architecture, Fit, fit, get, identify, instantiate

__all__ = ["ARCHITECTURES", "Architecture", "Fit", "fit", "get", "identify", "instantiate"]
