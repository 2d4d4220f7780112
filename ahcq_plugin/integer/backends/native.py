# SPDX-License-Identifier: Apache-2.0
"""Placeholder."""

from ahcq_plugin.integer.backends.base import Backend


class NativeBackend(Backend):
    name = "native"
    devices = ()
