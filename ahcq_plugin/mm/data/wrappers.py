# SPDX-License-Identifier: Apache-2.0
"""Data sets inside data sets: repeated, mixed or concatenated ones, as configs or built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def wrapped(dataset: Any) -> list[Any]:
    """What a data set, or the config of one, is made of.

    Returns: the parts of a concatenated one, the one inside another wrapper, nothing for a data set of its own.
    """
    many, one = (
        dataset.get(key) if isinstance(dataset, Mapping) else getattr(dataset, key, None)
        for key in ("datasets", "dataset")
    )
    if many is not None:
        return list(many)
    return [] if one is None else [one]


def innermost(dataset: Any) -> Any:
    """The data set, or config, inside all wrappers; of concatenated ones the first."""
    while parts := wrapped(dataset):
        dataset = parts[0]
    return dataset
