"""Puts examples/recipes on the path; where its scripts lack a package there are no tests."""

from importlib.util import find_spec

from support.recipes import RECIPES  # noqa: F401

NEEDS = ("torchvision", "tqdm")
collect_ignore_glob = ["test_*.py"] if any(find_spec(name) is None for name in NEEDS) else []
