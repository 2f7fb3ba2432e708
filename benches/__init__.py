"""Benches: both sides in one run, answers checked first, every number with its row in results/."""
