"""The policy search, and the two levels that it differentiates through."""

from sokd.kd.search.search import PolicySearch

__all__ = ["PolicySearch"]
