# SPDX-License-Identifier: Apache-2.0
"""What ``tools/ptq.py`` does: config and overrides, checks, the run, the table."""

from __future__ import annotations

import contextlib
import errno
import io
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import init_dist, is_main_process
from mmengine.runner import Runner
from rich.console import Console

from ahcq_plugin.graph import UnitError
from ahcq_plugin.mm.config_file import read_config
from ahcq_plugin.mm.detectors.loading import load_detector
from ahcq_plugin.mm.dry_run import initialise, make_dry_run
from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.mm.preflight import check_keys, loop_class, preflight
from ahcq_plugin.mm.quantization_loop import PTQResult
from ahcq_plugin.mm.readers import safe_readers
from ahcq_plugin.mm.report.summary import coverage_lines, everything_lines, result_table, size_line, stage_table
from ahcq_plugin.ptq import AuditError, ResumeError
from ahcq_plugin.support.batches import blaming
from ahcq_plugin.support.files import check_work_dir, write_text
from ahcq_plugin.support.lock import LockedError
from ahcq_plugin.support.tool import BAD_INPUT, OK, is_foreseen, one_line

#: Who may have started several processes; none: there is one.
LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
#: What is the input's fault also in the middle of a run, as is what our own code says in words of its own.
_INPUT_ERRORS = (DataError, ResumeError, UnitError, FileNotFoundError)
#: The system's refusals to write, which no part of a run can do anything about.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE)


@safe_readers()
def launch(
    config: str,
    work_dir: str | None = None,
    cfg_options: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    w_bits: int | None = None,
    a_bits: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    seed: int | None = None,
    toolkit: str | None = None,
    launcher: str = "none",
    trust_checkpoint: bool = False,
    console: Console | None = None,
) -> int:
    """Run a PTQ config and print its table; of several processes (``launcher``, see MMEngine's) the first prints.

    Returns: 0; 1 when the audit failed (its problems are printed, no figures); 2 when the input is bad or the SAM
        cannot be quantized (one line).
    Raises: whatever else goes wrong in the middle of a run.
    """
    console = console or Console()
    try:
        cfg = read_config(config, cfg_options)
        cfg.launcher = launcher
        if launcher != "none":
            start_processes(launcher, cfg)
            console.quiet = not is_main_process()
        if work_dir == "":
            raise ValueError("the work dir is empty: give a folder, or leave it out")
        cfg.work_dir = work_dir or str(Path("work_dirs") / Path(config).stem)
        override_recipe(cfg, name=recipe, w_bits=w_bits, a_bits=a_bits, seed=seed)
        override_loop(cfg, device=device, toolkit=toolkit, resume=resume or None, seed=seed)
        if trust_checkpoint:
            cfg.trust_checkpoint = True
        runner = build_runner(cfg, dry_run, console)
    except (ValueError, FileNotFoundError) as error:
        _complain(console, f"error: {one_line(error)}")
        return BAD_INPUT
    return run(runner, console)


def run(runner: Runner, console: Console) -> int:
    """Run and print the table, or one line about what is wrong with the input, its traceback in ``error.txt``.

    Returns: an exit code, see :func:`launch`.
    """
    try:
        runner.test()
    except AuditError as error:
        _complain(console, str(error))
        return error.exit_status
    except LockedError as error:  # the work dir is another run's, its error.txt too
        _complain(console, f"error: {one_line(error)}")
        return BAD_INPUT
    except (ValueError, FileNotFoundError, UnitError) as error:
        if runner.test_loop.computing and not (isinstance(error, _INPUT_ERRORS) or is_foreseen(error)):
            raise  # a defect, not the input's fault
        trace = Path(runner.work_dir) / "error.txt"
        if is_main_process():
            write_text(traceback.format_exc(), trace)
        _complain(console, f"error: {one_line(error)} (traceback in {trace})")
        return BAD_INPUT
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        _complain(console, f"error: {one_line(error)}; what is finished is kept: --resume goes on with it")
        return BAD_INPUT
    print_result(runner.test_loop.result, console)
    return OK


def start_processes(launcher: str, cfg: Config) -> None:
    """Join the processes that ``launcher`` started, with the config's ``env_cfg.dist_cfg``; gloo without a GPU.

    MMEngine counts on GPUs when it joins processes and when it wraps the model; without them both are done here.

    Raises:
        ValueError: they cannot be joined.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f"unknown launcher {launcher!r}; allowed: {', '.join(LAUNCHERS)}")
    try:
        if launcher == "pytorch" and not torch.cuda.is_available():
            torch.distributed.init_process_group("gloo")
            cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)
        else:
            init_dist(launcher, **(cfg.get("env_cfg") or {}).get("dist_cfg", {}))
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--launcher {launcher}: {type(error).__name__}: {error}; start the tool with torchrun, srun or mpirun"
        ) from error


def _complain(console: Console, text: str) -> None:
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def override_recipe(cfg: Config, **keys: Any) -> None:
    """Set the recipe's keys that are not None, in place."""
    given = {key: value for key, value in keys.items() if value is not None}
    if given:
        cfg.recipe = {**(cfg.get("recipe") or {}), **given}


def override_loop(cfg: Config, seed: int | None = None, **keys: Any) -> None:
    """Set the test loop's keys that are not None, in place; ``seed`` is that of calibration."""
    loop = cfg.get("test_cfg") or {}
    loop.update({key: value for key, value in keys.items() if value is not None})
    if seed is not None:
        loop["calib"] = {**(loop.get("calib") or {}), "seed": seed}


def build_runner(cfg: Config, dry_run: bool, console: Console) -> Runner:
    """Runner with its test loop built, everything checked; for a dry run cut down, which is printed.

    Raises:
        ValueError, FileNotFoundError: see :func:`ahcq_plugin.mm.preflight.preflight`.
    """
    check_keys(cfg)
    loop_class(cfg).check_settings(cfg)
    check_work_dir(cfg.work_dir)
    for line in make_dry_run(cfg) if dry_run else ():
        console.print(f"dry run: {line}", highlight=False)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints while it reads annotations
        preflight(cfg, random_weights=dry_run)
        with blaming("the config does not build"):
            load_from, cfg.load_from = cfg.get("load_from"), None  # MMEngine's loader would unpickle it
            runner = Runner.from_cfg(cfg)
            runner.cfg.load_from = cfg.load_from = load_from
            _ = runner.test_loop  # built on first access
            if load_from and not dry_run:
                load_detector(runner.model, cfg)
    if dry_run:
        initialise(runner.model)
    return runner


def print_result(result: PTQResult, console: Console) -> None:
    """Tables of figures and of stages, and where the files are."""
    console.print(result_table(result.metrics))
    console.print(stage_table(result.metrics["stages"]))
    for line in everything_lines(result.metrics):
        console.print(line, highlight=False)
    console.print(
        "audit passed: " + ", ".join(f"{role} {n:,}" for role, n in result.metrics["audit"]["counts"].items())
    )
    for line in coverage_lines(result.metrics["coverage"]):
        console.print(line, highlight=False)
    for path in result.files.values():
        console.print(f"written: {path}", soft_wrap=True)
    if "files" in result.metrics:  # the process that wrote them has their sizes
        console.print(size_line(result.metrics["files"]), highlight=False)
