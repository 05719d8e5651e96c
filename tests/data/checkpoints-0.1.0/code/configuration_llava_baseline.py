"""Configuration of LLaVA-1.5 with a training-free baseline (random, sample, spatial)."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig

from .settings_baseline import BaselineSettings
from .settings_sequence import SequenceConfigMixin


class LlavaBaselineConfig(SequenceConfigMixin, LlavaConfig):
    """`LlavaConfig` with the settings of the compression.

    Args:
        compression: the fields of [`BaselineSettings`].
    """

    model_type = "llava_baseline"
    settings_class = BaselineSettings

    def __init__(self, compression: BaselineSettings | dict[str, Any] | None = None, **kwargs):
        self.compression = self.settings_class.from_dict(compression)
        kwargs["auto_map"] = self.remote_code_map()
        super().__init__(**kwargs)
        self._check_method_fields()


# Written by foveate's bundle. Transformers 4.57 copies, from a local folder, only the files that this one itself names;
# these are the ones that they import in turn.
if False:
    from .compression_settings import *
