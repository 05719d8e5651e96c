"""A random LLaVA and a random CLIP of a few thousand parameters, as ordinary checkpoints on disk."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from foveate.modeling.compatibility import TRANSFORMERS_5


#: ≥ 5.0 dropped the suffix; in 4.57 the class without it is another, which works on numpy.
QwenImageProcessor = getattr(transformers, f"Qwen2VLImageProcessor{'' if TRANSFORMERS_5 else 'Fast'}")

IMAGE_SIDE, PATCH_SIDE = 42, 14
IMAGE_TOKEN_ID = 4
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
WORDS = ["USER", "ASSISTANT", ":", "what", "colour", "is", "it", "red", ",", "\n"]
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIDE,
    "patch_size": PATCH_SIDE,
    "projection_dim": 32,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message.role == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_llava(
    folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, text_class: type = LlamaConfig, **text
) -> Path:
    """A LLaVA-1.5 of 9 patches an image, with processor and generation config, in one safetensors file; its language
    model can be of another class, with more settings."""
    torch.manual_seed(seed)
    tokenizer, parts = _language_parts(text_class, **text)
    config = LlavaConfig(**parts, image_seq_length=(IMAGE_SIDE // PATCH_SIDE) ** 2)
    LlavaForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    _publish_names(folder)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    )
    LlavaProcessor(image_processor, tokenizer, **_PROCESSOR_ARGUMENTS).save_pretrained(folder)
    _make_tokenizer_neutral(folder)
    return folder


def write_llava_next(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A LLaVA-NeXT whose images have two to four tiles of 9 patches and the overview."""
    torch.manual_seed(seed)
    tokenizer, parts = _language_parts()
    pinpoints = [[IMAGE_SIDE, 2 * IMAGE_SIDE], [2 * IMAGE_SIDE, IMAGE_SIDE], [2 * IMAGE_SIDE, 2 * IMAGE_SIDE]]
    config = LlavaNextConfig(**parts, image_grid_pinpoints=pinpoints)
    LlavaNextForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    _publish_names(folder)
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": IMAGE_SIDE},
        crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        image_grid_pinpoints=pinpoints,
    )
    LlavaNextProcessor(image_processor, tokenizer, **_PROCESSOR_ARGUMENTS).save_pretrained(folder)
    _make_tokenizer_neutral(folder)
    return folder


def write_qwen3_vl(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A Qwen3-VL with tied embeddings and DeepStack, whose images have 4 to 9 visual tokens."""
    torch.manual_seed(seed)
    _write_qwen_tokenizer(folder)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    text = {
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": PATCH_SIDE,
        "spatial_merge_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    ids = {
        f"{name}_token_id": QWEN_SPECIAL.index(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids, tie_word_embeddings=True)
    Qwen3VLForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    pixels = {"shortest_edge": 4 * (2 * PATCH_SIDE) ** 2, "longest_edge": 9 * (2 * PATCH_SIDE) ** 2}
    parts = {"size": pixels, "patch_size": PATCH_SIDE, "merge_size": 2, "temporal_patch_size": 2}
    template = CHAT_TEMPLATE.replace("<image>", QWEN_IMAGE)
    Qwen3VLProcessor(
        QwenImageProcessor(**parts), tokenizer, Qwen3VLVideoProcessor(**parts), chat_template=template
    ).save_pretrained(folder)
    _write_qwen_tokenizer(folder)  # as it was: what a version writes others can't all read
    return folder


_PROCESSOR_ARGUMENTS = {
    "patch_size": PATCH_SIDE,
    "vision_feature_select_strategy": "default",
    "chat_template": CHAT_TEMPLATE,
    "num_additional_image_tokens": 1,
}


def _language_parts(text_class: type = LlamaConfig, **more) -> tuple[PreTrainedTokenizerFast, dict]:
    """A tokenizer, and the arguments of a LLaVA config that goes with it."""
    tokenizer = _tokenizer(WORDS, ["<image>"])
    text = text_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    return tokenizer, {
        "vision_config": CLIPVisionConfig(**VISION),
        "text_config": text,
        "image_token_index": IMAGE_TOKEN_ID,
    }


def write_clip(folder: Path, seed: int = 1, **vision) -> Path:
    """A CLIP whose vision tower has the shape of `write_llava`'s, with a tokenizer for questions."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(["what", "colour", "is", "it"], [], max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=CLIPVisionConfig(**{**VISION, **vision}).to_dict(), projection_dim=32
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _make_tokenizer_neutral(folder)
    return folder


def split_in_shards(folder: Path) -> Path:
    """Puts the weights of a single-file checkpoint into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{index:05d}-of-00002.safetensors" for index in (1, 2)]
    keys = sorted(tensors)
    weight_map = {key: names[position * 2 // len(keys)] for position, key in enumerate(keys)}
    for name in names:
        part = {key: tensors[key] for key in keys if weight_map[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _publish_names(folder: Path) -> None:
    """Transformers 5 writes the published names for models that it loaded from such, not for one built here."""
    path = folder / "model.safetensors"
    tower, published = "vision_tower.", "vision_tower.vision_model."
    tensors = {
        published + key.removeprefix(tower) if key.startswith(tower) and not key.startswith(published) else key: tensor
        for key, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _make_tokenizer_neutral(folder: Path) -> None:
    """What Transformers 5 writes of a tokenizer 4.57 can't read; the form of 4.57 all versions can."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config))


def _write_qwen_tokenizer(folder: Path) -> None:
    """Byte-level BPE in files that the Qwen2 tokenizer of every version reads; the image's token is the fifth."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(QWEN_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + " ".join(WORDS)] * 100, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "unk_token": None,
        "additional_special_tokens": list(QWEN_SPECIAL),
        "padding_side": "left",
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _tokenizer(words: list[str], special: list[str], max_length: int = 2048) -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *special, *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special,
        model_max_length=max_length,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
