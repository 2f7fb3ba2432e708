"""What docs/results.md is made from: `tune`, `compare` and `tables`, on the demo's networks."""
