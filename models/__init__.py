"""What a guarded model is: networks, preprocessing, score, guard, bundle and registry. Pure torch, no HTTP, no settings."""
