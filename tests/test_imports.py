# SPDX-License-Identifier: Apache-2.0
"""The direction of imports: each layer of the package knows only those below it, and only two places know a host."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ahcq_plugin"
SUPPORT = {"support", "metrics"}
FUNCTIONAL = {"functional"}
QUANTIZERS = {"quantizers"} | FUNCTIONAL
ENGINE = {"graph", "prequant", "ptq", "support"} | QUANTIZERS
PRODUCT = ENGINE | {"metrics", "api", "__init__", "export", "integer", "zoo", "mqbench", "mm"}
# layer -> layers of ours that it may import besides itself; a folder or file that is not listed is an error
LAYERS = {
    "support": set(),
    "metrics": set(),
    "functional": {"support"},
    "quantizers": FUNCTIONAL,
    "graph": QUANTIZERS,
    "prequant": FUNCTIONAL,
    "ptq": ENGINE,
    "export": ENGINE | {"zoo", "metrics"},
    "integer": ENGINE | {"export"},
    "hls": ENGINE | {"export", "zoo"},
    "zoo": SUPPORT | {"prequant"},  # the twin: shifts that leave masks as they are
    "api": ENGINE | {"zoo"},  # load_quantized: the SAM that a checkpoint is of
    "__init__": ENGINE | {"api"},  # of the package itself
    "mqbench": ENGINE | {"api", "__init__", "export"},
    "mm": PRODUCT,
    "studies": PRODUCT,
}
# layer -> the only foreign packages that it may import besides the standard library
FOREIGN = {
    "support": {"torch", "numpy"},
    "metrics": {"torch", "numpy", "cv2"},
    "functional": {"torch"},
    "quantizers": {"torch"},
    "graph": {"torch"},
    "prequant": {"torch", "numpy", "scipy"},
    "ptq": {"torch", "numpy", "tqdm", "safetensors"},
    "integer": {"torch", "numpy"},
    "zoo": {"torch", "numpy", "segment_anything", "sam2", "cv2", "pycocotools", "PIL", "transformers"},
}
# host -> the only layer that may import it
HOSTS = {"mqbench": "mqbench", "mmengine": "mm", "mmcv": "mm", "mmdet": "mm"}


def imported(source: str, module: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import in ``source``, also those inside functions and import_module().

    ``module`` is the dotted name of the source's own module (ending in ``__init__`` for a package).
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        else:
            continue
        found += [(node.lineno, name) for name in names]
    return found


def violations(source: str, path: str) -> list[str]:
    """Imports of the file ``path`` (relative to the package's parent) that go against the direction."""
    module = path.removesuffix(".py").replace("/", ".")
    layer = module.split(".")[1]
    if layer not in LAYERS:
        return [f"{path}: `{layer}` is no layer of the package; its place is to be stated here and in the docs"]
    problems = []
    for line, name in imported(source, module):
        top, _, rest = name.partition(".")
        if top == "ahcq_plugin":
            target = rest.split(".")[0]
            # `from ahcq_plugin import x` with x not a layer takes a name of the package itself, which knows them all
            target = target if target in LAYERS else "__init__"
            allowed = target == layer or target in LAYERS[layer]
        elif top in HOSTS:
            allowed = HOSTS[top] == layer
        else:
            allowed = top in sys.stdlib_module_names or top in FOREIGN.get(layer, {top})
        if not allowed:
            problems.append(f"{path}:{line}: `{layer}` must not import {name}")
    return problems


def test_every_import_goes_down() -> None:
    problems = []
    for path in sorted(PACKAGE.rglob("*.py")):
        problems += violations(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE.parent).as_posix())
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("functional/uniform.py", "import numpy as np"),
        ("functional/uniform.py", "from ahcq_plugin.quantizers import base"),
        ("functional/uniform.py", "from ..quantizers.base import FakeQuantize"),
        ("functional/uniform.py", "from .. import graph"),
        ("functional/__init__.py", "from ..quantizers import base"),
        ("quantizers/base.py", "from ahcq_plugin.graph.roles import find_roles"),
        ("quantizers/base.py", "from ahcq_plugin import quantize"),
        ("graph/tracer.py", "def f():\n    import mmcv.ops"),
        ("graph/tracer.py", "import importlib\nimportlib.import_module('mmdet.apis')"),
        ("prequant/acnr.py", "from ahcq_plugin.ptq import Recipe"),
        ("prequant/acnr.py", "from ahcq_plugin.quantizers import base"),
        ("prequant/acnr.py", "import sklearn"),
        ("ptq/distributions.py", "import matplotlib"),
        ("support/files.py", "from ahcq_plugin.ptq import Recipe"),
        ("zoo/sam.py", "from ahcq_plugin.studies.timing import step_seconds"),
        ("mm/launch.py", "from ahcq_plugin.studies import results"),
        ("ptq/recipe.py", "from ahcq_plugin.mm import BoxPromptedSAM"),
        ("ptq/recipe.py", "import ahcq_plugin.zoo.sam"),
        ("ptq/prepare.py", "from mqbench.prepare_by_platform import prepare_by_platform"),
        ("zoo/sam.py", "import ahcq_plugin.mm.sam"),
        ("zoo/sam.py", "import mmengine"),
        ("zoo/scenes.py", "from scipy import ndimage"),
        ("api.py", "from ahcq_plugin import mm"),
        ("__init__.py", "from . import mqbench"),
        ("__init__.py", "import mmengine"),
        ("mqbench.py", "import mmdet"),
        ("mm/loop.py", "import mqbench"),
    ],
)
def test_a_planted_violation_is_caught(path: str, source: str) -> None:
    line = source.count("\n") + 1
    assert [problem.split(": ")[0] for problem in violations(source, f"ahcq_plugin/{path}")] == [
        f"ahcq_plugin/{path}:{line}"
    ]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("functional/uniform.py", "from __future__ import annotations\nimport math\nfrom torch import Tensor"),
        ("prequant/bimodal.py", "from scipy.signal import find_peaks\nimport numpy"),
        ("functional/lnq.py", "from .uniform import encode\nfrom ahcq_plugin.functional import hluq"),
        (
            "ptq/prepare.py",
            "from ..graph import place\nfrom ahcq_plugin.quantizers.base import FakeQuantize\nimport tqdm",
        ),
        ("zoo/sam.py", "from ahcq_plugin.zoo.scenes import render_scene\nimport cv2\nimport segment_anything"),
        ("__init__.py", "from ahcq_plugin.api import quantize"),
        ("mqbench.py", "import mqbench.utils\nfrom ahcq_plugin import graph"),
        ("mm/loop.py", "from mmengine.runner import TestLoop\nfrom ahcq_plugin import mqbench, quantize, zoo"),
    ],
)
def test_an_import_that_goes_down_is_no_violation(path: str, source: str) -> None:
    assert violations(source, f"ahcq_plugin/{path}") == []


def test_tools_and_the_package_need_nothing_of_the_tests() -> None:
    """An installation has no tests: neither imports them, nor runs their files by path."""
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "tools").glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        names = {name.split(".")[0] for _, name in imported(source, f"tools.{path.stem}")}
        assert not names & {"tests", "runpy"} and "tests/" not in source, path


def test_an_unknown_layer_is_caught() -> None:
    assert "no layer" in violations("", "ahcq_plugin/misc/helpers.py")[0]


def test_importing_the_engine_loads_no_host() -> None:
    code = (
        "import ahcq_plugin, ahcq_plugin.functional, ahcq_plugin.quantizers, ahcq_plugin.graph, ahcq_plugin.ptq;"
        "import ahcq_plugin.prequant.acnr, ahcq_plugin.prequant.bimodal, sys;"
        f"sys.exit(' '.join({set(HOSTS)!r} & set(sys.modules)) or None)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr


def test_the_engine_needs_neither_drawing_nor_clustering() -> None:
    code = (
        "import ahcq_plugin, sys; from ahcq_plugin import quantize;"
        "sys.exit(' '.join({'matplotlib', 'sklearn', 'ahcq_plugin.studies'} & set(sys.modules)) or None)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr


def test_training_and_model_cards_need_no_detection_framework() -> None:
    paths = [*(PACKAGE / "studies/training").glob("*.py"), *(PACKAGE / "studies/evaluation").glob("*.py")]
    names = {
        (path.name, name)
        for path in paths
        for _, name in imported(path.read_text(encoding="utf-8"), f"ahcq_plugin.studies.x.{path.stem}")
        if name.startswith(("ahcq_plugin.mm", *HOSTS))
    }
    assert paths and not names
