# SPDX-License-Identifier: Apache-2.0
"""Rules of the repository that no linter knows: licence lines, sizes, machine paths, pins, documented commands."""

import ast
import re
from distutils.core import run_setup
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ahcq_plugin", "mm_configs", "hls", "tools", "tests", "docs", ".ci")
CODE = {".py", ".h", ".hpp", ".cpp", ".sv", ".v"}
TEXT = CODE | {".md", ".toml", ".txt", ".json", ".html", ".j2", ".sh", ".tcl", ".in", ""}
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts and path.name != ".git"
)
# a folder of somebody's machine, or the place from which it gets its packages
MACHINE = re.compile(
    r"(?<![\w.~}>)-])/(?:work|home|root|Users|tmp|mnt|scratch)/\w|file:///\w|(?:index-url|find-links)[ =]+\S*://"
)


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def has_licence(source: str) -> bool:
    """The first line, or the one after a `#!` line, is a comment with the SPDX tag and nothing else."""
    lines = source.splitlines()
    first = lines[1] if len(lines) > 1 and lines[0].startswith("#!") else "".join(lines[:1])
    return re.fullmatch(r"(#|//) SPDX-License-Identifier: Apache-2\.0", first) is not None


def print_calls(source: str) -> list[int]:
    """Line numbers of the calls of print()."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def max_lines(path: str) -> int | None:
    """Lines that a file may have: tools 80, leaf configs 60, other code 400, the rest any number."""
    if path.startswith("tools/"):
        return 80
    if re.fullmatch(r"mm_configs/[^/]+\.py", path):
        return 60
    return 400 if Path(path).suffix in CODE else None


def test_code_begins_with_its_licence() -> None:
    code = [path for path in FILES if Path(path).suffix in CODE or path in ("Makefile", ".ci/run")]
    assert [path for path in code if not has_licence(read(path))] == []


def test_files_are_short() -> None:
    lengths = {path: len(read(path).splitlines()) for path in FILES if max_lines(path)}
    assert {path: lines for path, lines in lengths.items() if lines > max_lines(path)} == {}


def test_only_tools_print() -> None:
    modules = [path for path in FILES if path.endswith(".py") and not path.startswith("tools/")]
    assert {path: lines for path in modules if (lines := print_calls(read(path)))} == {}


def test_no_file_names_a_machine() -> None:
    here = "tests/" + Path(__file__).name  # has the examples below
    assert {path: found for path in FILES if path != here and (found := MACHINE.findall(read(path)))} == {}


@pytest.mark.parametrize("text", ["'/home/me/x'", " /work/x", "=/tmp/x", "file:///opt", "--index-url https://h/simple"])
def test_a_machine_path_is_caught(text: str) -> None:
    assert MACHINE.search(text)


@pytest.mark.parametrize("text", ["a/work/x", "~/work/x", "../home/x", "{root}/tmp/x", "https://host/home/x", "/tmp"])
def test_other_paths_are_no_machine_paths(text: str) -> None:
    assert not MACHINE.search(text)


def test_a_missing_licence_and_a_print_are_caught() -> None:
    tag = "# SPDX-License-Identifier: Apache-2.0\n"
    assert has_licence(tag) and has_licence("#!/bin/sh\n" + tag)
    assert not has_licence("") and not has_licence('"""Doc."""\n' + tag) and not has_licence("\n" + tag)
    assert print_calls("x = 1\nif x:\n    print(x)") == [3] and print_calls("'print(1)'") == []


def test_every_requirement_is_pinned_to_a_version_that_it_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    package = run_setup("setup.py", stop_after="init")
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines), "a package is pinned twice"
    for text in [*package.install_requires, *(text for extra in package.extras_require.values() for text in extra)]:
        requirement = Requirement(text)
        if requirement.url:
            assert re.search(r"@[0-9a-f]{40}$", requirement.url), f"{text}: not a full commit"
        else:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_documented_commands_and_links_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for path in (path for path in FILES if path.endswith(".md")):
        code = re.findall(r"```.*?```|`[^`\n]+`", read(path), re.DOTALL)
        commands = {name for text in code for name in re.findall(r"^\s*`*make ([a-z-]+)", text, re.MULTILINE)}
        assert commands <= targets, f"{path}: the Makefile has no {sorted(commands - targets)}"
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", read(path))
        missing = [link for link in links if not (ROOT / path).parent.joinpath(link).exists()]
        assert not missing, f"{path}: links to {missing}"
