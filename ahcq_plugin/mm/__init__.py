# SPDX-License-Identifier: Apache-2.0
"""The MMEngine / MMDetection side: a box-prompted SAM as a detector and post-training quantization as a test loop.

Importing registers everything; in a config: ``custom_imports = dict(imports=['ahcq_plugin.mm'])``.
"""

from ahcq_plugin.mm.box_prompted_sam import BoxPromptedSAM, NoDetector
from ahcq_plugin.mm.data.images import KeepOriginalImage
from ahcq_plugin.mm.data.scenes_dataset import GeneratedScenes
from ahcq_plugin.mm.data.video_dataset import GeneratedClips, VideoFolder
from ahcq_plugin.mm.detectors.focalnet import TimmFocalNet
from ahcq_plugin.mm.detectors.hdetr import HDeformableDETR, HDeformableDETRHead
from ahcq_plugin.mm.evaluation.coco_ap import ExactCocoMetric
from ahcq_plugin.mm.evaluation.jf_metric import JFMetric
from ahcq_plugin.mm.ptq_loop import PTQLoop
from ahcq_plugin.mm.video_loop import VideoPTQLoop

__all__ = [
    "BoxPromptedSAM",
    "ExactCocoMetric",
    "GeneratedClips",
    "GeneratedScenes",
    "HDeformableDETR",
    "HDeformableDETRHead",
    "JFMetric",
    "KeepOriginalImage",
    "NoDetector",
    "PTQLoop",
    "TimmFocalNet",
    "VideoFolder",
    "VideoPTQLoop",
]
