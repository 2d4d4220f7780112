# SPDX-License-Identifier: Apache-2.0
"""The AXI4-Lite registers of a top, as Vitis HLS lays them out (UG1399, "S_AXILITE Control Register Map").

0x00 holds ap_start (bit 0), ap_done (1, cleared by reading), ap_idle (2), ap_ready (3) and auto_restart (7); 0x04, 0x08
and 0x0c the interrupts. Scalars follow from 0x10, 8 bytes each; a memory begins at a multiple of its size rounded up to
a power of two. When Vitis has made its driver, ``read_driver_header`` takes the addresses from there.
"""

from __future__ import annotations

import re

FIRST_SCALAR = 0x10
SCALAR_BYTES = 8


def register_map(is_product: bool, scale_words: int) -> dict[str, int]:
    """Byte address of each register, and ``address_bits`` of the whole space."""
    names = ["batch", "rows"] if is_product else ["rows"]
    addresses = {"control": 0x00}
    for index, name in enumerate(names):
        addresses[name] = FIRST_SCALAR + SCALAR_BYTES * index
    size = 4 << (scale_words - 1).bit_length()
    end = FIRST_SCALAR + SCALAR_BYTES * len(names)
    addresses["scales"] = -(-end // size) * size
    addresses["address_bits"] = (addresses["scales"] + size - 1).bit_length()
    return addresses


def read_driver_header(text: str, names: list[str]) -> dict[str, int]:
    """Addresses from the text of ``x<top>_hw.h``, the driver header that Vitis HLS writes beside the RTL.

    Args:
        names: of the arguments that must be there (``rows``, ``scales``, ...).
    Raises:
        ValueError: the header does not name one of them.
    """
    addresses = {"control": 0x00}
    for match in re.finditer(r"#define\s+\w+_CONTROL_ADDR_(\w+?)_(DATA|BASE)\s+0x([0-9a-fA-F]+)", text):
        addresses[match[1].lower()] = int(match[3], 16)
    missing = sorted(set(names) - set(addresses))
    if missing:
        raise ValueError(f"the driver header has no address of {', '.join(missing)}; it has {', '.join(addresses)}")
    return addresses
