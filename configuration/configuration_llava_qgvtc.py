"""Configuration of LLaVA-1.5 with QG-VTC."""

from __future__ import annotations

from typing import Any

from transformers import CLIPTextConfig, LlavaConfig

from foveate.configuration.compression import QuestionGuidedConfigMixin
from foveate.configuration.qgvtc import QGVTCSettings


class LlavaQGVTCConfig(QuestionGuidedConfigMixin, LlavaConfig):
    """`LlavaConfig` with the question's text encoder and the settings of the compression.

    Args:
        question_config: configuration of the CLIP text tower that reads the question.
        compression: the fields of [`QGVTCSettings`].
    """

    model_type = "llava_qgvtc"
    settings_class = QGVTCSettings
    sub_configs = {**LlavaConfig.sub_configs, "question_config": CLIPTextConfig}

    def __init__(
        self,
        question_config: CLIPTextConfig | dict[str, Any] | None = None,
        compression: QGVTCSettings | dict[str, Any] | None = None,
        **kwargs,
    ):
        self._set_method_fields(question_config, compression)
        kwargs["auto_map"] = self.remote_code_map()
        super().__init__(**kwargs)
        self._check_method_fields()
