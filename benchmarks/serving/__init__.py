"""What guarding costs: the engine alone, and the service as a whole."""
