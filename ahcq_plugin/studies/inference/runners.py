# SPDX-License-Identifier: Apache-2.0
"""A SAM in any runtime behind two calls, ``encode`` an image and ``decode`` boxes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export.onnx_runtimes import open_graph
from ahcq_plugin.export.onnx_sam import prompt_inputs

#: Labels of the two corners of a box among the points of a decoder graph.
_BOX_LABELS = (2.0, 3.0)


class Runner(Protocol):
    """A model in a runtime."""

    def encode(self, image: Tensor) -> Any:
        """Whatever ``decode`` takes, of an image (1, 3, S, S), float32, normalised."""

    def decode(self, features: Any, boxes: Tensor) -> Tensor:
        """Mask logits (N, 1, h, w), float32, for boxes (N, 4) xyxy in pixels of the input."""


class TorchSam:
    """A ``Sam`` in PyTorch, in floating point, fake-quantized or on integers.

    Args:
        dtype: of image encoder and mask decoder; the prompt encoder stays in float32.
        compiled: both by ``torch.compile``.
    """

    def __init__(self, sam: nn.Module, dtype: torch.dtype = torch.float32, compiled: bool = False):
        self.prompts, self.dtype = sam.prompt_encoder, dtype
        self.encoder, self.decoder = (_made(m, dtype, compiled) for m in (sam.image_encoder, sam.mask_decoder))

    def encode(self, image: Tensor) -> Tensor:
        """(1, C, h, w)."""
        return self.encoder(image.to(self.dtype))

    def decode(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Of the single-mask token."""
        sparse, dense = self.prompts(points=None, boxes=boxes, masks=None)
        position = self.prompts.get_dense_pe()
        given = (tensor.to(self.dtype) for tensor in (features, position, sparse, dense))
        return self.decoder(*given, multimask_output=False)[0].float()


class TorchSam2:
    """A SAM 2 in PyTorch on single images, as ``SAM2ImagePredictor`` calls it; arguments as of :class:`TorchSam`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, compiled: bool = False):
        self.prompts, self.dtype = model.sam_prompt_encoder, dtype
        self.no_memory = model.no_mem_embed.detach().reshape(1, -1, 1, 1) if model.directly_add_no_mem_embed else 0
        self.encoder, self.decoder = (_made(m, dtype, compiled) for m in (model.image_encoder, model.sam_mask_decoder))
        self.fine = model.sam_mask_decoder.conv_s0, model.sam_mask_decoder.conv_s1

    def encode(self, image: Tensor) -> list[Tensor]:
        """Feature maps, finest first; the last with the embedding of an empty memory."""
        *fine, last = self.encoder(image.to(self.dtype))["backbone_fpn"]
        return [*(conv(x) for conv, x in zip(self.fine, fine, strict=True)), last + self.no_memory]

    def decode(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        """A box is two points, as SAM 2 has it."""
        labels = torch.tensor([_BOX_LABELS], dtype=torch.int32).expand(len(boxes), 2)
        sparse, dense = self.prompts(points=(boxes.reshape(-1, 2, 2), labels), boxes=None, masks=None)
        fine = [tensor.to(self.dtype) for tensor in features[:-1]]
        given = (tensor.to(self.dtype) for tensor in (features[-1], self.prompts.get_dense_pe(), sparse, dense))
        return self.decoder(*given, False, True, fine)[0].float()


class GraphSam:
    """The two graphs of a SAM in a runtime.

    Args:
        model: of the same architecture, which says how large the mask input is.
        folder: with ``image_encoder`` and ``mask_decoder``, each ``.onnx`` or OpenVINO's ``.xml``.
        precision: of what OpenVINO computes in floating point, ``f32`` or ``bf16``.
    """

    def __init__(self, model: nn.Module, folder: Path, runtime: str, threads: int, precision: str = "f32"):
        self.encoder, self.decoder = (
            open_graph(next(folder.glob(f"{part}.[ox][nm]*")), runtime, threads, precision)
            for part in ("image_encoder", "mask_decoder")
        )
        self.mask_size = self._prompts(model).mask_input_size

    def encode(self, image: Tensor) -> Any:
        """(1, C, h, w)."""
        return self.encoder({"image": image.numpy()})[0]

    def decode(self, features: Any, boxes: Tensor) -> Tensor:
        """Of the single-mask token."""
        return torch.from_numpy(self.decoder(self.inputs(features, boxes))[0][:, :1])

    def inputs(self, features: Any, boxes: Tensor) -> dict[str, np.ndarray]:
        """What the decoder's graph takes for boxes (N, 4)."""
        return prompt_inputs(features, self.mask_size, boxes=boxes.numpy())

    @staticmethod
    def _prompts(model: nn.Module) -> nn.Module:
        return model.prompt_encoder


class GraphSam2(GraphSam):
    """Image encoder and mask decoder of a SAM 2, on single images."""

    def __init__(self, model: nn.Module, folder: Path, runtime: str, threads: int, precision: str = "f32"):
        super().__init__(model, folder, runtime, threads, precision)
        self.no_memory = model.no_mem_embed.detach().reshape(1, -1, 1, 1).numpy()

    def encode(self, image: Tensor) -> list[np.ndarray]:
        """Embeddings with that of an empty memory, then the two features of higher resolution."""
        embeddings, *fine = self.encoder({"image": image.numpy()})
        return [embeddings + self.no_memory, *fine]

    def inputs(self, features: list[np.ndarray], boxes: Tensor) -> dict[str, np.ndarray]:
        """A box is two points, as SAM 2 has it."""
        points, labels = boxes.numpy().reshape(-1, 2, 2), np.tile(np.array(_BOX_LABELS, np.float32), (len(boxes), 1))
        prompts = prompt_inputs(features[0], self.mask_size, points, labels)
        return {**prompts, "features_4": features[1], "features_8": features[2]}

    @staticmethod
    def _prompts(model: nn.Module) -> nn.Module:
        return model.sam_prompt_encoder


def _made(module: nn.Module, dtype: torch.dtype, compiled: bool) -> Callable[..., Any]:
    if dtype != torch.float32:  # integers stay as they are
        module = module.to(dtype)
    return torch.compile(module) if compiled else module
