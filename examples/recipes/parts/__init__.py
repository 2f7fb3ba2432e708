"""Shared parts of the recipes: data, networks, published figures, and the run itself."""
