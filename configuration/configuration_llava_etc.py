"""Configuration of LLaVA-1.5 with ETC."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig

from foveate.configuration.compression import CompressionConfigMixin
from foveate.configuration.etc import ETCSettings


class LlavaETCConfig(CompressionConfigMixin, LlavaConfig):
    """`LlavaConfig` with the settings of the compression.

    Args:
        compression: the fields of [`ETCSettings`].
    """

    model_type = "llava_etc"
    settings_class = ETCSettings

    def __init__(self, compression: ETCSettings | dict[str, Any] | None = None, **kwargs):
        self.compression = self.settings_class.from_dict(compression)
        kwargs["auto_map"] = self.remote_code_map()
        super().__init__(**kwargs)
        self.compression = self.compression.fitted_to(self)
