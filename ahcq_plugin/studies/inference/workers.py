# SPDX-License-Identifier: Apache-2.0
"""Each way to run a SAM in a process of its own, so that its memory is its own, and asked in turn with the base."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ahcq_plugin.studies.inference.artefacts import Subject, image_size
from ahcq_plugin.studies.inference.timing import noise
from ahcq_plugin.studies.inference.variants import VARIANTS
from ahcq_plugin.support.stopwatch import Stopwatch


class WorkerError(RuntimeError):
    """A way does not run; the message is the last line of what its process raised."""


class Worker:
    """A process that holds one model; ``ask`` has it do something and waits.

    Args:
        variant: name of the way.
        folder: the artefacts of ``subject``.
        threads: within an operator.

    Raises:
        WorkerError: the model cannot be opened.
    """

    def __init__(self, variant: str, subject: Subject, folder: Path, threads: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, variant, subject, folder, threads), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self._answer()
        except WorkerError:
            self.close()
            raise

    def ask(self, what: str, *args: Any) -> Any:
        """Call a method of :class:`_Held` there.

        Raises:
            WorkerError: it raised, or the process ended.
        """
        self.connection.send((what, args))
        return self._answer()

    def _answer(self) -> Any:
        try:
            ok, value = self.connection.recv()
        except EOFError as error:
            raise WorkerError(f"its process ended with {self.process.exitcode}") from error
        if not ok:
            raise WorkerError(value)
        return value

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.terminate()
        self.process.join()


class _Held:
    def __init__(self, variant: str, subject: Subject, folder: Path, threads: int):
        torch.set_num_threads(threads)
        way = next(v for v in VARIANTS if v.name == variant)
        self.subject, self.before = subject, _resident()
        self.runner = way.open(subject, folder, threads)
        self.side = image_size(subject.build())
        self.image = noise(self.side, 1)["image"]
        self.features = self.runner.encode(self.image)

    def _call(self, boxes: int) -> Callable[[], Any]:
        if not boxes:
            return lambda: self.runner.encode(self.image)
        prompts = noise(self.side, boxes)["boxes"]
        return lambda: self.runner.decode(self.features, prompts)

    def seconds(self, boxes: int) -> float:
        """Of the encoder (0 boxes), or of the decoder with so many."""
        call = self._call(boxes)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak(self, boxes: int) -> int:
        """Bytes that the process grows to in a call, beyond what it had before the model was opened."""
        call = self._call(boxes)
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        watch = Stopwatch()
        with watch("call"):
            call()
        return int(watch.records["call"]["peak_bytes"]) - self.before

    def masks(self, count: int, seed: int) -> list[np.ndarray]:
        """(N, h, w) bool for each of so many scenes."""
        found = []
        for batch in self.subject.batches(count, seed):
            found.append((self.runner.decode(self.runner.encode(batch["image"]), batch["boxes"])[:, 0] > 0).numpy())
        return found


def _resident() -> int:
    watch = Stopwatch()
    with watch("now"):
        pass
    return int(watch.records["now"]["peak_bytes"])


def _serve(connection: Connection, variant: str, subject: Subject, folder: Path, threads: int) -> None:
    with torch.no_grad():
        held = _answered(connection, lambda: _Held(variant, subject, folder, threads))
        while held is not None:
            try:
                what, args = connection.recv()
            except EOFError:
                return
            _answered(connection, lambda: getattr(held, what)(*args), tell=True)  # noqa: B023 - called at once


def _answered(connection: Connection, call: Callable[[], Any], tell: bool = False) -> Any:
    """Send what a call returns, or that it did, or what it raised: that is an answer too, and the others go on."""
    try:
        value = call()
    except Exception:  # noqa: BLE001 - whatever a runtime raises
        connection.send((False, traceback.format_exc().strip().splitlines()[-1][:300]))
        return None
    connection.send((True, value if tell else None))
    return value
