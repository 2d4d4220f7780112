# SPDX-License-Identifier: Apache-2.0
"""HLS C++ to LLVM IR with clang 19, as the wheel ``ziglang`` brings it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl.errors import RtlError, ToolError
from ahcq_plugin.hls.rtl.llvm_module import Module
from ahcq_plugin.hls.rtl.loops import Pragma, Source

# A structure of one number is passed as this number there, larger ones in memory; nothing is packed into registers.
TARGET = "wasm32-wasi-musl"
# Loops stay as they are written, apart from those that are to be unrolled; floats are not contracted. Common code of
# two branches stays in both, so that every stream and array access has one address.
FLAGS = (
    *("-std=c++17", "-O2", "-g", "-S", "-emit-llvm", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off"),
    *("-fno-vectorize", "-fno-slp-vectorize", "-fno-discard-value-names", "-fno-builtin", "-Wno-everything"),
    "-Werror=pass-failed",
    *("-mllvm", "-inline-threshold=10000000", "-mllvm", "-pragma-unroll-threshold=10000000"),
    *("-mllvm", "-sink-common-insts=false", "-mllvm", "-hoist-common-insts=false"),
    *("-mllvm", "-enable-loop-distribute=false", "-mllvm", "-unroll-peel-max-count=0"),
)
# What the build of libc++ would write to its configuration.
_LIBCXX = (
    *("-D_LIBCPP_ABI_VERSION=1", "-D_LIBCPP_ABI_NAMESPACE=__1", "-D_LIBCPP_HAS_NO_VENDOR_AVAILABILITY_ANNOTATIONS"),
    "-D_LIBCPP_HARDENING_MODE_DEFAULT=_LIBCPP_HARDENING_MODE_NONE",
)
_SYSTEM = ("libcxx/include", "libcxxabi/include", "include", "libc/include/wasm-wasi-musl", "libc/include/generic-musl")

MAX_BITS = 8192  # of a _BitInt


def find_clang() -> tuple[str, Path]:
    """(path of the program ``zig``, folder of its headers); ToolError where the wheel is missing."""
    package = importlib.util.find_spec("ziglang")
    if package is None or not package.origin:
        raise ToolError("clang 19 is needed, which the package `ziglang` holds: `pip install ahcq_plugin[rtl]`")
    folder = Path(package.origin).parent
    return str(folder / "zig"), folder / "lib"


def system_flags() -> list[str]:
    """Flags that find the headers of C and C++, our ap_int and hls_stream, and nothing of this machine."""
    library = find_clang()[1]
    folders = [sources("clang", "include"), sources("csim", "include"), *(library / name for name in _SYSTEM)]
    flags = ["-nostdinc", "-nostdinc++", "-target", TARGET, *_LIBCXX, "-D__SYNTHESIS__=1"]
    flags += ["-Xclang", f"-fexperimental-max-bitint-width={MAX_BITS}"]
    for folder in folders:
        flags += ["-isystem", str(folder)]
    return flags


def run_clang(arguments: Sequence[str], folder: Path) -> str:
    """Standard output of clang, run in ``folder``; RtlError with what it said if it fails."""
    run = subprocess.run([find_clang()[0], "clang", *arguments], cwd=folder, capture_output=True, text=True)
    if run.returncode:
        said = run.stderr[max(0, run.stderr.find("error:") - 300) :][:4000]
        raise RtlError(f"clang refused it:\n{said}")
    return run.stdout


@dataclass(frozen=True, eq=False)
class Program:
    """One C++ file and the headers that it includes of its own folders.

    Attributes:
        main: the file with the top function.
        includes: folders of headers, in the order in which they are searched.
        defines: macros ``NAME=value``.
    """

    main: Path
    includes: tuple[Path, ...] = ()
    defines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "main", self.main.absolute())  # clang runs in another folder
        object.__setattr__(self, "includes", tuple(folder.absolute() for folder in self.includes))

    @cached_property
    def files(self) -> dict[Path, Source]:
        """Every C++ file of the folders, and the main one."""
        found = {self.main: None}
        for folder in self.includes:
            found |= dict.fromkeys(path for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".hpp", ".inc"))
        return {path: Source(path.read_text(encoding="utf-8"), str(path)) for path in found}

    @property
    def pragmas(self) -> list[Pragma]:
        """All HLS pragmas of all files."""
        return [pragma for source in self.files.values() for pragma in source.pragmas]

    def module(self) -> Module:
        """The LLVM IR of the main file.

        Raises:
            RtlError: clang refused it, or could not unroll a loop that has to be.
        """
        with tempfile.TemporaryDirectory(prefix="ahcq_rtl_") as name:
            work = Path(name)
            flags = [*FLAGS, *system_flags(), *(f"-D{one}" for one in self.defines)]
            for index, folder in enumerate(self.includes):
                flags += [f"-I{work / str(index)}", f"-fdebug-prefix-map={work / str(index)}={folder}"]
                for path, source in self.files.items():
                    if path != self.main and path.is_relative_to(folder):
                        _write(work / str(index) / path.relative_to(folder), source.prepared())
            _write(work / "main" / self.main.name, self.files[self.main].prepared())
            flags += [f"-I{self.main.parent}", f"-fdebug-prefix-map={work / 'main'}={self.main.parent}"]
            try:
                text = run_clang([*flags, str(work / "main" / self.main.name), "-o", "-"], work)
            except RtlError as error:
                raise RtlError(_renamed(str(error), work, self)) from None
        return Module(text)

    def syntax_tree(self) -> dict:
        """Clang's syntax tree of the main file as it is written, in the form of ``-ast-dump=json``."""
        flags = [*system_flags(), *(f"-I{folder}" for folder in self.includes), *(f"-D{one}" for one in self.defines)]
        flags += ["-std=c++17", "-Wno-everything", "-fsyntax-only", "-Xclang", "-ast-dump=json", str(self.main)]
        return json.loads(run_clang(flags, self.main.parent))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _renamed(text: str, work: Path, program: Program) -> str:
    """What clang said, with the names of the files that were given to us."""
    folders: Iterable[tuple[str, Path]] = [
        ("main", program.main.parent),
        *((str(i), f) for i, f in enumerate(program.includes)),
    ]
    for name, folder in folders:
        text = text.replace(f"{work / name}/", f"{folder}/")
    return text
