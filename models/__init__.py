"""What a guarded model is: networks, preprocessing, score, guard, bundle and registry. Pure torch, no HTTP, no settings."""

import os

# ONNX Runtime sends its maker hashes of each network that it loads, and keeps an identifier of this machine in the home directory, unless it is told not to
# before it is imported, by whoever does that first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
