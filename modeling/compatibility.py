"""Everything that depends on the version of Transformers, and nothing else.

Supported are 4.57.6 and 5.16 up to the newest. Each piece says which versions it is for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from inspect import signature as signature_of
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import torch
import transformers
from torch import nn
from transformers import Cache, PreTrainedModel, modeling_outputs
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.import_utils import is_mamba_ssm_available


try:  # ≥ 5.0: checkpoint keys are renamed by a table, which custom classes have to join
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import WeightRenaming
except ImportError:  # 4.57: by the class attribute `_checkpoint_conversion_mapping`
    register_checkpoint_conversion_mapping = None  # type: ignore[assignment]

#: 4.57 has a class of its own, ≥ 5.0 dropped it.
AutoModelForVision2Seq = getattr(transformers, "AutoModelForVision2Seq", transformers.AutoModelForImageTextToText)

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

#: The name of the KV cache in the arguments and outputs of models: ≥ 5.24 renamed `past_key_values`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

_Method = TypeVar("_Method", bound=Callable[..., Any])

if TYPE_CHECKING:

    class MixedIn:
        """For a type checker: a mixin has whatever the Transformers class has that it is mixed into."""

        config_class: Any

        def __getattr__(self, name: str) -> Any: ...

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any: ...

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None: ...

        @classmethod
        def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any: ...

        def _init_weights(self, module: Any) -> None: ...

        def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any: ...

else:
    MixedIn = object


def takes_cache(method: _Method) -> _Method:
    """Decorates a method with an argument `cache`: it goes by the installed version's name, and from 5.24 on by the
    old name as well, with the warning that Transformers' own methods give."""
    if CACHE == "cache":
        return deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")(method)

    @functools.wraps(method)
    def renamed(*args, **kwargs):
        if CACHE in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE)
        return method(*args, **kwargs)

    signature = signature_of(method)  # `generate` and PEFT look there for the arguments that they pass
    parameters = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed  # type: ignore[return-value]


def cache_argument(cache: Cache | None) -> dict[str, Cache | None]:
    """The KV cache as a keyword argument of a model or of `generate`."""
    return {CACHE: cache}


def cache_of(output: Any) -> Cache | None:
    """The KV cache in the output of a model or of `generate`."""
    return getattr(output, CACHE)


def fields_with_cache(output: Any, cache: Cache | None) -> dict[str, Any]:
    """The fields of a model's output, with another KV cache."""
    return {**output, CACHE: cache}


#: Output classes of multimodal models. Before 5.24 each backbone has its own, and LLaVA's have every field.
if TYPE_CHECKING:
    from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast as StockCausalLMOutput
    from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast as StockModelOutput
else:
    StockModelOutput = getattr(modeling_outputs, "MultimodalBaseModelOutputWithPast", LlavaModelOutputWithPast)
    StockCausalLMOutput = getattr(modeling_outputs, "MultimodalCausalLMOutputWithPast", LlavaCausalLMOutputWithPast)


def image_fields(sequences: Sequence[torch.Tensor] | None) -> dict[str, Any]:
    """The visual tokens of images, (tokens, width) each, as fields of an output: ≥ 5.24 has them as
    `image_outputs.pooler_output`, before they are one tensor, `image_hidden_states`."""
    if sequences is None:
        return {}
    if "image_outputs" in StockModelOutput.__dataclass_fields__:
        return {"image_outputs": BaseModelOutputWithPooling(pooler_output=list(sequences))}  # type: ignore[arg-type]
    return {"image_hidden_states": torch.cat(list(sequences))}


def missing_image_fields(output: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """The visual tokens of all images as a field of a stock output, where it has none for them: 4.57's Qwen3-VL."""
    known = type(output).__dataclass_fields__
    return {} if "image_outputs" in known or "image_hidden_states" in known else {"image_hidden_states": tokens}


def visual_tokens_of(output: Any) -> torch.Tensor:
    """The visual tokens in the output of a model, compressed or stock: (tokens of all images, width)."""
    if "image_outputs" in output:
        return torch.cat(list(output.image_outputs.pooler_output))
    return output.image_hidden_states


def register_key_mapping(
    model_class: Any, generation_class: Any, own_keys: tuple[str, ...], names_vision_model: bool
) -> None:
    """Lets a custom class read and write the published names of its base model's weights.

    The base's weights are on disk as the hub has them (`language_model.model.…`, say), the method's own (`own_keys`:
    first parts of their names) beside them at top level.

    Args:
        names_vision_model: whether published names have `vision_model.` in those of the vision tower, which the stock
            table leaves to the order of events.
    """
    if register_checkpoint_conversion_mapping is None:  # 4.57
        generation_class._checkpoint_conversion_mapping = {
            **generation_class._checkpoint_conversion_mapping,
            **{f"^{key}": f"model.{key}" for key in own_keys},
        }
        return
    stock_config = next(c for c in generation_class.config_class.__mro__ if c.__module__.startswith("transformers."))
    renamings = get_checkpoint_conversion_mapping(stock_config.model_type) or []
    if names_vision_model:
        renamings = [renaming for renaming in renamings if renaming.source_patterns != ["^vision_tower"]]
        renamings += [WeightRenaming(r"^vision_tower\.vision_model", "model.vision_tower")]
    renamings += [WeightRenaming(source_patterns=f"^{key}", target_patterns=f"model.{key}") for key in own_keys]
    register_checkpoint_conversion_mapping(generation_class.config_class.model_type, renamings, overwrite=True)
    for custom in (model_class, generation_class):
        stock = next(c for c in custom.__mro__ if c.__module__.startswith("transformers.models."))
        of_class = get_checkpoint_conversion_mapping(stock.__name__)
        if of_class is not None:
            register_checkpoint_conversion_mapping(custom.__name__, of_class, overwrite=True)


class PositionsByModelMixin(MixedIn):
    """Mixed into a model that generates, before the Transformers class: if `lays_out_positions`, its `forward` makes
    position ids, and `generate` prepares none but those that it was given. ≥ 5.19 prepares them beforehand, 4.57 with
    every step."""

    @property
    def lays_out_positions(self) -> bool:
        raise NotImplementedError

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        if self.lays_out_positions:
            return None
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if self.lays_out_positions and kwargs.get("position_ids") is None:
            inputs.pop("position_ids", None)
        return inputs


class AsksForPlaceholdersMixin:
    """Mixed in right before a Transformers processor: an image's placeholders are what `replace_image_token` writes.
    ≥ 5.0 asks it by itself; 4.57 counts in a way of its own, so it gets prompts that have them, and no images."""

    def __call__(self, images=None, text=None, **kwargs):
        if TRANSFORMERS_5 or not images:
            return super().__call__(images=images, text=text, **kwargs)
        options = {**kwargs.pop("images_kwargs", {})}  # the caller's own stays as it is
        options |= {name: kwargs.pop(name) for name in _IMAGE_OPTIONS if name in kwargs}
        pixels = self.image_processor(images=images, **options)
        written = iter([self.replace_image_token(pixels, index) for index in range(len(images))])
        pieces = [prompt.split(self.image_token) for prompt in text]
        prompts = [first + "".join(next(written) + piece for piece in rest) for first, *rest in pieces]
        found = super().__call__(text=prompts, **kwargs)
        found.update(pixels)
        groups = (kwargs, kwargs.get("text_kwargs") or {}, kwargs.get("common_kwargs") or {})
        return found.convert_to_tensors(next((g["return_tensors"] for g in groups if "return_tensors" in g), None))


def image_options(processor: Any, **kwargs: Any) -> dict[str, Any]:
    """What a processor's call with these arguments gives its image processor. Before 5.23 the method that knows has to
    be told the class of the arguments."""
    merge = processor._merge_kwargs
    first = (processor.valid_processor_kwargs,) if "ModelProcessorKwargs" in signature_of(merge).parameters else ()
    return merge(*first, tokenizer_init_kwargs=processor.tokenizer.init_kwargs, **kwargs)["images_kwargs"]


_IMAGE_OPTIONS = ("do_resize", "max_pixels", "min_pixels", "size")  # those of `images_kwargs` that may stand outside it


def clip_embeddings(vision_tower: Any, *images: Any) -> torch.Tensor:
    """Input of the first layer of a `CLIPVisionModel`, (images, patches + 1, width), of what its embeddings take."""
    tower = getattr(vision_tower, "vision_model", vision_tower)  # 4.57 keeps it one level down
    return tower.pre_layrnorm(tower.embeddings(*images))


def clip_layers(vision_tower: Any) -> nn.ModuleList:
    """Encoder layers of a `CLIPVisionModel`."""
    return getattr(vision_tower, "vision_model", vision_tower).encoder.layers


def replace_clip_embeddings(vision_tower: Any, make: Callable[[Any], nn.Module]) -> None:
    """Gives a `CLIPVisionModel` other embeddings, with parameters of the same names."""
    tower = getattr(vision_tower, "vision_model", vision_tower)  # 4.57 keeps it one level down
    tower.embeddings = make(tower.embeddings.config)


def padding_mask(vision_tower: Any, present: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What tells the kernel of a `CLIPVisionModel` which tokens, (images, tokens) bool, are not padding: FlashAttention
    takes them as they are, the others what is added to the scores. One row for all queries, which broadcasts."""
    if "flash" in vision_tower.config._attn_implementation:
        return present
    mask = torch.zeros(present.shape, dtype=dtype, device=present.device)
    return mask.masked_fill(~present, torch.finfo(dtype).min)[:, None, None]


def run_clip_layer(layer: Any, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """One encoder layer of CLIP on (batch, tokens, width), all tokens attending to all that `padding_mask` leaves."""
    if TRANSFORMERS_5:
        return layer(hidden_states, mask)
    return layer(hidden_states, mask, None)[0]  # 4.57: also a causal mask; a tuple comes back


def run_attention(
    attention: Any,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel that a `CLIPAttention` is set to, on (batch, heads, tokens, head width), all queries attending to all
    keys that `padding_mask` leaves; (batch, queries, width). In 4.57 `ALL_ATTENTION_FUNCTIONS` doesn't know the eager
    one."""
    implementation = attention.config._attn_implementation
    kernel = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    mixed, _ = kernel(
        attention, queries, keys, values, mask, scaling=attention.scale, dropout=0.0, is_causal=attention.is_causal
    )
    return mixed.flatten(2)


def image_sequences(features: Any) -> list[torch.Tensor]:
    """The visual tokens of each image, (tokens, width), in what `get_image_features` returned: a list or a tuple in
    4.57, with what DeepStack adds beside it in a tuple; in ≥ 5.0 `pooler_output` of an output, which may be a tensor
    where all have one length."""
    if hasattr(features, "pooler_output"):
        features = features.pooler_output
    elif _has_deepstack_beside(features):
        features = features[0]
    return list(features)


def are_stacked(features: Any) -> bool:
    """Whether `get_image_features` returned the visual tokens of its images in one tensor, which its `forward` needs
    then."""
    return torch.is_tensor(getattr(features, "pooler_output", None))


def deepstack_layers(features: Any) -> list[torch.Tensor]:
    """What DeepStack adds in each of the first layers, (tokens of all images, width), in the same; none where the model
    has no such thing. ≥ 5.0 has `deepstack_features`, where a layer may be split by images, and may come with its
    number."""
    if _has_deepstack_beside(features):
        return list(features[1])
    layers = getattr(features, "deepstack_features", None) or []
    return [_of_layer(layer) for layer in layers]


def _has_deepstack_beside(features: Any) -> bool:
    return isinstance(features, tuple) and bool(features) and not torch.is_tensor(features[0])


def _of_layer(layer: Any) -> torch.Tensor:
    if torch.is_tensor(layer):
        return layer
    if isinstance(layer[0], int):
        layer = layer[1]
    return layer if torch.is_tensor(layer) else torch.cat(list(layer))


def image_features_output(
    sequences: list[torch.Tensor],
    deepstack: Sequence[torch.Tensor] = (),
    stock_class: Any = None,
    stock: Any = None,
    stacked: bool = False,
    output_class: Callable[[Any], Any] = lambda known: known,
    **more: Any,
) -> Any:
    """The other way round: what `get_image_features` returns of these visual tokens.

    Args:
        sequences: the visual tokens of each image.
        deepstack: for each of the first layers what is added there, (tokens of all images, width).
        stock_class: of the model, where there is something added.
        stock: what it returned, whose form the result has, where it returned something.
        stacked: whether the model has the visual tokens of its images in one tensor.
        output_class: in ≥ 5.0, makes the result's class of the stock one's; it has the fields `more`.
    """
    if not TRANSFORMERS_5:
        return (sequences, list(deepstack)) if deepstack else sequences
    if stacked:
        sequences = torch.stack(sequences)  # type: ignore[assignment]
    fields: dict[str, Any] = {"pooler_output": sequences, **more}
    known = BaseModelOutputWithPooling if stock is None else type(stock)
    if deepstack:
        lengths = [len(tokens) for tokens in sequences]
        if stock is not None:
            layers = stock.deepstack_features
        else:
            known = _deepstack_output(stock_class)
            # Whose `forward` takes such an output splits these by images as well.
            layers = [() if takes_encoded_images(stock_class) else deepstack[0]] * len(deepstack)
        fields["deepstack_features"] = [_like_layer(layer, new, lengths) for layer, new in zip(layers, deepstack)]
    return output_class(known)(**{**(stock or {}), **fields})


def _deepstack_output(stock_class: Any) -> Any:
    """The class of a model's output of images that DeepStack adds something of."""
    return next(c for c in output_classes(stock_class) if "deepstack_features" in c.__dataclass_fields__)


def _like_layer(before: Any, layer: torch.Tensor, lengths: list[int]) -> Any:
    if torch.is_tensor(before):
        return layer
    if before and isinstance(before[0], int):
        return (before[0], _like_layer(before[1], layer, lengths))
    return layer.split(lengths)


def take_image_features(features: Any, chosen: list[int], per_image: Sequence[str]) -> Any:
    """What `get_image_features` returned in ≥ 5.0, of some of its images.

    Args:
        per_image: its fields with an entry an image, beside the tokens.
    """
    fields = {name: [features[name][index] for index in chosen] for name in per_image if name in features}
    sequences = image_sequences(features)
    lengths = [len(tokens) for tokens in sequences]
    layers = [layer.split(lengths) for layer in deepstack_layers(features)]
    taken = [torch.cat([layer[index] for index in chosen]) for layer in layers]
    tokens = [sequences[index] for index in chosen]
    stock = type(features)(**{**features, **fields})
    return image_features_output(tokens, taken, stock=stock, stacked=are_stacked(features))


def output_classes(stock_class: Any) -> list[Any]:
    """The classes of outputs that a stock class says it returns."""
    functions = (stock_class.forward, getattr(stock_class, "get_image_features", stock_class.forward))
    said = [signature_of(function).return_annotation for function in functions]
    found = [part for annotation in said for part in (annotation, *get_args(annotation))]
    return [part for part in found if isinstance(part, type) and issubclass(part, ModelOutput)]


def takes_encoded_images(stock_class: Any) -> bool:
    """Whether a stock `forward` takes what `get_image_features` returned in place of pixels: most since 5.19."""
    return "mm_encoder_outputs" in signature_of(stock_class.forward).parameters


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.22, where each model has it in its `forward`

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """(batch, length, width) at the last columns (0: all of them), or at the columns of the given indices."""
        return hidden_states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


#: The name of gradient checkpointing in methods of models and in `TrainingArguments`: newer 5.x call it another.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


def checkpoints_activations(model: Any) -> bool:
    """Whether gradient checkpointing is on."""
    return getattr(model, f"is_{CHECKPOINTING}")


def remove_from_cache(cache: Cache, count: int) -> None:
    """Removes the last `count` entries of every layer of a cache."""
    cache.crop(-count)  # a negative number means "remove" in 4.57 and ≥ 5.0 alike


def fused_selective_scan() -> Callable[..., torch.Tensor] | None:
    """The kernel of `mamba_ssm`, where it is installed, as Transformers' Mamba calls it; it takes x and Δ (batch,
    channels, positions), A, and B and C (batch, states, positions). ≥ 5.0 gives it another name."""
    if not is_mamba_ssm_available():
        return None
    from transformers.models.mamba import modeling_mamba

    name = "mamba_selective_scan" if TRANSFORMERS_5 else "selective_scan_fn"
    return getattr(modeling_mamba, name)


def cache_positions(past: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the language model has to be told of the cache. 4.57 else counts the keys that are not zero, of which a
    static cache with padding has too few; ≥ 5.0 keeps count itself and takes no such argument."""
    return {} if TRANSFORMERS_5 else {"cache_position": torch.arange(past, past + length, device=device)}


def without_cache_positions(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments without what 4.57's `generate` says of the caller's columns: a model whose language model runs
    on others counts for itself."""
    return {name: value for name, value in arguments.items() if name != "cache_position"}


def count_queries(query: int | torch.Tensor) -> int:
    """Of what `Cache.get_mask_sizes` is asked with: their number, in 4.57 their positions."""
    return query if isinstance(query, int) else len(query)


def write_to_cache(
    cache: Cache, keys: torch.Tensor, values: torch.Tensor, layer: int, past: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Appends entries, (batch, heads, new, head width), to a layer that holds `past` of them; returns what the layer
    gives to attend to. In 4.57 a static cache has to be told where they go."""
    positions = cache_positions(past, keys.shape[2], keys.device)
    return cache.update(keys, values, layer, *([positions] if positions else []))


def length_after_crop(length: int, argument: int) -> int:
    """What `Cache.crop(argument)` leaves of `length` entries: a negative number says how many to remove; 0 or more is
    how many to keep in 4.57, while ≥ 5.0 knows only 0, for none to remove."""
    if argument < 0 or TRANSFORMERS_5:
        return max(0, length - abs(argument))
    return min(length, argument)


def iterate_cache_tensors(cache: Cache) -> Iterator[torch.Tensor]:
    """The key and value tensors that a cache holds, layer by layer."""
    for layer in cast(list[Any], cache.layers):
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                yield tensor
