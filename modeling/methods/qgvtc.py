"""QG-VTC (Li et al., "QG-VTC: Question-Guided Visual Token Compression in MLLMs for Efficient VQA",
https://arxiv.org/abs/2504.00654): the question's text encoder, its MLP, and the guided vision tower, whose algorithm is
in `qgvtc_algorithm.py`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPTextModelWithProjection

from foveate.configuration.qgvtc import QGVTCSettings
from foveate.modeling.compatibility import checkpoints_activations
from foveate.modeling.core.declarations import Method
from foveate.modeling.core.exact import ExactGenerationMixin, ExactModelMixin
from foveate.modeling.core.outputs import Images, VisualTokens
from foveate.modeling.layers.crops import Crops
from foveate.modeling.methods.qgvtc_algorithm import EncodedCrops, encode_crops


class QuestionProjector(nn.Module):
    """The MLP that takes the question into the vision tower's space, the only new trained module of the encoder."""

    def __init__(self, text_width: int, vision_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(text_width, vision_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(vision_width, vision_width)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, text width) → (B, vision width)."""
        return self.linear_2(self.act(self.linear_1(pooled)))


class QGVTCModelMixin(ExactModelMixin):
    """The vision tower of the stock model is read layer by layer, and guided."""

    role_names = ("discarded", "kept by the question", "kept by the class token", "end of a row")
    added_modules = ("question_encoder", "question_projector")
    guiding_inputs = ("question_input_ids", "question_attention_mask")

    def add_modules(self, config):
        # The whole CLIP text model, as checkpoints have it; its projection is not run.
        self.question_encoder = CLIPTextModelWithProjection._from_config(config.question_config)
        self.question_projector = QuestionProjector(
            config.question_config.hidden_size, config.vision_config.hidden_size
        )

    def compress_images(self, images: Images, trace: bool = False) -> VisualTokens:
        """Encodes images, each compressed by its question.

        Args:
            images: the backbone's inputs, and `question_input_ids` and `question_attention_mask`, (images, 77); a mask
                without a one says that there is no question, and the image's class token guides.
            trace: whether to say what the tokens are made of.
        """
        crops = self.cut_images(images)
        ids, mask = (images.get(name) for name in self.guiding_inputs)
        encoded = self._encode(crops, ids, mask, trace)
        compressed = self.join_crops(crops, encoded.features, encoded.positions)
        if trace:
            role = 1 if self.config.compression.guidance == "question" else 2
            compressed.provenance = self.join_provenance(
                crops, encoded.positions, encoded.weights, encoded.steps, role, self.role_names
            )
        return compressed

    def embed_question(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(images, 77) → (images, vision width): the question's class token."""
        if attention_mask is not None:  # the row of an empty question: attention over no token at all would be NaN
            attention_mask = attention_mask.clone()
            attention_mask[:, 0] = 1
        output = self.question_encoder.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return self.question_projector(output.pooler_output)

    def _encode(
        self, crops: Crops, question_input_ids: torch.Tensor | None, mask: torch.Tensor | None, trace: bool
    ) -> EncodedCrops:
        """Runs the guided vision tower."""
        config, text_class, has_question = self.config, None, None
        if config.compression.guidance == "question" and config.compression.num_visual_tokens < config.num_patches:
            if question_input_ids is None:
                raise ValueError(
                    "QG-VTC is guided by the question: pass `question_input_ids` and `question_attention_mask`, as the "
                    "processor returns them, or set guidance to 'cls'."
                )
            text_class = self.embed_question(question_input_ids, mask)
            has_question = None if mask is None else mask.any(-1)
            if crops.image is not None:
                text_class = text_class[crops.image]
                has_question = None if has_question is None else has_question[crops.image]
        return encode_crops(
            self.vision_tower,
            crops.pixel_values,
            config.compression,
            config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1),
            text_class,
            has_question,
            crops.selectable,
            trace,
            checkpoint_activations=self.training and checkpoints_activations(self),
        )


METHOD = Method(
    name="qg-vtc",
    stem="QGVTC",
    title="QG-VTC",
    paper="https://arxiv.org/abs/2504.00654",
    kind="encoder",
    mixin=QGVTCModelMixin,
    generation_mixin=ExactGenerationMixin,
    settings=QGVTCSettings,
    backbones=("llava", "llava_next"),
    needs_training=True,
    reads_question=True,
    summary=(
        "The question, read by CLIP's text tower, ranks the patches at chosen layers of the vision tower. The best "
        "stay in their order, and what the others hold is recycled into them by attention, so that later layers run "
        "on fewer and fewer patches. The number of visual tokens follows from the settings and the image's size alone."
    ),
    limits=("An image is compressed for one question: another question means encoding it again.",),
)
