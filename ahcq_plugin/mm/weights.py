# SPDX-License-Identifier: Apache-2.0
"""Published weights that configs need: which, whether they are there, downloaded, verified, converted."""

from __future__ import annotations

import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from tqdm import tqdm

from ahcq_plugin.mm.config_file import read_config
from ahcq_plugin.support.files import sha256_of, write_text
from ahcq_plugin.zoo.published import PUBLISHED_FILES, PublishedFile, damage, of_model, of_path, record_of

CHUNK = 2**20


def wanted(names: Iterable[str]) -> list[PublishedFile]:
    """Entries of names, or of all that a config file (``*.py``) needs.

    Raises:
        ValueError, FileNotFoundError: an unknown name, no such config, or one without such files.
    """
    entries: dict[str, PublishedFile] = {}
    for name in names:
        if name.endswith(".py"):
            entries |= {entry.name: entry for entry in _of_config(name)}
        elif name in PUBLISHED_FILES:
            entries[name] = PUBLISHED_FILES[name]
        else:
            raise ValueError(
                f"unknown weights {name!r}; allowed: {', '.join(PUBLISHED_FILES)}, or the path of a config"
            )
    return list(entries.values())


def _of_config(path: str) -> list[PublishedFile]:
    cfg = read_config(path)
    sam = cfg.get("sam") or {}
    given = (sam.get("checkpoint"), cfg.get("load_from"))
    entries = [of_path(named) for named in given if isinstance(named, str) and named]
    if sam.get("checkpoint") is None:  # False would be random weights
        name = sam.get("name", "")
        entries.insert(0, of_model(name.get("name", "") if isinstance(name, Mapping) else str(name)))
    entries = [entry for entry in entries if entry is not None]
    if not entries:
        raise ValueError(f"{path} needs no weights that are known here")
    return entries


def state_of(entry: PublishedFile, folder: Path) -> str:
    """``missing``, ``ok`` (as published, or as recorded when it was fetched), ``there`` (nothing to compare with), or
    ``damaged: ...``."""
    path = folder / entry.file
    if not path.is_file():
        return "missing"
    known = record_of(path).is_file() or (not entry.convert and bool(entry.sha256 or entry.size))
    wrong = damage(path, entry, bool(entry.convert))
    if not known and not zipfile.is_zipfile(path):
        wrong = "it is no checkpoint (PyTorch's are zip archives)"
    if wrong:
        return f"damaged: {wrong}"
    return "ok" if known else "there"


def download(entry: PublishedFile, path: Path, progress: bool = True) -> None:
    """Fetch the published file into ``path``; what an interrupted download left (``path``.part) is gone on with.

    Raises:
        ConnectionError: the server cannot be reached, refuses, or stops early.
        ValueError: what came is not the published file; it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(entry.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if have and answer.status != 206:  # a server that does not know ranges sends everything
                have = 0
            length = answer.headers.get("Content-Length")
            total = None if length is None else have + int(length)
            _write(answer, part, have, total, entry.published, progress)
    except urllib.error.HTTPError as error:
        if not (error.code == 416 and have):  # nothing is left to send: the part is the whole, or not of this file
            raise ConnectionError(f"{entry.url}: {error.code} {error.reason}") from error
        total = have
    except OSError as error:
        raise ConnectionError(
            f"cannot fetch {entry.url} ({getattr(error, 'reason', error)}); without a network, download it elsewhere "
            f"and put it at {path}"
        ) from error
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(
            f"{entry.url} stopped at {part.stat().st_size:,} of {total:,} bytes; run it again to go on"
        )
    wrong = damage(part, entry)
    if wrong:
        part.unlink()
        raise ValueError(f"{entry.url} is not what was published: {wrong}; removed, try again")
    part.replace(path)


def _write(answer, part: Path, have: int, total: int | None, name: str, progress: bool) -> None:
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name[:40], disable=not progress)
    with bar, part.open("ab" if have else "wb") as out:
        while chunk := answer.read(CHUNK):
            out.write(chunk)
            bar.update(len(chunk))


def fetch(entry: PublishedFile, folder: Path, configs: Path, progress: bool = True) -> str:
    """Have ``folder/entry.file``: there and whole, or downloaded, verified and converted.

    Args:
        configs: folder ``mm_configs``; converters build the detector from it.

    Returns: what was done, in words.
    Raises:
        ConnectionError, ValueError: see ``download``; a file that is there is damaged; a converter's error.
    """
    state, path = state_of(entry, folder), folder / entry.file
    if state.startswith("damaged"):
        raise ValueError(f"{path} is {state}; remove it to fetch it again")
    if state != "missing":
        return f"{path}: {state}"
    raw = folder / entry.published
    if not (entry.convert and raw.is_file()):
        download(entry, raw, progress)
    if entry.convert == "hdetr":
        from ahcq_plugin.mm.detectors.convert_hdetr import convert_hdetr

        convert_hdetr(raw, path, configs / "_base_" / "detectors" / f"{entry.name}.py")
    elif entry.convert == "dino":
        from ahcq_plugin.mm.detectors.convert_dino import convert_dino

        convert_dino(raw, path, configs / "_base_" / "detectors" / f"{entry.name}.py")
    elif entry.convert == "yolox":
        from ahcq_plugin.mm.detectors.convert_yolox import convert_yolox

        convert_yolox(raw, path)
    done = f"{path}: {'converted from ' + raw.name if entry.convert else 'fetched'}"
    if entry.convert or len(entry.sha256) < 64:
        write_text(f"{sha256_of(path)}  {path.name}\n", record_of(path))  # as sha256sum writes and checks it
        if not entry.convert:
            known = f"{len(entry.sha256)} of 64 digits" if entry.sha256 else "no digit"
            return f"{done}; published of its SHA-256: {known}; what came is recorded in {record_of(path).name}"
    return done
