"""What every compressed model shares, whatever its method and backbone."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from foveate.modeling.compatibility import StockCausalLMOutput, StockModelOutput
from foveate.modeling.core.loading import base_of, forget_base, hub_arguments, read_all_tensors, read_generation_config


@dataclass
class TokenProvenance:
    """What the visual tokens of one image are made of.

    Args:
        weights: (tokens, patches), non-negative: how much of each source patch every token holds.
        roles: (tokens,), why each token is there, as an index into `role_names`.
        role_names: the method's names for the roles.
        steps: for a method that compresses in several steps, the name of each and the patches whose tokens it kept.
        scores: for a method that asks several experts, the name of each and its score of every patch, (patches,).
    """

    weights: torch.Tensor
    roles: torch.Tensor
    role_names: tuple[str, ...]
    steps: tuple[tuple[str, torch.Tensor], ...] = ()
    scores: tuple[tuple[str, torch.Tensor], ...] = ()


@dataclass
class CompressedModelOutputWithPast(StockModelOutput):
    """Output of a compressed model without a language modeling head: the stock model's, and

    Args:
        compression: one [`TokenProvenance`] an image, when `output_compression=True`.

    Where the language model runs on fewer columns than the caller sees, `last_hidden_state` is in the caller's columns,
    zeros at placeholders that have no token, the cache is a [`LogicalCache`], and `hidden_states` and `attentions` are
    those of the language model, on the columns that it runs on.
    """

    compression: list[TokenProvenance] | None = None


@dataclass
class CompressedCausalLMOutputWithPast(StockCausalLMOutput):
    """Output of a compressed model with a language modeling head: the stock model's, with `compression` as in
    [`CompressedModelOutputWithPast`], and with logits in the caller's columns."""

    compression: list[TokenProvenance] | None = None


class CompressedModelMixin:
    """Mixed into every compressed model, before the Transformers class."""

    #: Writes the flat remote code beside a saved checkpoint. Set by the foveate package; a class that was itself loaded
    #: from such code leaves that to Transformers, which copies its files.
    code_writer: ClassVar[Callable[[type, str], None] | None] = None

    #: Parts that quantisation leaves as they are, by their names in a model without a head: what sees, and what
    #: compresses. They are a small share of the weights, and where little is kept, its choice should be the best.
    full_precision: ClassVar[tuple[str, ...]] = (
        "vision_tower",
        "visual",
        "compressor",
        "question_encoder",
        "question_projector",
        "visual_projection",
    )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, quantization_config=None, **kwargs):
        """As everywhere in Transformers. A quantisation that doesn't say which modules it leaves out leaves out
        `full_precision`, and the head; a checkpoint in the adapter layout finds its base."""
        name = pretrained_model_name_or_path
        if quantization_config is not None:
            names = [f"{start}{part}" for start in ("", "model.") for part in cls.full_precision]
            kwargs["quantization_config"] = _leaving_out(quantization_config, [*names, "lm_head"])
        base = None if name is None else base_of(name, config, kwargs)
        if base is None:
            return super().from_pretrained(name, *args, config=config, **kwargs)  # type: ignore[misc]
        if not isinstance(config, PretrainedConfig):
            config = cls.config_class.from_pretrained(config or name, **hub_arguments(kwargs))  # type: ignore[attr-defined]
        kwargs["state_dict"] = read_all_tensors(name, base, kwargs)
        found = super().from_pretrained(None, *args, config=config, **kwargs)  # type: ignore[misc]
        model = found[0] if isinstance(found, tuple) else found
        forget_base(model)
        if model.can_generate() and (generation_config := read_generation_config(name, kwargs)) is not None:
            model.generation_config = generation_config
        return found

    def save_pretrained(self, save_directory, *args, **kwargs):
        _unlink_shared_weights(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if self.code_writer is not None:
            type(self).code_writer(type(self), save_directory)

    def set_compression(self, processor: Any = None, keep_ratio: float | None = None, **changes) -> None:
        """Changes settings of the compression on this model, and on its processor, without converting again.

        Args:
            processor: the processor that goes with this model; it has to know as well where it counts tokens.
            keep_ratio: the share of an image's tokens to keep, in (0, 1]; sets the budget.
            changes: fields of the config's `compression` block, for instance `num_visual_tokens=64`.

        Raises:
            ValueError: an unknown setting or a value out of range; nothing is changed then.
        """
        settings = self.config.change_compression(keep_ratio, **changes)  # type: ignore[attr-defined]
        if processor is not None:
            processor.set_compression(settings)

    def set_trained_budget(self, num_visual_tokens: int, processor: Any = None) -> None:
        """Changes the budget that the model is about to be trained at: as `set_compression`, but weights whose shape
        says the budget follow it."""
        self.set_compression(processor, num_visual_tokens=num_visual_tokens)


def _leaving_out(quantization_config: Any, modules: list[str]) -> Any:
    """A quantisation config, or a dictionary of one, that leaves these modules out if it names none itself. Configs of
    bitsandbytes have a word of their own for that."""
    is_dict = isinstance(quantization_config, dict)
    known = quantization_config if is_dict else vars(quantization_config)
    of_bitsandbytes = any(name in known for name in ("llm_int8_skip_modules", "load_in_4bit", "load_in_8bit"))
    field = "llm_int8_skip_modules" if of_bitsandbytes else "modules_to_not_convert"
    if known.get(field) is not None or not (is_dict or field in known):
        return quantization_config
    changed = copy.deepcopy(quantization_config)
    if is_dict:
        changed[field] = modules
    else:
        setattr(changed, field, modules)
    return changed


def _unlink_shared_weights(folder: str | os.PathLike) -> None:
    """Takes weight files out of a folder that are hard links to other files, as `foveate convert --link` makes them:
    written over, they would change there too."""
    for path in Path(folder).glob("*.safetensors"):
        if path.stat().st_nlink > 1:
            path.unlink()


def keep_logits(values: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """(batch, length, width) at the last columns (0: all of them), or at the columns of the given indices."""
    return values[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else values[:, logits_to_keep]


def with_logits(
    output: CompressedModelOutputWithPast, loss: torch.Tensor | None, logits: torch.Tensor
) -> CompressedCausalLMOutputWithPast:
    """The output of a model with a head, of what the model without one returned."""
    shared = {name: value for name, value in output.items() if name != "last_hidden_state"}
    return CompressedCausalLMOutputWithPast(loss=loss, logits=logits, **shared)


class CompressedGenerationMixin(CompressedModelMixin):
    """Mixed into the model with a head, where its last hidden states are in the caller's columns."""

    def _with_head(
        self,
        output: CompressedModelOutputWithPast,
        labels: torch.LongTensor | None,
        logits_to_keep: int | torch.Tensor,
        return_dict: bool | None,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> CompressedCausalLMOutputWithPast | tuple:
        logits = self.lm_head(keep_logits(output.last_hidden_state, logits_to_keep))  # type: ignore[attr-defined]
        loss = None
        if labels is not None:
            loss = self.loss_function(  # type: ignore[attr-defined]
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,  # type: ignore[attr-defined]
                num_items_in_batch=num_items_in_batch,
            )
        causal = with_logits(output, loss, logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict  # type: ignore[attr-defined]
        return causal if return_dict else causal.to_tuple()
