# SPDX-License-Identifier: Apache-2.0
"""Where the C++ kernels, SystemVerilog and templates are, and the ap_types headers that compile them outside Vitis."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PACKAGED = Path(__file__).with_name("sources")  # where an installation puts the folder hls/
_CHECKOUT = Path(__file__).resolve().parents[2] / "hls"
_MARK = Path("include") / "ahcq" / "layer.h"


def sources(*parts: str) -> Path:
    """A file or folder of ``hls/`` (``include``, ``rtl``, ``templates``, ``csim``, ``cocotb``).

    Raises:
        FileNotFoundError: the installation lacks the folder.
    """
    for folder in (_PACKAGED, _CHECKOUT):
        if (folder / _MARK).is_file():
            return folder.joinpath(*parts)
    raise FileNotFoundError(
        f"the hardware sources are in neither {_PACKAGED} nor {_CHECKOUT}: install the package again from a full "
        "checkout (`pip install .`) or use the checkout itself"
    )


def ap_types() -> Path:
    """The folder of ``ap_int.h`` and ``hls_stream.h`` in the installed hls4ml wheel (hls4ml is not imported).

    Raises:
        FileNotFoundError: hls4ml is not installed, or its wheel has no such headers.
    """
    package = importlib.util.find_spec("hls4ml")
    folder = Path(package.origin).parent / "templates" / "vivado" / "ap_types" if package and package.origin else None
    if folder is None or not (folder / "ap_int.h").is_file():
        raise FileNotFoundError(
            f"ap_int.h of the hls4ml package is needed to compile outside Vitis HLS, looked in {folder}: "
            "`pip install ahcq_plugin[hls]`"
        )
    return folder
