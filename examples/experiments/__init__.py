"""The experiments behind docs/results.md: `tune`, `compare`, `tables`, on the demo's networks."""
