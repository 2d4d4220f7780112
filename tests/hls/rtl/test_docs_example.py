# SPDX-License-Identifier: Apache-2.0
"""The example of docs/hls_rtl.md, as it stands, on a design of a few lines."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DESIGN = """
#include "hls_stream.h"
void top(int n, hls::stream<int>& in, hls::stream<int>& out) {
    for (int i = 0; i < n; ++i) {
#pragma HLS PIPELINE II = 1
        out.write(3 * in.read() + 1);
    }
}
"""


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/hls_rtl.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "hls").symlink_to(ROOT / "hls")
    (tmp_path / "top.cpp").write_text(DESIGN)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "docs/hls_rtl.md", "exec"), names)
    assert names["result"].outputs["out"].tolist() == [[4], [7]] and list((tmp_path / "rtl").glob("*.sv"))
