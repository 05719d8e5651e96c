"""Configuration of LLaVA-1.5 with MetaCompress."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig

from foveate.configuration.metacompress import MetaCompressSettings
from foveate.configuration.sequence import SequenceConfigMixin


class LlavaMetaCompressConfig(SequenceConfigMixin, LlavaConfig):
    """`LlavaConfig` with the settings of the compression.

    Args:
        compression: the fields of [`MetaCompressSettings`].
    """

    model_type = "llava_metacompress"
    settings_class = MetaCompressSettings

    def __init__(self, compression: MetaCompressSettings | dict[str, Any] | None = None, **kwargs):
        self.compression = self.settings_class.from_dict(compression)
        kwargs["auto_map"] = self.remote_code_map()
        super().__init__(**kwargs)
        self._check_method_fields()
