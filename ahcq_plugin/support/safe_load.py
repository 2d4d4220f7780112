# SPDX-License-Identifier: Apache-2.0
"""The one reader of checkpoints: SAM's and SAM 2's, detectors', timm's and our own.

A checkpoint comes from anywhere, and ``torch.load`` runs what some of them ask for: always with ``weights_only=False``,
through its legacy formats also with True (CVE-2025-32434), and it takes sizes from the pickle without a look at the
archive. Here torch opens nothing: the zip archive's directory is read by ``zipfile``, the pickle in it by
:mod:`ahcq_plugin.support.unpickle`, and all that is read has to match the file's digest (:mod:`.checked`) or, without
one, the members' CRC-32.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import zipfile
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from ahcq_plugin.support.batches import to_device
from ahcq_plugin.support.checked import check_seal
from ahcq_plugin.support.legacy_file import is_legacy, read_legacy
from ahcq_plugin.support.pickled_values import Refused
from ahcq_plugin.support.unpickle import ReadStorage, drop_inert, unpickle

logger = logging.getLogger(__name__)

MAX_PICKLE = 1 << 28  # bytes; SAM-H's has 70 thousand
_CHUNK = 1 << 20
_LENGTHS_AT = 26  # bytes from the start of a member's own header to the lengths of its two last fields, at its end
_TRUST = "if you trust it, re-save its tensors with torch.save of a current torch; for a detector, --trust-checkpoint"
_DAMAGE = (  # what zipfile, the pickle and torch raise for bytes that are not what was written
    zipfile.BadZipFile,
    ArithmeticError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    struct.error,
    TypeError,
    ValueError,
)


def safe_load(
    path: str | Path, map_location: str | torch.device = "cpu", *, trust: bool = False, legacy: bool = False
) -> Any:
    """What ``torch.save`` wrote to ``path``: tensors, parameters and plain values in nested containers.

    Equal to ``torch.load(weights_only=True)``, views of one storage share it again; NumPy scalars besides. Top-level
    entries of a dict that hold objects of MMEngine's history, NumPy arrays or ``argparse.Namespace`` are left out.
    Quantized, sparse and other special tensors are refused.

    Args:
        map_location: device of all tensors.
        legacy: read the format before zip too (``legacy_file.py``), in which OpenMMLab publishes; it has no checksum.
        trust: use ``torch.load(weights_only=False)`` instead, which runs any code that the file asks for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: in one line: an older format than zip, a name that a checkpoint has no use for, damage.
    """
    if "://" in str(path):
        raise ValueError(f"checkpoint {path} is a URL; download it and give the file's path")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint not found: {path}")
    try:
        with open(path, "rb") as file:
            sealed = check_seal(file)
            if trust:
                return _trusted(path, map_location)
            if legacy and is_legacy(file):
                content = to_device(read_legacy(file), map_location)
            else:
                archive = _Archive(file, sealed)
                content = unpickle(io.BytesIO(archive.pickle()), archive.storage_reader(map_location))
            for key, found in drop_inert(content).items():
                logger.info("%s: entry %r is left out, it holds %s", path, key, found)
            return content
    except Refused as error:
        raise ValueError(f"checkpoint {path} is refused: {_line(error)}; {_TRUST}") from error
    except _DAMAGE as error:
        raise ValueError(f"checkpoint {path} cannot be read ({_line(error)}): copy or download it again") from error


def _trusted(path: str | Path, map_location: Any) -> Any:
    logger.warning("%s is read with pickle, which runs whatever code the file asks for (trust)", path)
    try:
        return torch.load(path, map_location=map_location, weights_only=False)
    except Exception as error:  # code of the file's choice
        raise ValueError(f"torch.load failed with {type(error).__name__}: {error}") from error


def _line(error: Exception) -> str:
    text = f"nothing under {error}" if isinstance(error, KeyError) else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]


class _Archive:
    """The members of a zip archive as ``torch.save`` writes it: one folder, nothing compressed.

    Raises:
        Refused: another format, or an archive that torch would not write.
    """

    def __init__(self, file: BufferedReader, sealed: bool):
        self.file, self.sealed = file, sealed
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        _check_format(file.read(512))
        self.zip = zipfile.ZipFile(file)
        members = self.zip.infolist()
        file.seek(size - len(self.zip.comment) - 2)
        if int.from_bytes(file.read(2), "little") != len(self.zip.comment):
            raise ValueError("the archive's end is missing")
        if self.zip.comment and not sealed:
            raise ValueError("the archive's comment is no digest of ours")
        self.members = {member.filename: member for member in members}
        self.folder = members[0].filename.split("/")[0] if members else ""
        if len(self.members) != len(members):
            raise Refused("the archive holds two members of one name")
        for member in members:
            self._check(member)
        if sum(member.file_size for member in members) > size:
            raise Refused("the archive's members overlap")
        if any(name.startswith(f"{self.folder}/code/") for name in self.members) or self._has("constants.pkl"):
            raise Refused("it is a TorchScript archive, which holds code")
        if not self._has("data.pkl"):
            raise Refused("the archive has no data.pkl, it is not of torch.save")
        if self._has("byteorder") and self._bytes("byteorder") != b"little":
            raise Refused("it was written on a big-endian machine")

    def _check(self, member: zipfile.ZipInfo) -> None:
        name = member.orig_filename
        parts = name.split("/")
        if "\\" in name or "\0" in name or {"", ".", ".."} & set(parts) or len(parts) < 2 or parts[0] != self.folder:
            raise Refused(f"the archive's member {name[:80]!r} is not in the folder {self.folder!r}")
        if member.flag_bits & 1:
            raise Refused(f"the archive's member {name!r} is encrypted")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise Refused(f"the archive's member {name!r} is compressed, which torch.save never does")

    def _has(self, name: str) -> bool:
        return f"{self.folder}/{name}" in self.members

    def _read_into(self, name: str, buffer: memoryview) -> None:
        """Content of a member; without a digest of the file its CRC-32 must be right."""
        member, start, crc = self.members[f"{self.folder}/{name}"], 0, 0
        self.zip.open(member).close()  # compares the member's own header with the archive's directory
        self.file.seek(member.header_offset + _LENGTHS_AT)
        lengths = struct.unpack("<HH", self.file.read(4))  # of the name and the padding in front of the content
        self.file.seek(sum(lengths), os.SEEK_CUR)
        while start < len(buffer):
            got = self.file.readinto(buffer[start : start + _CHUNK])
            if not got:
                raise ValueError(f"the archive ends within {name!r}")
            if not self.sealed:
                crc = zlib.crc32(buffer[start : start + got], crc)
            start += got
        if not self.sealed and crc != member.CRC:
            raise ValueError(f"CRC-32 of {name!r} is {crc:08x}, expected {member.CRC:08x}")

    def _bytes(self, name: str) -> bytes:
        content = bytearray(self.members[f"{self.folder}/{name}"].file_size)
        self._read_into(name, memoryview(content))
        return bytes(content)

    def pickle(self) -> bytes:
        """The pickle that says what the file holds."""
        size = self.members[f"{self.folder}/data.pkl"].file_size
        if size > MAX_PICKLE:
            raise Refused(f"its pickle has {size} bytes, more than {MAX_PICKLE}")
        return self._bytes("data.pkl")

    def storage_reader(self, device: str | torch.device) -> ReadStorage:
        """A function for ``unpickle``: the storage of a key, as many elements as the archive has bytes for."""

        def read(key: str, dtype: torch.dtype, elements: int) -> torch.UntypedStorage:
            member = self.members.get(f"{self.folder}/data/{key}")
            if member is None:
                raise ValueError(f"the archive has no storage {key!r:.80}")
            if elements != member.file_size // dtype.itemsize:
                raise Refused(
                    f"storage {key!r:.80} is said to have {elements} elements of {dtype}, has {member.file_size} bytes"
                )
            content = torch.empty(member.file_size, dtype=torch.uint8)
            self._read_into(f"data/{key}", content.numpy().data)
            return content.to(device).untyped_storage()

        return read


def _check_format(head: bytes) -> None:
    if head.startswith(b"PK\3\4"):
        return
    if head[257:262] == b"ustar":
        raise Refused("it is a tar archive (a torch before 0.4); only zip archives are read")
    if head[:1] == b"\x80":
        raise Refused("it is a bare pickle (torch.save before 1.6, or a pickle file); only zip archives are read")
    raise ValueError(f"it begins with {head[:8]!r}, a checkpoint is a zip archive as torch.save writes it")
