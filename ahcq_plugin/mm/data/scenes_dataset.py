# SPDX-License-Identifier: Apache-2.0
"""The embedded data set as an MMDetection data set."""

from __future__ import annotations

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from ahcq_plugin.zoo.scenes import write_coco


@DATASETS.register_module()
class GeneratedScenes(CocoDataset):
    """Scenes of :func:`ahcq_plugin.zoo.scenes.write_coco`, drawn on first use.

    Args:
        data_root: folder of the scenes; each (count, seed, size) gets its own below it.
        count, seed, size: see ``write_coco``.
    """

    METAINFO = {"classes": ("object",), "palette": [(220, 20, 60)]}

    def __init__(self, data_root: str, count: int, seed: int = 0, size: int = 256, **kwargs):
        folder = f"{data_root}/scenes_{count}_{seed}_{size}"
        ann_file = write_coco(folder, count, seed, size)
        super().__init__(
            ann_file=str(ann_file.resolve()), data_prefix=dict(img=str(ann_file.resolve().parent / "images")), **kwargs
        )
