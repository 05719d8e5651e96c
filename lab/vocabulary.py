"""The lab's tokenizers, trained on its own sentences: Llama-style byte-level BPE for the language model, CLIP-style BPE
for the text tower, Qwen's for its model; and the chat templates."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast  # type: ignore[attr-defined]

from foveate.lab.scenes import COLOURS, NAMES, PLACES, QUESTION_TYPES, ask_questions, sample_scene


VOCABULARY_SIZE = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' or 'video' in part %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2's own.
_QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _sentences(captions: bool) -> list[str]:
    sentences = []
    for index in range(4000):
        scene = sample_scene("train", index)
        for qa in ask_questions(scene, QUESTION_TYPES):
            sentences += [qa.question, f"USER: {qa.question} ASSISTANT: {qa.answer}"]
        if captions:
            sentences.append(scene.caption)
    return sentences


def make_language_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the language model, with `<image>` and the chat template."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(captions=False), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def make_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the Qwen model: Qwen's, with the lab's merges instead of the web's.

    An answer follows a line break, so its first word has no space before it: a token beside the question's.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    asked = [f"user\n{question}" for question in _sentences(captions=False)[::2]]
    answers = [f"assistant\n{answer}" for answer in (*NAMES, *COLOURS, *PLACES, "word", "yes", "no")]
    tokenizer.train_from_iterator(asked + answers * 1000, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=list(QWEN_SPECIAL_TOKENS),
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
        chat_template=QWEN_CHAT_TEMPLATE,
    )


def make_clip_tokenizer() -> CLIPTokenizerFast:
    """Tokenizer of the text tower: an ordinary CLIP tokenizer, with the lab's merges instead of the web's.

    As in CLIP the vocabulary is every byte, every byte that ends a word, the merges, then start and end of text.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, end_of_word_suffix="</w>", show_progress=False)
    # CLIP splits at spaces, punctuation and digits before it merges; trained on such pieces it can do the same.
    pieces = (
        piece
        for sentence in _sentences(captions=True)
        for piece in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", sentence.lower())
    )
    tokenizer.train_from_iterator(pieces, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizerFast(vocab=vocabulary, merges=merges, model_max_length=77)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves a tokenizer so that Transformers 4.57 reads it as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if config["tokenizer_class"] == "TokenizersBackend":  # the name that 5.x gives to PreTrainedTokenizerFast
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["extra_special_tokens"] = {"image_token": "<image>"} if "image_token" in config else {}
    path.write_text(json.dumps(config, indent=2) + "\n")
