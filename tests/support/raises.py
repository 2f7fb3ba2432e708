"""Errors and warnings with their whole sentences."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises(error: type[Exception], text: str) -> Iterator[None]:
    """An error of this very type, with this sentence."""
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error and str(caught.value) == text


@contextmanager
def warns(*texts: str) -> Iterator[list[warnings.WarningMessage]]:
    """Expects these warnings, in this order, and no other."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    assert [str(warning.message) for warning in caught] == list(texts)
