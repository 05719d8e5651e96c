"""Stock vision-language models of a few hundred thousand parameters, one of each type of Transformers' Auto table, and
images as their `get_image_features` takes them, made by hand: no processor, no file, no download.

The types that `tiny_families` builds with their processors are left out. Configurations have to be dataclasses, as in
Transformers 5; types that a release lacks are missing in its `CONFIG_MAPPING`."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText


Tensors = dict[str, Any]
Overrides = Mapping[str, Any]
Grids = tuple[tuple[int, ...], ...]

IMAGE_TOKEN_ID, VISION_START_TOKEN_ID = 200, 203
#: Ids that mean nothing to any of the models; those above are codes of image tokenizers and special tokens.
WORDS = range(10, 100)
IMAGE_SIDE, PATCH_SIDE = 84, 14
#: (frames, rows, columns) of patches of the two images, where their size is free.
GRIDS: Grids = ((1, 6, 8), (1, 4, 6))
#: Of every configuration and its parts: each takes the fields that it declares.
USUAL: Overrides = {
    # language model
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # mixtures of experts
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    # latent attention and its indexers
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # linear attention
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # sliding attention beside full attention
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    # vision encoder and projector
    "depth": 2,
    "num_heads": 4,
    "image_size": IMAGE_SIDE,
    "patch_size": PATCH_SIDE,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "out_hidden_size": 64,
    "projection_dim": 64,
    "projector_hidden_size": 64,
    "text_hidden_size": 64,
    "adapter_in_dim": 64,
    "adapter_out_dim": 64,
    # special tokens
    "image_token_id": IMAGE_TOKEN_ID,
    "image_token_index": IMAGE_TOKEN_ID,
    "image_patch_id": IMAGE_TOKEN_ID,
    "video_token_id": 201,
    "video_token_index": 201,
    "audio_token_id": 202,
    "audio_token_index": 202,
    "vision_start_token_id": VISION_START_TOKEN_ID,
    "vision_end_token_id": 204,
    "image_start_token_id": VISION_START_TOKEN_ID,
    "image_end_token_id": 204,
    "video_start_token_id": 205,
    "video_end_token_id": 206,
}


def _no_extra_inputs(config: Any, input_ids: torch.Tensor) -> Tensors:
    return {}


def _image_types(*names: str) -> Callable[[Any, torch.Tensor], Tensors]:
    """Tensors with 1 at the placeholders of images, under each of the names that a type gives them."""
    return lambda config, input_ids: {name: (input_ids == config.image_token_id).int() for name in names}


@dataclass(frozen=True)
class TinyModel:
    """One stock model type, tiny, and images as its `get_image_features` takes them.

    Attributes:
        model_type: the type's name in the Auto table.
        make_config: gives a new stock configuration.
        make_images: from the configuration and a generator, keyword arguments of `get_image_features` for two images,
            of different size where the type allows that.
        extra_inputs: from the configuration and `input_ids`, what `forward` takes beside them, the attention mask and
            the images.
        start_token_id: what has to stand before the placeholders of an image for the model to see an image there when
            it lays out positions; None where nothing has to.
    """

    model_type: str
    make_config: Callable[[], Any]
    make_images: Callable[[Any, torch.Generator], Tensors]
    extra_inputs: Callable[[Any, torch.Tensor], Tensors] = _no_extra_inputs
    start_token_id: int | None = None


def make_stock_model(entry: TinyModel, seed: int = 0) -> Any:
    """The stock model in evaluation mode and float32, with random weights that depend on nothing but the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(entry.make_config(), dtype=torch.float32)
    _redraw(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep the size of what they multiply: with those that many types start from, all logits are nearly
    equal. Norms and biases only move a little, since whether they start at 0 or at 1 depends on the type."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            # Small: where input and output embeddings are tied, every word would otherwise predict itself.
            parameter.copy_(noise / 5)
        elif parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(parameter.shape[1:].numel()))
        else:
            parameter.add_(noise / 20)


def _tiny(config_class: Any, preset: Overrides, overrides: Overrides) -> Any:
    """A configuration of `preset`, the usual tiny fields and `overrides`, each stronger than the one before.

    What is overridden in a part stands under the part's name; None leaves the part out, and a `model_type` in it takes
    another class than the type's own choice."""
    declared = {field.name for field in dataclasses.fields(config_class)}
    usual = {name: value for name, value in USUAL.items() if name in declared}
    # A copy, as configurations write into the dicts that they are given.
    values = {**preset, **usual, **copy.deepcopy(dict(overrides))}
    choices = getattr(config_class, "sub_configs_defaults", {})
    for name, part_class in config_class.sub_configs.items():
        part = values.pop(name, {})
        if part is not None:
            part_preset = dict(getattr(choices.get(name), "init_kwargs", None) or {})
            part_preset.pop("model_type", None)
            model_type = part.pop("model_type", getattr(choices.get(name), "model_type", None))
            part = _tiny(CONFIG_MAPPING[model_type] if model_type else part_class, part_preset, part)
        values[name] = part
    return config_class(**values)


def _make_config(model_type: str, overrides: Overrides) -> Any:
    return _tiny(CONFIG_MAPPING[model_type], {}, overrides)


def _square(config: Any, generator: torch.Generator, *, side: int = IMAGE_SIDE) -> Tensors:
    """Two images of one size."""
    return {"pixel_values": torch.randn(2, 3, side, side, generator=generator)}


def _square_twice(config: Any, generator: torch.Generator, *, high_side: int) -> Tensors:
    """Two images of one size, in low and in high resolution."""
    high = _square(config, generator, side=high_side)["pixel_values"]
    return _square(config, generator) | {"high_res_pixel_values": high}


def _square_with_questions(config: Any, generator: torch.Generator) -> Tensors:
    """Two images of one size, each with the question that its queries read."""
    return _square(config, generator) | {"qformer_input_ids": torch.tensor(WORDS[:6]).view(2, 3)}


def _square_as_tiles(config: Any, generator: torch.Generator) -> Tensors:
    """Two images of one size, each the only tile of its row of the batch."""
    return {"pixel_values": _square(config, generator)["pixel_values"][:, None]}


def _patches(
    config: Any,
    generator: torch.Generator,
    *,
    patch: tuple[int, ...] = (3 * PATCH_SIDE**2,),
    grids: Grids = GRIDS,
    name: str = "image_grid_thw",
) -> Tensors:
    """The patches of both images one after another, and the grid of each."""
    grid = torch.tensor(grids)
    return {"pixel_values": torch.randn(int(grid.prod(-1).sum()), *patch, generator=generator), name: grid}


def _strip(config: Any, generator: torch.Generator, *, grids: Grids = GRIDS) -> Tensors:
    """The patches of both images side by side in one long image, and the grid of each."""
    sizes = torch.tensor(grids, dtype=torch.int32)[:, 1:]
    width = int(sizes.prod(-1).sum()) * PATCH_SIDE
    return {"pixel_values": torch.randn(1, 3, PATCH_SIDE, width, generator=generator), "target_sizes": sizes}


def _placed_patches(config: Any, generator: torch.Generator) -> Tensors:
    """The patches of each image, padded to the larger number, and the row and column of each."""
    places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for _, rows, columns in GRIDS]
    padded = nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)
    width = 3 * config.vision_config.model_patch_size**2
    return {"pixel_values": torch.randn(*padded.shape[:2], width, generator=generator), "image_position_ids": padded}


def _padded(config: Any, generator: torch.Generator, *, unit: int = PATCH_SIDE) -> Tensors:
    """Two images, padded to the larger, and the size of each; `unit` is the side of a patch."""
    sizes = torch.tensor(GRIDS)[:, 1:] * unit
    pixels = torch.zeros(2, 3, *sizes.amax(0).tolist())
    for image, (height, width) in zip(pixels, sizes.tolist()):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": sizes}


def _padded_in_row(config: Any, generator: torch.Generator) -> Tensors:
    """Two images in one row of the batch, padded to the larger, and a mask of their pixels."""
    images = _padded(config, generator)
    pixels, sizes = images["pixel_values"], images["image_sizes"].tolist()
    mask = torch.zeros(1, 2, *pixels.shape[-2:], dtype=torch.bool)
    for image, (height, width) in zip(mask[0], sizes):
        image[:height, :width] = True
    return {"pixel_values": pixels[None], "pixel_attention_mask": mask}


def _tiles_in_row(config: Any, generator: torch.Generator) -> Tensors:
    """Three tiles of two images in one row of the batch, and a mask of the tiles."""
    pixels = torch.randn(1, 3, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, 3, dtype=torch.bool)}


def _tiles(config: Any, generator: torch.Generator) -> Tensors:
    """An overview and the tiles of each image, two side by side and two by two, padded; and the images' sizes."""
    side = config.vision_config.image_size
    pixels = torch.randn(2, 5, 3, side, side, generator=generator)
    pixels[0, 3:] = 0
    sizes = torch.tensor([[side, 2 * side], [2 * side, 2 * side]])
    return {"pixel_values": pixels, "image_sizes": sizes}


def _views(
    config: Any, generator: torch.Generator, *, side: int, local_side: int, local: int, with_grids: bool = False
) -> Tensors:
    """An overview of each image, and views of parts of the first."""
    images: Tensors = _square(config, generator, side=side)
    images["pixel_values_local"] = torch.randn(local, 3, local_side, local_side, generator=generator)
    images["num_local_patches"] = [local, 0]
    return images | ({"patches_grid": [[local, 1], [0, 0]]} if with_grids else {})


def _pooled_crops(config: Any, generator: torch.Generator) -> Tensors:
    """An overview of each image, two crops side by side of the first and one of the second; the 2 × 2 patches that
    each visual token pools, and how many of these there are in height and width of overview and crops."""
    side, half = IMAGE_SIDE // PATCH_SIDE, IMAGE_SIDE // PATCH_SIDE // 2
    overview, left, right, other_overview, crop = torch.arange(5 * side**2).view(5, side, side)
    pooled = [
        view.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
        for view in (overview, torch.cat([left, right], dim=1), other_overview, crop)
    ]
    return {
        "pixel_values": torch.randn(5, side**2, 3 * PATCH_SIDE**2, generator=generator),
        "image_token_pooling": torch.cat(pooled),
        "image_grids": torch.tensor([[half, half, half, 2 * half], [half, half, half, half]]),
    }


def _m_rope(*sections: int) -> dict[str, Any]:
    """Positions of three axes; each section is an axis's share of half the width that a head rotates."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


_entries: list[TinyModel] = []


def _add(
    model_type: str,
    make_images: Callable[[Any, torch.Generator], Tensors],
    extra_inputs: Callable[[Any, torch.Tensor], Tensors] = _no_extra_inputs,
    start_token_id: int | None = None,
    **overrides: Any,
) -> None:
    """One entry; `overrides` are what the usual fields of the type's configuration don't say."""
    make_config = partial(_make_config, model_type, overrides)
    _entries.append(TinyModel(model_type, make_config, make_images, extra_inputs, start_token_id))


_two_frames = partial(_patches, patch=(2 * 3 * PATCH_SIDE**2,))
_mm_types = _image_types("mm_token_type_ids")
M_ROPE, HALF_M_ROPE = _m_rope(4, 2, 2), _m_rope(2, 1, 1)
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
#: Latent attention gives each head keys and values of its own.
LATENT = {"num_key_value_heads": 4}
SIGLIP = {"vision_use_head": False}
SAM = {
    "image_size": 96,
    "patch_size": 8,
    "output_channels": 32,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 96,
}
SAM_AND_MORE = SAM | {"downsample_channels": [32, 64]}
#: Image tokenizers that give one of 96 codes for 4 × 4 pixels; each code is a word of the vocabulary.
TOKENIZER = {"base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1}
FIRST_CODE, CODE_COUNT = 100, 96
INKLING = {"layer_types": ["hybrid_sliding", "hybrid"], "rel_extent": 64, "unpadded_vocab_size": 256}
_inkling_patches = partial(_patches, patch=(2 * PATCH_SIDE, 2 * PATCH_SIDE, 3), grids=((1, 3, 4), (1, 2, 3)))
INKLING_VISION = {"projection_hidden_dim": 64, "posemb_grid_size": 8}
QWEN_AUDIO = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": 64,
    "downsample_hidden_size": 8,
}

# One image size.
_add("aya_vision", _square)
_add(
    "chameleon",
    partial(_square, side=24),
    vocabulary_map={f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": FIRST_CODE + i for i in range(CODE_COUNT)}
    | {"<image>": IMAGE_TOKEN_ID},
    vq_config=TOKENIZER | {"num_embeddings": CODE_COUNT, "embed_dim": 16, "latent_channels": 16, "resolution": 24},
)
_add("deepseek_vl", _square, vision_config=SIGLIP)
_add(
    "deepseek_vl_hybrid",
    partial(_square_twice, high_side=SAM["image_size"]),
    vision_config=SIGLIP,
    high_res_vision_config=SAM,
)
# The vision encoders of fast_vlm and perception_lm are timm's, which isn't installed: encoders with outputs of the same
# form stand in.
_add(
    "fast_vlm",
    _square,
    vision_config={
        "model_type": "resnet",
        "embedding_size": 32,
        "hidden_sizes": [32, 64],
        "hidden_size": 64,
        "depths": [1, 1],
        "downsample_in_first_stage": True,
        "layer_type": "basic",
    },
)
_add(
    "perception_lm",
    _square_as_tiles,
    vision_config={"model_type": "clip_vision_model", "model_args": {"embed_dim": 64}},
)
_add("got_ocr2", partial(_square, side=SAM["image_size"]), vision_config=SAM)
_add("pp_chart2table", partial(_square, side=SAM["image_size"]), vision_config=SAM)
_add(
    "instructblip",
    _square_with_questions,
    num_query_tokens=8,
    text_config={"ffn_dim": 64, "word_embed_proj_dim": 64},
    qformer_config={"encoder_hidden_size": 64},
)
_add("janus", _square, vq_config=TOKENIZER | {"num_embeddings": CODE_COUNT, "image_token_embed_dim": 64})
_add(
    "qianfan_ocr",
    _square,
    vision_config={"image_size": [IMAGE_SIDE, IMAGE_SIDE], "patch_size": [PATCH_SIDE, PATCH_SIDE]},
)
_add("shieldgemma2", _square, _image_types("token_type_ids"), mm_tokens_per_image=9, vision_config=SIGLIP)
_add("video_llava", _square)

# Patches and grids.
_add(
    "cohere_compass",
    _two_frames,
    _mm_types,
    text_config={"rope_parameters": {"full_attention": M_ROPE["rope_parameters"]}},
    vision_config=DEEPSTACK,
)
_add("cosmos3_edge", _patches, _mm_types, text_config=M_ROPE)
_add("cosmos3_omni", _two_frames, _mm_types, text_config=M_ROPE, vision_config=DEEPSTACK)
_add(
    "dots3_note",
    _patches,
    text_config=LATENT | {"shared_experts_intermediate_size": 32},
    vision_config={"mlp_layer_types": ["dense", "sparse"]},
    audio_config={"num_hidden_layers": 1, "adapter_input_size": 64, "downsample_hidden_size": 8},
)
_add(
    "ernie4_5_vl_moe",
    _patches,
    _image_types("mm_token_type_ids", "moe_mm_token_type_ids"),
    text_config=_m_rope(3, 3, 2) | {"moe_intermediate_size": [32, 32], "moe_num_experts": 4, "moe_k": 2},
)
_add("exaone4_5", _two_frames)
_add(
    "gemma4_unified",
    _placed_patches,
    _mm_types,
    vision_config={"patch_size": 4, "mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64},
    audio_config={"audio_embed_dim": 32},
)
_add("glm4v_moe", _two_frames, _mm_types, text_config=HALF_M_ROPE)
_add(
    "glm5_next",
    _two_frames,
    text_config=LATENT | LINEAR_AND_FULL | {"qk_rope_head_dim": 0, "linear_head_dim": 16, "linear_num_heads": 4},
    vision_config={"projection_intermediate_size": 64},
)
_add("glm_ocr", _two_frames, _mm_types, text_config=M_ROPE)
_add("glmga", _two_frames, _mm_types, text_config=M_ROPE)
_add("hunyuan_vl", _patches, _mm_types, text_config=M_ROPE, vision_config={"max_image_size": 112})
_add("hy_v4_vl", _patches, _mm_types, text_config=HALF_M_ROPE, vision_config={"max_image_size": 112})
_add("hyperclovax_vision_v2", _two_frames)
_add("inkling2", _inkling_patches, text_config=INKLING, vision_config=INKLING_VISION)
_add(
    "inkling2_loop",
    _inkling_patches,
    text_config=INKLING
    | {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    vision_config=INKLING_VISION,
)
_add(
    "kimi_k25",
    partial(_patches, patch=(3, PATCH_SIDE, PATCH_SIDE)),
    projection_hidden_size=64,
    text_config=LATENT,
)
_add("lfm3_vl", _two_frames, text_config={"layer_types": ["conv", "full_attention"]})
_add(
    "minicpm_ocr", _strip, insert_layer_id=0, text_config=M_ROPE | LINEAR_AND_FULL, vision_config={"insert_layer_id": 0}
)
_add(
    "minicpmv4_7",
    partial(_strip, grids=((1, 8, 12), (1, 8, 8))),
    _mm_types,
    insert_layer_id=0,
    text_config=M_ROPE | LINEAR_AND_FULL,
    vision_config={"insert_layer_id": 0},
)
_add(
    "minimax_m3_vl",
    _two_frames,
    text_config={"rotary_dim": 8, "dense_intermediate_size": 64, "shared_intermediate_size": 32},
)
_add(
    "molmo2",
    _pooled_crops,
    _mm_types,
    vision_config={
        "image_size": [IMAGE_SIDE, IMAGE_SIDE],
        "num_position_embeddings": (IMAGE_SIDE // PATCH_SIDE) ** 2,
    },
    adapter_config={"vision_feature_layer": [1, 0]},
)
_add("muse_glimmer", _two_frames, out_hidden_size=256)
_add(
    "muse_spark",
    _two_frames,
    out_hidden_size=256,
    text_config={"moe_hidden_size": 64},
    audio_config={"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
)
_add(
    "nemotron_h_omni",
    partial(_patches, grids=tuple(grid[1:] for grid in GRIDS), name="image_grid_hw"),
    vision_hidden_size=64,
    text_config={
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
    },
    vision_config={"max_img_size": 112},
    audio_config=None,
)
_add(
    "qwen2_5_omni_thinker",
    _two_frames,
    start_token_id=VISION_START_TOKEN_ID,
    vision_start_token_id=VISION_START_TOKEN_ID,
    text_config=M_ROPE,
    audio_config=QWEN_AUDIO,
)
_add(
    "qwen3_omni_moe_thinker",
    _two_frames,
    start_token_id=VISION_START_TOKEN_ID,
    vision_start_token_id=VISION_START_TOKEN_ID,
    text_config=M_ROPE,
    vision_config=DEEPSTACK,
    audio_config=QWEN_AUDIO,
)
_add(
    "qwen4_exp",
    _two_frames,
    _mm_types,
    text_config=M_ROPE
    | LINEAR_AND_FULL
    | {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
)

# Padded images and their sizes.
_add(
    "apertus1p5",
    partial(_padded, unit=4),
    image_token_offset=FIRST_CODE,
    audio_token_offset=FIRST_CODE + CODE_COUNT,
    vision_config=TOKENIZER
    | {"codebook_size": CODE_COUNT, "embed_dim": 16, "latent_channels": 16, "resolution": 32, "attn_resolutions": [8]},
    audio_config={"codebook_size": 32, "num_filters": 4, "hidden_size": 32, "codebook_dim": 32},
)
_add(
    "emu3",
    partial(_padded, unit=4),
    vocabulary_map={f"<|visual token {i:06}|>": FIRST_CODE + i for i in range(CODE_COUNT)}
    | {"<image>": IMAGE_TOKEN_ID, "<|extra_200|>": FIRST_CODE + CODE_COUNT},
    vq_config=TOKENIZER
    | {
        "codebook_size": CODE_COUNT,
        "num_attention_heads": 1,
        "embed_dim": 16,
        "latent_channels": 16,
        "temporal_downsample_factor": 1,
    },
)
_add("lighton_ocr", _padded, vision_config={"head_dim": 16})
_add("mistral_large4", _padded, text_config=LATENT)

# Tiles and views.
_add(
    "deepseek_ocr2",
    partial(_views, side=SAM["image_size"], local_side=SAM["image_size"], local=1),
    text_config={"mlp_layer_types": ["dense", "sparse"]},
    vision_config={"sam_config": SAM_AND_MORE},
)
# Its own multipliers leave an image of a few tokens hardly any weight.
_add(
    "granite_docling",
    _tiles_in_row,
    text_config={
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    vision_config=DEEPSTACK | {"scale_factor": 2},
)
_add(
    "idefics2",
    _padded_in_row,
    perceiver_config={
        "resampler_n_latents": 8,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 16,
    },
)
_add(
    "llava_next_video",
    _tiles,
    image_grid_pinpoints=[[42, 84], [84, 42], [84, 84]],
    vision_config={"image_size": 42},
)
_add("step3p7", partial(_views, side=168, local_side=112, local=2), text_config={"sliding_window": 64})
_add(
    "unlimited_ocr",
    partial(_views, side=SAM["image_size"], local_side=64, local=2, with_grids=True),
    vision_config={"sam_config": SAM_AND_MORE},
)

MODELS: dict[str, TinyModel] = {entry.model_type: entry for entry in sorted(_entries, key=lambda e: e.model_type)}

UNFIT: dict[str, str] = {
    "blip": "Its text decoder attends to the image across, without placeholders, and the class that answers has no "
    "`get_image_features`.",
    "blip-2": "`get_image_features` gives states of the vision encoder that no `forward` puts at placeholders: it runs "
    "the query transformer itself.",
    "diffusion_gemma": "`get_image_features` belongs to an encoder inside the base model, and text isn't decoded token "
    "by token but denoised in blocks.",
    "evolla": "It reads proteins and has no images.",
    "florence2": "Encoder and decoder: visual tokens enter the encoder, and what is decoded has a sequence of its own.",
    "fuyu": "`get_image_features` leaves `pooler_output` empty and gives the visual tokens as `last_hidden_state`.",
    "gemma3n": "Its vision encoder exists only in timm, which isn't installed.",
    "git": "It puts visual tokens in front of the text, without placeholders, and has no `get_image_features`.",
    "granite4_vision": "`get_image_features` leaves `pooler_output` empty: every visual token is a set of features for "
    "different layers, in `deepstack_features`.",
    "idefics": "Its text layers attend to the image across, without placeholders, and it has no `get_image_features`.",
    "inkling_mm_model": "`get_image_features` gives every patch as an entry of one token and gets no grid, so which "
    "patches make up an image isn't known.",
    "instructblipvideo": "It reads only videos, and has no `get_image_features`.",
    "kosmos-2": "`forward` puts visual tokens where `image_embeds_position_mask` says, not at an id.",
    "kosmos-2.5": "`forward` puts visual tokens where `image_embeds_position_mask` says, not at an id.",
    "llama4": "`get_image_features` gives states of the vision encoder as `last_hidden_state`, and `forward` projects "
    "them afterwards.",
    "mistral4": "The class that the Auto table names is a language model and reads no images.",
    "mllama": "Its text layers attend to the image across, without placeholders, and it has no `get_image_features`.",
    "pi0": "It predicts actions of a robot and no text, and has no `get_image_features`.",
    "pix2struct": "Encoder and decoder: the text attends to the image across, without placeholders.",
    "pp_formulanet": "Encoder and decoder: the text attends to the image across, without placeholders.",
    "t5gemma2": "Encoder and decoder: visual tokens enter the encoder, and what is decoded has a sequence of its own.",
    "udop": "Encoder and decoder: patches are merged with the words of a page by their boxes, without placeholders.",
    "vision-encoder-decoder": "Encoder and decoder: the text attends to the image across, without placeholders.",
}
