"""The `compression` block of a config: what every method's settings share.

A method's settings are a dataclass whose field names are the keys of the block in `config.json`. Unknown keys and wrong
values raise a `ValueError` that names the field and the way out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from transformers import CLIPTextConfig

from foveate.configuration.tested_versions import warn_if_untested


warn_if_untested()

Settings = TypeVar("Settings", bound="CompressionSettings")

#: Of the sides of an image that processors take: narrower ones have nothing left to see after resizing.
MAX_ASPECT_RATIO = 100

VIDEOS_ARE_NOT_TAKEN = "This model takes images, not videos yet: pass single frames as images."


@dataclass
class CompressionSettings:
    """Settings that all methods have.

    Args:
        num_visual_tokens: tokens that an image is compressed to; what `None` means is the method's to say.
    """

    method: ClassVar[str]

    #: Fields that are the shape of weights, which a loaded model can't change.
    shape_fields: ClassVar[tuple[str, ...]] = ()

    #: Of a method that a question guides, which one, and whether there has to be one: see `QuestionProcessorMixin`.
    guiding_turn: ClassVar[str] = "own"
    requires_question: ClassVar[bool] = True

    #: Whether an image can be compressed once, to be asked about often ([`CompressedImage`]).
    keeps_images: ClassVar[bool] = False

    num_visual_tokens: int | None = None

    def __post_init__(self):
        require_positive_int("num_visual_tokens", self.num_visual_tokens, optional=True)

    @classmethod
    def from_dict(cls: type[Settings], block: dict[str, Any] | Settings | None) -> Settings:
        """Reads the block of a config. Raises `ValueError` for another method's block or an unknown setting."""
        if isinstance(block, cls):
            return block
        block = dict(cast(dict[str, Any], block or {}))
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
    def settings_for_ratio(cls, keep_ratio: float, config: Any) -> dict[str, Any]:
        """The settings that keep this share of an image's tokens, in (0, 1]."""
        return {"num_visual_tokens": max(1, round(keep_ratio * config.num_patches))}

    @classmethod
    def settings_from_tokenizer(cls, tokenizer: Any, given: Collection[str]) -> dict[str, Any]:
        """The settings that follow from the language model's tokenizer, but for those that the user has given."""
        return {}

    @property
    def budget(self) -> tuple[int | None, float | None]:
        """What a processor has to know of them: `num_visual_tokens`, and `keep_ratio` where the method has it."""
        return self.num_visual_tokens, getattr(self, "keep_ratio", None)

    @classmethod
    def with_budget(cls: type[Settings], num_visual_tokens: int | None, keep_ratio: float | None) -> Settings:
        """The other way round: settings with that budget; without either, such that nothing is compressed."""
        return cls(num_visual_tokens=num_visual_tokens)

    def count_tokens(self, length: int) -> int:
        """Visual tokens that are left of `length`, in each crop of an image."""
        return length if self.num_visual_tokens is None else self.num_visual_tokens

    def count_placeholders(self, *lengths: int, num_separators: int = 0) -> int:
        """Columns that an image takes in a prompt.

        Args:
            lengths: visual tokens of each of its crops without compression (of the image, where it is not cut).
            num_separators: tokens that stand between them.
        """
        budget = self.num_visual_tokens
        return sum(length if budget is None else min(budget, length) for length in lengths) + num_separators

    def largest_budget(self, config: Any) -> int | None:
        """What `num_visual_tokens` can be at most; `None`: an image's size is its own, and another may have more."""
        return config.num_patches

    def resolve(self: Settings, config: Any) -> Settings:
        """These settings with what is `None` filled in where the model's config says it. Raises `ValueError` for what
        the model can't do."""
        largest = self.largest_budget(config)
        if self.num_visual_tokens is not None and largest is not None and self.num_visual_tokens > largest:
            raise ValueError(
                f"num_visual_tokens is {self.num_visual_tokens}, but an image (or a crop of it) has only {largest} "
                f"patches: choose at most {largest}."
            )
        return self


def require_patches_of_one_layer(method: str, config: Any) -> None:
    """Raises `ValueError` where a model's features are not the patches, without the class token, of one vision
    layer."""
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if not isinstance(layer, int) or strategy != "default":
        raise ValueError(
            f"The method '{method}' needs one vision_feature_layer and vision_feature_select_strategy 'default' "
            f"(patches without the class token), not {layer!r} and {strategy!r}."
        )


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


if TYPE_CHECKING:

    class MixedIn:
        """For a type checker: a mixin has whatever the config has that it is mixed into."""

        model_type: str
        sub_configs: dict[str, Any]

        def __getattr__(self, name: str) -> Any: ...

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def to_dict(self) -> dict[str, Any]: ...

else:
    MixedIn = object


class CompressionConfigMixin(MixedIn):
    """What the config of every compressed model shares; mixed into a Transformers config class.

    A config class of a method on a backbone says its `model_type` and its `settings_class`, and defines no method. Its
    name is the beginning of the others': `LlavaQGVTCConfig` goes with `LlavaQGVTCModel`,
    `LlavaQGVTCForConditionalGeneration` and `LlavaQGVTCProcessor`, in files that its `model_type` ends.

    Args:
        compression: the fields of `settings_class`.
        question_config: configuration of the CLIP text tower, of a method that reads the question.
    """

    settings_class: ClassVar[type[CompressionSettings]]
    compression: CompressionSettings

    #: Whether a CLIP text tower reads the question.
    reads_question: ClassVar[bool] = False

    #: Of a method that prepares images in its own way: its image processor, as "file.class" of the remote code.
    image_processor: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs):
        if "__init__" not in vars(cls):  # ≥ 5.4 writes one for a config class that has none, from the class's fields
            cls.__init__ = CompressionConfigMixin.__init__  # type: ignore[method-assign]
        if cls.reads_question:
            cls.sub_configs = {**cls.sub_configs, "question_config": CLIPTextConfig}
        super().__init_subclass__(**kwargs)

    def __init__(
        self,
        compression: CompressionSettings | dict[str, Any] | None = None,
        question_config: CLIPTextConfig | dict[str, Any] | None = None,
        **kwargs,
    ):
        self.compression = self.settings_class.from_dict(compression)
        if self.reads_question:  # before the base's `__init__`, which may read it
            if not isinstance(question_config, CLIPTextConfig):
                question_config = CLIPTextConfig(**(question_config or {}))
            self.question_config = question_config
        elif question_config is not None:
            raise ValueError(f"The method '{self.compression.method}' reads no question: leave question_config out.")
        kwargs["auto_map"] = self.remote_code_map()
        super().__init__(**kwargs)
        self.compression = self.compression.resolve(self)

    @classmethod
    def remote_code_map(cls) -> dict[str, str]:
        """The `auto_map` of a checkpoint: which class of the bundled code serves which Auto class."""
        stem, module = cls.__name__.removesuffix("Config"), cls.model_type
        generation = f"modeling_{module}.{stem}ForConditionalGeneration"
        references = {
            "AutoConfig": f"configuration_{module}.{cls.__name__}",
            "AutoProcessor": f"processing_{module}.{stem}Processor",
            "AutoModel": f"modeling_{module}.{stem}Model",
            "AutoModelForImageTextToText": generation,
            "AutoModelForVision2Seq": generation,
        }
        if cls.image_processor is not None:
            references["AutoImageProcessor"] = cls.image_processor
        return references

    @property
    def num_patches(self) -> int | None:
        """Patches of one image, which is also the number of visual tokens without compression; `None` where each image
        has its own."""
        vision = getattr(self, "vision_config", None)
        side, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
        if not isinstance(side, int) or not isinstance(patch, int) or self.image_processor is not None:
            return None
        return (side // patch) ** 2

    def change_compression(self, keep_ratio: float | None = None, **changes) -> CompressionSettings:
        """Changes settings of the compression.

        Args:
            keep_ratio: in (0, 1], sets the budget to this share of an image's tokens.
            changes: fields of the settings.

        Raises:
            ValueError: an unknown setting or a value out of range; nothing is changed then.
        """
        settings_class = type(self.compression)
        if keep_ratio is not None:
            require_ratio("keep_ratio", keep_ratio)
            changes = {**settings_class.settings_for_ratio(keep_ratio, self), **changes}
        before = self.compression.to_dict()
        for name in settings_class.shape_fields:
            if changes.get(name, before[name]) != before[name]:
                raise ValueError(
                    f"{name} is {before[name]} in this model's weights: for {changes[name]!r} convert the base again."
                )
        self.compression = settings_class.from_dict(settings_class.merge(before, changes)).resolve(self)
        return self.compression

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if isinstance(output.get("compression"), CompressionSettings):
            output["compression"] = output["compression"].to_dict()
        return output
