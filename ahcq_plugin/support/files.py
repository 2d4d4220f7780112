# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are either whole or absent: written beside their place, then moved there."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
#: Part of temporary names: whether a process of that number lives can only be asked on its own machine.
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a path to write to; it becomes ``path`` when the body ends, and is removed when the body raises.

    The folder is made when absent; an older file stays until the end. What killed processes left of the same path goes.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced by a file
        raise FileExistsError(f"{path} is no file that can be replaced: give the path of one")
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder to fill; it takes the place of ``path`` when the body ends, and is removed when it raises.

    On Linux the two change places in one step, so that ``path`` is there at any time, as it was or as it is to be.
    """
    path = Path(path)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        if not path.exists():
            os.rename(temporary, path)
        elif not _exchange(temporary, path):
            aside = temporary.with_name(f"{temporary.name[:-4]}-old.tmp")
            os.rename(path, aside)
            os.rename(temporary, path)
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process takes; makes its folder, removes what dead processes left there."""
    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for found in glob.iglob(f".{glob.escape(path.name)}.{_HOST}-*.tmp", root_dir=path.parent):
        number = found.removesuffix(".tmp").rpartition(f"{_HOST}-")[2].removesuffix("-old")
        if number.isdecimal() and not _lives(int(number)):
            left = path.parent / found
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places at once; False where the system or its file system cannot."""
    with suppress(AttributeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
            return True
        if (code := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(one), None, str(other))
    return False


def check_work_dir(path: str | Path) -> None:
    """Make the folder and a file in it. Raises ValueError: it cannot be made or written to."""
    check_name(path)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"the work dir {str(path):.200} cannot be used: {error.strerror}") from error


def given_path(path: Any, name: str = "path") -> Path:
    """The path of a file or folder.

    Raises:
        TypeError: neither a text nor a path.
        ValueError: one that no file can have.
    """
    if not isinstance(path, (str, Path)) and not (isinstance(path, os.PathLike) and isinstance(os.fspath(path), str)):
        raise TypeError(f"`{name}` must be a text or a Path, got {type(path).__name__} {path!r:.40}")
    if not str(path) or "\0" in str(path):
        raise ValueError(f"`{name}` must be the path of a file or folder, got {str(path)!r}")
    return Path(path)


def check_name(path: str | Path) -> None:
    """ValueError for a name that is not UTF-8: OpenCV, torch and ONNX cannot write there, and one of them crashes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(str(path)):.200} is not UTF-8: give another name of a file or folder") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a JSON file holds but its own ``checksum``, whatever the spaces between."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_json(path: str | Path, remedy: str = "") -> Any:
    """What a JSON file holds.

    Args:
        remedy: for the message: what helps against a damaged one.
    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON, or an object has a key twice; one line that names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}){remedy and '; '}{remedy}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of ``pairs``, of an object in JSON. ValueError: a key is there twice, one of its values would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return content


def write_text(text: str, path: str | Path) -> None:
    """Write UTF-8 ``text`` atomically; the folder is made when absent, an older file stays when this fails."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: Any, path: str | Path, indent: int | None = 2) -> None:
    """JSON through :func:`write_text`; NaN and infinities are refused (they are not JSON)."""
    write_text(json.dumps(content, indent=indent, allow_nan=False) + "\n", path)


def fresh(path: str | Path) -> Path:
    """Where a file is made that is to replace ``path`` together with others, see :func:`replace_together`."""
    path = Path(path)
    return path.with_name(f".{path.name}.new")


def replace_together(paths: Iterable[str | Path]) -> None:
    """Move what was made at ``fresh(path)`` to every ``path``; all of them must be there before the first is moved.

    Raises:
        FileNotFoundError: one was not made; nothing is moved then.
    """
    pairs = [(fresh(path), Path(path)) for path in paths]
    for made, _ in pairs:
        if not made.is_file():
            raise FileNotFoundError(f"{made} was not made")
    for made, path in pairs:
        os.replace(made, path)
