"""Benchmarks: ratios to peers within one run."""
