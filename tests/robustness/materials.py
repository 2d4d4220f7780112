# SPDX-License-Identifier: Apache-2.0
"""Good input, made once by the tools themselves: images, a config, a quantized SAM, its spec."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ahcq_plugin.zoo.checkpoints import default_checkpoint
from ahcq_plugin.zoo.scenes import write_coco
from tests.robustness.zygote import ROOT, Zygote

_CONFIG = """
_base_ = ["{root}/mm_configs/_base_/detectors/none.py", "{root}/mm_configs/_base_/sam/sam_tiny.py"]
recipe = dict(name="rtn", w_bits=8, a_bits=8)
data = dict(
    type="CocoDataset",
    metainfo=dict(classes=("object",)),
    data_root="{data}",
    ann_file="instances.json",
    data_prefix=dict(img="images/"),
)
test_dataloader = dict(dataset=data)
test_cfg = dict(calib=dict(dataset=data, num_images=1), cache_dir=None)
"""


@dataclass(frozen=True)
class Materials:
    """Files that are good.

    Attributes:
        coco: folder with ``instances.json`` and ``images/`` of two scenes.
        config: of a run on them, rounding to nearest.
        run: the work dir of that run.
        spec: what ``tools/export.py`` wrote of it.
        weights: of ``sam_tiny`` in floating point.
    """

    coco: Path
    config: Path
    run: Path
    spec: Path
    weights: Path

    @property
    def quantized(self) -> list[Path]:
        """Both files of the quantized model."""
        return [self.run / "quantized.pth", self.run / "quantized.safetensors"]

    def annotations(self) -> dict[str, Any]:
        """A fresh copy of the data's JSON."""
        return json.loads((self.coco / "instances.json").read_text())

    def image(self) -> Path:
        """The first image."""
        return self.coco / "images" / self.annotations()["images"][0]["file_name"]


def config_text(data: Path) -> str:
    """A config on a COCO folder."""
    return _CONFIG.format(root=ROOT, data=data)


def make_materials(folder: Path, zygote: Zygote) -> Materials:
    """Run the tools; AssertionError with what they said where one fails."""
    coco = write_coco(folder / "coco", 2, seed=5)
    coco = coco if coco.is_dir() else coco.parent
    made = Materials(coco, folder / "config.py", folder / "run", folder / "spec", folder / "sam_tiny.pth")
    made.config.write_text(config_text(coco))
    shutil.copy(default_checkpoint("sam_tiny"), made.weights)
    for tool, argv in (
        ("ptq.py", [str(made.config), "--work-dir", str(made.run)]),
        ("export.py", [str(made.run / "quantized.pth"), "-o", str(made.spec)]),
    ):
        ended = zygote.run(tool, argv, folder, limit=600)
        assert ended.status == 0, ended.text
    return made
