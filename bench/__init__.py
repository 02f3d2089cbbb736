"""Benchmarks: what the engine must beat, measured in one process. ``python -m bench`` runs them."""
