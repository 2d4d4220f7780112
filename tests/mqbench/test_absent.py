# SPDX-License-Identifier: Apache-2.0
"""Without MQBench, or with one that does not import, the package works and says what is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = "import ahcq_plugin, ahcq_plugin.ptq, ahcq_plugin.quantizers; from ahcq_plugin.mm import toolkits\n"


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout.strip(), done.stderr


def test_without_mqbench_everything_imports_and_using_it_says_what_to_install():
    code = (
        "import sys; sys.modules['mqbench'] = None\n" + IMPORTS + "import ahcq_plugin.mqbench as plugin\n"
        "for call in (plugin.register, lambda: toolkits.unit_preparer('mqbench')):\n"
        "    try:\n        call()\n"
        "    except (ImportError, ValueError) as error:\n"
        "        sys.stdout.write(f'{type(error).__name__}: {error}\\n')\n"
    )
    status, out, error = run(code)
    assert status == 0, error
    first, second = out.splitlines()
    assert first.startswith("ImportError: MQBench does not import (") and "pip install '.[mqbench]'" in first
    assert second.startswith("ValueError: toolkit='mqbench': MQBench does not import") and "toolkit='native'" in second


def test_an_mqbench_that_torch_is_too_new_for_is_named(tmp_path):
    (tmp_path / "mqbench").mkdir()
    (tmp_path / "mqbench" / "__init__.py").write_text("")
    (tmp_path / "mqbench" / "prepare_by_platform.py").write_text("from torch.onnx import _type_utils_gone\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{IMPORTS}import ahcq_plugin.mqbench\n"
    status, _, error = run(code)
    assert status == 1
    message = error.strip().splitlines()[-1]
    assert "ImportError: MQBench does not import (cannot import name '_type_utils_gone'" in message
    assert "torch 2.5.1" in message and "docs/mqbench.md" in message


@pytest.mark.parametrize("toolkit", ["mqb", "", None])
def test_an_unknown_toolkit_is_refused(toolkit):
    from ahcq_plugin.mm.toolkits import unit_preparer

    with pytest.raises(ValueError, match="unknown toolkit .*; allowed: native, mqbench"):
        unit_preparer(toolkit)
