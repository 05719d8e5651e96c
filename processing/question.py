"""What the processors of question-guided methods share: which question guides which image, and its tokens."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from foveate.processing.base import CompressionProcessorMixin


logger = logging.get_logger(__name__)

QUESTION_TOKENIZER_FOLDER = "question_tokenizer"


class QuestionProcessorMixin(CompressionProcessorMixin):
    """Mixed into a processor, before its backbone's.

    Which question guides an image is read from the prompt, by the rule of the method; `question=` says otherwise: one
    text for all, one a row, or a list a row with one text an image. The rule is in the settings' class:

    - `guiding_turn`: "own" is the user's turn that the image stands in, so that a later turn never changes how an
      earlier image is compressed. "last" is the user's last turn, for all images of a prompt; a cache keeps what guided
      it at first.
    - `requires_question`: whether an image without a question is an error. Where it is none, its attention mask is all
      zeros.
    """

    def _begin(self, kwargs):
        super()._begin(kwargs)
        self.question_tokenizer = kwargs.pop("question_tokenizer", None)
        self._markers_of = None  # a template, and what it was found to write

    def __call__(self, images=None, text=None, question=None, **kwargs):
        """
        Args:
            images: one image, a flat list over all rows, or a list a row (which may be empty).
            text: the prompt, or a list of prompts, with `<image>` where an image goes.
            question: overrides the question that is read from the prompt.

        Returns:
            What the stock processor returns, and for each image `question_input_ids` and `question_attention_mask`,
            (images, 77).

        Raises:
            ValueError: images and placeholders that differ in number, an image without a question, an image that is
                too narrow to be seen.
        """
        images, prompts, num_images = self._check_inputs(images, text)
        questions = self._questions(prompts, num_images, question)
        output = self._call_stock(images, prompts, **kwargs)
        if questions:
            tokens = self._tokenize_questions(questions, kwargs.get("return_tensors") or _return_tensors(kwargs))
            output.update({f"question_{name}": tokens[name] for name in ("input_ids", "attention_mask")})
        return output

    def _questions(self, prompts: list[str], num_images: list[int], question) -> list[str]:
        """One question an image, images row after row."""
        if question is None:
            return [found for row, prompt in enumerate(prompts) for found in self._questions_in(prompt, row)]
        per_row = [question] * len(prompts) if isinstance(question, str) else list(question)
        if len(per_row) != len(prompts):
            raise ValueError(f"`question` has {len(per_row)} entries for {len(prompts)} prompt(s): give one a prompt.")
        questions = []
        for row, (number, given) in enumerate(zip(num_images, per_row)):
            given = [given] * number if isinstance(given, str) else list(given or [])
            if len(given) != number:
                raise ValueError(f"`question` has {len(given)} entries for the {number} image(s) of prompt {row}.")
            questions += given
        return [self._checked(found) for found in questions]

    def _questions_in(self, prompt: str, row: int) -> list[str]:
        """The user's words that guide each image of a prompt."""
        user, assistant = self._turn_markers()
        places = [match.start() for match in re.finditer(re.escape(self.image_token), prompt)]
        if places and self.settings_class.guiding_turn == "last":
            last = prompt.rfind(user) if user else -1
            places = [max(places[-1], last)] * len(places)
        questions = []
        for place in places:
            start = prompt.rfind(user, 0, place + len(user)) if user else -1
            start = start + len(user) if start >= 0 else 0
            stop = prompt.find(assistant, max(start, place)) if assistant else -1
            stop = stop if stop >= 0 else len(prompt)
            after = place + len(self.image_token)
            if self.settings_class.guiding_turn == "last" and not user and prompt[after:stop].strip():  # a raw prompt
                start = after
            turn = prompt[start:stop].replace(self.image_token, " ")
            for special in self.tokenizer.all_special_tokens:
                turn = turn.replace(special, " ")
            questions.append(self._checked(" ".join(turn.split()), row))
        return questions

    def _checked(self, question: str, row: int | None = None) -> str:
        """A question that is a text. Raises `ValueError`, or says once, that there is none."""
        if isinstance(question, str) and question.strip():
            return question
        where = "" if row is None else f" of prompt {row}"
        if self.settings_class.requires_question or not isinstance(question, str):
            raise ValueError(
                f"An image{where} has no question beside it, and the question guides the compression: write the "
                "question in the same user turn as the image, or pass `question=`."
            )
        logger.warning_once(
            "An image has no question beside it: its compression is guided by the image's own class token."
        )
        return ""

    def _turn_markers(self) -> tuple[str, str]:
        """The texts before a user's and before an assistant's words in this chat template ("USER:", "ASSISTANT:").

        Found by rendering a conversation of known words; empty where there is no template.
        """
        template = self.chat_template or getattr(self.tokenizer, "chat_template", None)
        if not isinstance(template, str):
            return "", ""
        if self._markers_of is not None and self._markers_of[0] == template:
            return self._markers_of[1]
        words = ["first-question", "first-answer", "second-question"]
        conversation = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in zip(("user", "assistant", "user"), words)
        ]
        rendered = self.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        parts = []
        for word in words:
            before, _, rendered = rendered.partition(word)
            parts.append(before)
        user = common_start(parts[0][::-1], parts[2][::-1])[::-1].strip()
        assistant = common_start(parts[1], rendered).strip()
        self._markers_of = (template, (user, assistant))
        return user, assistant

    def _tokenize_questions(self, questions: list[str], return_tensors) -> dict[str, Any]:
        longest = self.question_tokenizer.model_max_length
        tokens = self.question_tokenizer(questions, padding="max_length", truncation=True, max_length=longest)
        for question, mask in zip(questions, tokens["attention_mask"]):
            if not question:
                mask[:] = [0] * len(mask)
        if any(len(question) > 3 * longest for question in questions):  # cheap first: few characters can't be too long
            lengths = [len(ids) for ids in self.question_tokenizer(questions)["input_ids"]]
            if max(lengths) > longest:
                logger.warning_once(
                    f"A question of {max(lengths)} tokens is longer than the text encoder's {longest}: the compression "
                    "is guided by its beginning; the language model reads all of it."
                )
        return tokens.convert_to_tensors(return_tensors)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "question_input_ids", "question_attention_mask"]

    # Saving and loading. A second tokenizer lies in a folder of its own: ≥ 5.0 does that by itself, 4.57 would write it
    # over the first one, so this class does it for every version.

    def save_pretrained(self, save_directory, *args, **kwargs):
        files = super().save_pretrained(save_directory, *args, **kwargs)
        self.question_tokenizer.save_pretrained(os.path.join(save_directory, QUESTION_TOKENIZER_FOLDER))
        return files

    @classmethod
    def _load_question_tokenizer(cls, name_or_path, kwargs: dict[str, Any]):
        subfolder = os.path.join(kwargs.get("subfolder") or "", QUESTION_TOKENIZER_FOLDER)
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
        return AutoTokenizer.from_pretrained(name_or_path, subfolder=subfolder, **hub)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor.question_tokenizer = cls._load_question_tokenizer(pretrained_model_name_or_path, kwargs)
        return processor


def _return_tensors(kwargs: dict[str, Any]):
    return (kwargs.get("text_kwargs") or kwargs.get("common_kwargs") or {}).get("return_tensors")


def common_start(first: str, second: str) -> str:
    """The beginning that two texts share."""
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))
