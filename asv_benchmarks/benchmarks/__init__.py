"""Benchmarks: ratios to peers within one run. RECADAM_BENCH=fast (the default) or regular is their size."""
