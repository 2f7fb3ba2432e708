"""Puts examples/recipes on the path, where its scripts find `parts`."""

from support.recipes import RECIPES  # noqa: F401
