"""Benchmarks of single operators: ``python -m bench.ops.<operator>``."""
