# SPDX-License-Identifier: Apache-2.0
"""Install mmcv as constraints.txt pins it, with its ops: a cached wheel, one that pip finds, or compiled and kept."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
VERSION = re.search(r"^mmcv==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
DOWNLOAD = [*PIP, "download", "-q", "--no-deps", f"mmcv=={VERSION}"]
ADVICE = "mmcv did not compile, see {}: it needs g++, python3-dev and 2 GB of memory a job (MAX_JOBS=1), see README.md"


def can_use_gpu() -> bool:
    """A GPU is here, and the nvcc of the CUDA that torch was built for."""
    nvcc = subprocess.run("nvcc --version", shell=True, capture_output=True, text=True).stdout  # empty without nvcc
    return torch.cuda.is_available() and f"release {torch.version.cuda.split('.')[0]}." in nvcc


def get_source(folder: Path, gpu: bool) -> str:
    """The sources of mmcv under ``folder``, fit to compile fast: most of the time goes into reading torch's headers."""
    subprocess.run([*DOWNLOAD, "--no-build-isolation", "--no-binary=mmcv", "-d", str(folder)], check=True)
    shutil.unpack_archive(folder / f"mmcv-{VERSION}.tar.gz", folder)
    source = folder / f"mmcv-{VERSION}"
    if not gpu:  # the 56 files that register operations become one; those with kernels share names, and stay
        parts = [p for p in (source / "mmcv" / "ops" / "csrc" / "pytorch").glob("*.cpp") if p.name != "pybind.cpp"]
        names = sorted(part.rename(part.with_suffix(".inc")).name for part in parts)
        parts[0].with_name("operations.cpp").write_text("".join(f'#include "{name}"\n' for name in names))
    return str(source)


def compile_wheel(folder: Path, gpu: bool) -> None:
    """Build the wheel into ``folder``, without slow debug information (-g0); SystemExit with advice if that fails."""
    variant = {} if gpu else {"FORCE_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}  # mmcv compiles for a GPU that it sees
    env = {"MAX_JOBS": str(os.cpu_count()), "CFLAGS": "-g0"} | os.environ | {"MMCV_WITH_OPS": "1"} | variant
    print(f"Compiling mmcv {VERSION} in {env['MAX_JOBS']} jobs: once, 4 CPU-minutes (more for a GPU)", flush=True)
    command = [*PIP, "wheel", "-v", "--no-build-isolation", "--no-deps", get_source(folder, gpu), "-w", str(folder)]
    lines = []
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            lines.append(line)
            if step := re.match(r"\s*\[(\d+)/(\d+)\]", line):  # as ninja counts
                print(f"mmcv: {step[1]} of {step[2]} objects", flush=True)
    if process.returncode:
        (log := folder.with_name("build.log")).write_text("".join(lines))
        sys.exit("".join([line for line in lines if "rror: " in line][:10]) + ADVICE.format(log))


def main() -> None:
    gpu = can_use_gpu()
    use_ops = f"import torch, mmcv.ops as o; x = torch.eye(4).{'cuda' if gpu else 'cpu'}(); o.nms(x, x[0], 0.5)"
    variant = f"{sys.implementation.cache_tag}-torch{torch.__version__}-{'gpu' if gpu else 'cpu'}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ahcq_plugin" / "wheels" / variant
    cache.mkdir(parents=True, exist_ok=True)
    for source in ("cache", "pip", "compiler"):
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            if source == "pip":
                subprocess.run([*DOWNLOAD, "--only-binary=mmcv", "-d", fresh], stderr=subprocess.DEVNULL)
            elif source == "compiler":
                compile_wheel(Path(fresh), gpu)
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
