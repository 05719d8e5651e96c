"""The `compression` block of a config: what every method's settings share.

A method's settings are a dataclass whose field names are the keys of the block in `config.json`. Unknown keys and wrong
values raise a `ValueError` that names the field and the way out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from transformers import CLIPTextConfig

from foveate.configuration.tested_versions import warn_if_untested


warn_if_untested()

Settings = TypeVar("Settings", bound="CompressionSettings")


@dataclass
class CompressionSettings:
    """Settings that all methods have.

    Args:
        num_visual_tokens: tokens that an image is compressed to; what `None` means is the method's to say.
    """

    method: ClassVar[str]

    #: Fields that are the shape of weights, which a loaded model can't change.
    shape_fields: ClassVar[tuple[str, ...]] = ()

    num_visual_tokens: int | None = None

    def __post_init__(self):
        require_positive_int("num_visual_tokens", self.num_visual_tokens, optional=True)

    @classmethod
    def from_dict(cls: type[Settings], block: dict[str, Any] | Settings | None) -> Settings:
        """Reads the block of a config. Raises `ValueError` for another method's block or an unknown setting."""
        if isinstance(block, cls):
            return block
        block = dict(block or {})
        method = block.pop("method", cls.method)
        if method != cls.method:
            raise ValueError(
                f"This checkpoint's compression method is '{method}', not '{cls.method}': load it with the Auto "
                "classes, which choose the right model."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(block) - set(known))
        if unknown:
            raise ValueError(
                f"Unknown compression setting '{unknown[0]}' for the method '{cls.method}'; it has: {', '.join(known)}."
            )
        return cls(**block)

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, **dataclasses.asdict(self)}

    @classmethod
    def merge(cls, before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """The block of a config with changes to it."""
        return {**before, **changes}

    @classmethod
    def budget_of_ratio(cls, keep_ratio: float, config: Any) -> dict[str, Any]:
        """The settings that keep this share of an image's tokens, in (0, 1]."""
        return {"num_visual_tokens": max(1, round(keep_ratio * config.num_patches))}

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, given: Collection[str]) -> dict[str, Any]:
        """The settings that follow from the language model's tokenizer, but for those that the user has given."""
        return {}

    def count_tokens(self, length: int) -> int:
        """Tokens of an image that has `length` of them without compression, where that is known beforehand."""
        return length if self.num_visual_tokens is None else self.num_visual_tokens

    def count_placeholders(self, length: int) -> int:
        """Columns that such an image takes in a prompt."""
        return self.count_tokens(length)

    def fitted_to(self: Settings, config: Any) -> Settings:
        """These settings with what is `None` filled in where the model's config says it. Raises `ValueError` for what
        the model can't do."""
        if self.num_visual_tokens is not None and self.num_visual_tokens > config.num_patches:
            raise ValueError(
                f"num_visual_tokens is {self.num_visual_tokens}, but an image has only {config.num_patches} patches: "
                f"choose at most {config.num_patches}."
            )
        return self


def require_positive_int(name: str, value: Any, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1{' or null' if optional else ''}, not {value!r}.")


def require_ratio(name: str, value: Any, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(
            f"{name} must be a number above 0 and at most 1{' or null' if optional else ''}, not {value!r}."
        )


def require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}.")


def require_one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(repr(c) for c in choices)}, not {value!r}.")


class CompressionConfigMixin:
    """What the config of every compressed model shares; mixed into a Transformers config class.

    The class names follow from the config's: `LlavaRecoverableConfig` goes with `LlavaRecoverableModel`,
    `LlavaRecoverableForConditionalGeneration` and `LlavaRecoverableProcessor`, in the modules of the same ending.
    """

    settings_class: ClassVar[type[CompressionSettings]]
    compression: CompressionSettings

    @classmethod
    def remote_code_map(cls) -> dict[str, str]:
        """The `auto_map` of a checkpoint: which class of the bundled code serves which Auto class."""
        stem, module = cls.__name__.removesuffix("Config"), cls.model_type  # type: ignore[attr-defined]
        generation = f"modeling_{module}.{stem}ForConditionalGeneration"
        return {
            "AutoConfig": f"configuration_{module}.{cls.__name__}",
            "AutoProcessor": f"processing_{module}.{stem}Processor",
            "AutoModel": f"modeling_{module}.{stem}Model",
            "AutoModelForImageTextToText": generation,
            "AutoModelForVision2Seq": generation,
        }

    @property
    def num_patches(self) -> int | None:
        """Patches of one image, which is also the number of visual tokens without compression; `None` where each image
        has its own."""
        vision = self.vision_config  # type: ignore[attr-defined]
        if not hasattr(vision, "image_size"):
            return None
        return (vision.image_size // vision.patch_size) ** 2

    def change_compression(self, keep_ratio: float | None = None, **changes) -> CompressionSettings:
        """Changes settings of the compression.

        Args:
            keep_ratio: in (0, 1], sets the budget to this share of an image's tokens.
            changes: fields of the settings.

        Raises:
            ValueError: an unknown setting or a value out of range; nothing is changed then.
        """
        if keep_ratio is not None:
            require_ratio("keep_ratio", keep_ratio)
            changes = {**self.settings_class.budget_of_ratio(keep_ratio, self), **changes}
        before = self.compression.to_dict()
        for name in self.settings_class.shape_fields:
            if changes.get(name, before[name]) != before[name]:
                raise ValueError(
                    f"{name} is {before[name]} in this model's weights: for {changes[name]!r} convert the base again."
                )
        settings = self.settings_class.from_dict(type(self.compression).merge(before, changes))
        self.compression = settings.fitted_to(self)
        return self.compression

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()  # type: ignore[misc]
        if isinstance(output.get("compression"), CompressionSettings):
            output["compression"] = output["compression"].to_dict()
        return output


class QuestionGuidedConfigMixin(CompressionConfigMixin):
    """A config whose model reads the question with a CLIP text tower, and compresses what one vision layer gives.

    Its class calls `_set_method_fields` before the Transformers class's `__init__`, which may already read them, and
    `_check_method_fields` after it.
    """

    question_config: CLIPTextConfig

    def _set_method_fields(self, question_config: Any, compression: Any) -> None:
        if not isinstance(question_config, CLIPTextConfig):
            question_config = CLIPTextConfig(**(question_config or {}))
        self.question_config = question_config
        self.compression = self.settings_class.from_dict(compression)

    def _check_method_fields(self) -> None:
        layer, strategy = self.vision_feature_layer, self.vision_feature_select_strategy  # type: ignore[attr-defined]
        if not isinstance(layer, int) or strategy != "default":
            raise ValueError(
                f"The method '{self.settings_class.method}' needs one vision_feature_layer and "
                f"vision_feature_select_strategy 'default' (patches without the class token), not {layer!r} and "
                f"{strategy!r}."
            )
        self.compression = self.compression.fitted_to(self)
