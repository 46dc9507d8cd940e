"""Ratios to peers within one run. RECADAM_BENCH is their size: quick, fast (the default) or regular."""
