"""Offline: from a suspect and a clean set to a bundle. Importable without FastAPI."""
