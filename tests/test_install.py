# SPDX-License-Identifier: Apache-2.0
"""An installation has every file that the package reads, and every package that it imports."""

import ast
import shutil
import subprocess
import sys
from distutils.core import run_setup
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# folder or module of the package -> the extras that it may need as soon as it is imported
EXTRAS = {
    "mm": ("mm",),
    "studies": ("mm", "studies"),
    "zoo/sam2": ("sam2",),
    "hls/hls4ml": ("hls",),
    "hls/rtl/xls_process": ("rtl",),
}
BUILT_FROM = ("ahcq_plugin", "hls", "setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
# run in an installation: what it reads besides Python files is there
READS = """
from pathlib import Path

import ahcq_plugin
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.zoo.sam import build_sam

place = Path(ahcq_plugin.__file__).parent
assert place.is_relative_to(Path.cwd()), place
assert sources("include").is_relative_to(place) and len(list(sources("templates").glob("*.j2"))) > 10
assert sources("rtl", "ahcq_shell.sv").is_file() and sources("cocotb", "dpi.cpp").is_file()
assert build_sam("sam_tiny") is not None and (place / "zoo" / "weights" / "sam2_tiny.pth").is_file()
"""


@pytest.fixture(scope="module")
def package():
    """What setup.py says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield run_setup("setup.py", stop_after="init")


def data_files(root: Path) -> set[str]:
    """Files of the package under ``root`` that are no Python, relative to it."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    return {path.relative_to(root).as_posix() for path in files}


def distributions(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imports(source: str) -> list[tuple[str, bool]]:
    """(top package, whether it is imported together with the module) of every import in ``source``."""
    tree = ast.parse(source)
    late = {id(node) for scope in ast.walk(tree) if isinstance(scope, ast.FunctionDef) for node in ast.walk(scope)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module.split(".")[0], id(node) not in late))
    return found


def test_every_glob_of_package_data_matches_a_file(package) -> None:
    for name, globs in package.package_data.items():
        folder = ROOT / package.package_dir.get(name, name.replace(".", "/"))
        assert [glob for glob in globs if not any(path.is_file() for path in folder.glob(glob))] == [], name


def test_every_import_is_of_a_package_that_setup_asks_for(package) -> None:
    owners = packages_distributions() | {"mqbench": ["MQBench"]}
    core = distributions(package.install_requires)
    extras = {name: distributions(lines) for name, lines in package.extras_require.items()}
    missing = []
    for path in sorted((ROOT / "ahcq_plugin").rglob("*.py")):
        module = path.relative_to(ROOT / "ahcq_plugin").as_posix()
        needed = {name for start, names in EXTRAS.items() if module.startswith(start) for name in names}
        for top, at_once in imports(path.read_text(encoding="utf-8")):
            if top in sys.stdlib_module_names or top in ("ahcq_plugin", "__future__"):
                continue
            asked = core.union(*(extras[name] for name in (needed if at_once else extras)))
            if not asked & {canonicalize_name(name) for name in owners.get(top, [top])}:
                missing.append(f"{module}: {top}")
    assert missing == []


def test_late_imports_are_told_from_those_of_the_module() -> None:
    source = "import a.b\nif a:\n    from c import d\ndef f():\n    import e\n    from .g import h\n"
    assert imports(source) == [("a", True), ("c", True), ("e", False)]


def test_an_installation_has_every_file_that_the_package_reads(tmp_path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()  # setuptools leaves build/ and *.egg-info beside what it builds
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", target, source], check=True)
    assert data_files(target / "ahcq_plugin") == {
        *data_files(ROOT / "ahcq_plugin"),
        *(f"hls/sources/{name}" for name in data_files(ROOT / "hls")),
    }
    subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'){READS}"], cwd=target, check=True)
