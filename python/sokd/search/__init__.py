"""The policy search, and the two levels that it differentiates through."""

from sokd.search.search import PolicySearch

__all__ = ["PolicySearch"]
