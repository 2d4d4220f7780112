# SPDX-License-Identifier: Apache-2.0
"""Kinds of bad input: values of a wrong type or size, and what can be wrong with a file whatever is in it."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Type of a setting -> values that no setting of that type can have, as a config spells them.
VALUES: dict[type, tuple[str, ...]] = {
    int: ("'x'", "1.5", "-3", "[1]", "None", "float('nan')", "True"),
    float: ("'x'", "[0.1]", "None", "float('nan')", "float('inf')", "-float('inf')", "True"),
    bool: ("'maybe'", "2", "[]", "None", "1.0"),
    str: ("5", "['x']", "'no such'", "None", "''"),
    dict: ("5", "'x'", "{'no such': 1}", "[3]"),
}


class Payload:
    """Unpickled, it would make a file that shows it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch payload_ran",)


def _missing(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(4096))


def _text(path: Path) -> None:
    path.write_text("not what you want\n")


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _truncated(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return damage


def flip(path: Path, chance: random.Random) -> str:
    """Flip one bit anywhere in a file; which one, in words."""
    content = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))
    return f"bit {bit} of byte {place:,} of {len(content):,}"


def _flipped(seed: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        flip(path, random.Random(seed))

    return damage


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload()))


def _zip_of_payload(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Payload()}))
        archive.writestr("archive/version", "3\n")


def _empty_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w"):
        pass


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


#: Of any file.
FILES: dict[str, Callable[[Path], None]] = {
    "missing": _missing,
    "folder": _folder,
    "empty": _empty,
    "noise": _noise,
    "text": _text,
    "zeros": _zeros,
    "half": _truncated(0.5),
    "all but its end": _truncated(0.999),
    "link to itself": _loop,
    "pipe": _pipe,
}
#: Of files with a digest, and of what a pickle can hide in.
CHECKED = {f"bit flipped, {seed}": _flipped(seed) for seed in range(5)}
PICKLES = {"pickle": _pickle, "zip with a payload": _zip_of_payload, "empty zip": _empty_zip}


def damaged(source: Path, folder: Path, damage: Callable[[Path], None]) -> Path:
    """A copy of a file with the damage."""
    path = folder / source.name
    shutil.copy(source, path)
    damage(path)
    return path


def numbers(kind: type) -> Iterator[str]:
    """Texts on a command line that are no such number, or none that counts something."""
    yield from ("x", "", "nan", "-3", "1e400")
    if kind is int:
        yield "1.5"
