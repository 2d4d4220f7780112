# SPDX-License-Identifier: Apache-2.0
"""Install mmcv with its compiled ops, at the version that constraints.txt pins, beside the Python that runs this.

From the cache of wheels, else a wheel that pip finds, else compiled from source and kept for the next environment.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
VERSION = re.search(r"^mmcv==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
COLUMNS = [TextColumn("mmcv: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
ADVICE = """mmcv did not compile (errors above, all of it in {}). It needs g++, Python's headers (python3-dev) and
2 GB of memory a job: try MAX_JOBS=1 make install. A wheel for this Python and torch does as well: see README.md."""


def can_use_gpu() -> bool:
    """A GPU is here, and the nvcc of the CUDA that torch was built for."""
    nvcc = subprocess.run("nvcc --version", shell=True, capture_output=True, text=True).stdout  # empty without nvcc
    return torch.cuda.is_available() and f"release {torch.version.cuda.split('.')[0]}." in nvcc


def compile_wheel(folder: str, gpu: bool) -> None:
    """Build the wheel into ``folder`` under a progress bar; SystemExit with advice if that fails."""
    variant = {} if gpu else {"FORCE_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}  # mmcv compiles for a GPU that it sees
    env = {"MAX_JOBS": str(os.cpu_count())} | os.environ | {"MMCV_WITH_OPS": "1"} | variant
    print(f"Compiling mmcv {VERSION} in {env['MAX_JOBS']} jobs: once, 20-35 minutes on two cores", flush=True)
    command = [*PIP, "wheel", "-v", "--no-build-isolation", "--no-deps", f"mmcv=={VERSION}", "-w", folder]
    lines = []
    with (
        Progress(*COLUMNS, TextColumn("left:"), TimeRemainingColumn()) as progress,
        subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
    ):
        task = progress.add_task("getting ready", total=None)
        for line in process.stdout:
            lines.append(line)
            if step := re.match(r"\s*\[(\d+)/(\d+)\]", line):  # as ninja counts
                progress.update(task, completed=int(step[1]), total=int(step[2]), description="compiling")
                if not progress.console.is_terminal:
                    print(f"mmcv: {step[1]} of {step[2]} objects", flush=True)
    if process.returncode:
        log = Path(folder).with_name("build.log")
        log.write_text("".join(lines))
        sys.exit("".join([line for line in lines if "rror: " in line][:10]) + ADVICE.format(log))


def main() -> None:
    gpu = can_use_gpu()
    use_ops = f"import torch, mmcv.ops as o; x = torch.eye(4).{'cuda' if gpu else 'cpu'}(); o.nms(x, x[0], 0.5)"
    find = [*PIP, "download", "-q", "--no-deps", "--only-binary=mmcv", f"mmcv=={VERSION}", "-d"]
    variant = f"{sys.implementation.cache_tag}-torch{torch.__version__}-{'gpu' if gpu else 'cpu'}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ahcq_plugin" / "wheels" / variant
    cache.mkdir(parents=True, exist_ok=True)
    for source in ("cache", "pip", "compiler"):
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            if source == "pip":
                subprocess.run([*find, fresh], stderr=subprocess.DEVNULL)  # usually finds none
            elif source == "compiler":
                compile_wheel(fresh, gpu)
            for wheel in Path(fresh).glob("*.whl"):
                wheel.replace(cache / wheel.name)
        for wheel in cache.glob(f"mmcv-{VERSION}-*.whl"):
            subprocess.run([*PIP, "install", "-q", "--force-reinstall", "--no-deps", wheel], check=True)
            subprocess.run([*PIP, "install", "-c", CONSTRAINTS, f"mmcv=={VERSION}"], check=True)  # what it depends on
            if not subprocess.run([sys.executable, "-c", use_ops]).returncode:
                return print(f"mmcv {VERSION} from {source}: installed, its ops run; wheel kept as {wheel}")
            wheel.unlink()
    sys.exit(f"mmcv {VERSION} was compiled and installed, but its ops do not run: see the error above")


if __name__ == "__main__":
    main()
