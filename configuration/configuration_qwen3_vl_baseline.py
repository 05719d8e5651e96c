"""Configuration of Qwen3-VL with a training-free baseline (random, sample, spatial)."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3VLConfig

from foveate.configuration.baselines import BaselineSettings
from foveate.configuration.sequence import SequenceConfigMixin


class Qwen3VLBaselineConfig(SequenceConfigMixin, Qwen3VLConfig):
    """`Qwen3VLConfig` with the settings of the compression.

    Args:
        compression: the fields of [`BaselineSettings`].
    """

    model_type = "qwen3_vl_baseline"
    settings_class = BaselineSettings

    def __init__(self, compression: BaselineSettings | dict[str, Any] | None = None, **kwargs):
        self.compression = self.settings_class.from_dict(compression)
        kwargs["auto_map"] = self.remote_code_map()
        super().__init__(**kwargs)
        self._check_method_fields()
