# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with data and shows only in the middle of a run."""

from __future__ import annotations


class DataError(ValueError):
    """Images or annotations cannot be used; the message names them."""
