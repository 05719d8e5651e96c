"""What training reads, as examples of a dialogue about an image: files in LLaVA's JSON format, or what is plugged in.

A sample of a LLaVA file is an image and a dialogue about it. A question-guided method compresses an image for one
question, so every (question, answer) pair becomes an example of its own, with the image ("one question per image", the
paper's split); where no question guides, a dialogue stays whole. [`Collator`] makes batches of them, in which the
prompt is what generation sees, token for token.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from foveate.errors import FoveateError
from foveate.plugins import DATA_GROUP, find_plugin
from foveate.training.recipe import StageRecipe


IMAGE_TOKEN = "<image>"  # in LLaVA's files, whatever a model's own placeholder is
_IMAGES_CHECKED = 1000
_IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A question and its answer, and what is then asked of the same images.

    Args:
        name: where it comes from, for error messages.
        question, answer: texts, without placeholders.
        images: what it is about; empty for text alone.
        later: further questions and answers.
    """

    name: str
    question: str
    answer: str
    images: tuple[Image.Image, ...]
    later: tuple[tuple[str, str], ...] = ()


#: Stands in a batch that has no image, with nothing learned from it: so that what trains gets a gradient, of zeros, in
#: every batch, which processes that train together rely on.
_BLANK = Example("a blank image", "?", "-", (Image.new("RGB", (64, 64)),))


@dataclass(frozen=True, slots=True)
class _Pair:
    """A question, its answer and what follows as they stand in a file; `sample` is the sample's place in the file."""

    sample: int
    question: str
    answer: str
    images: tuple[str, ...]
    later: tuple[tuple[str, str], ...] = ()


class LlavaExamples(Dataset):
    """A JSON file in LLaVA's format, one example a (question, answer) pair or a whole dialogue.

    The file is a list of `{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, …]}`.
    The first human turn has an `<image>`, at its beginning or end. As LLaVA's own reader does, an answer that nobody
    asked for at the beginning and a question without an answer at the end are passed over.

    Args:
        path: the file.
        images: the folder that image paths begin in.
        keep_text_only: keep samples that have no image.
        skip_missing: leave samples out whose image is missing; else that is an error, for the first 1000 examples
            now, for later ones when they are read.
        dialogues: whether a dialogue stays whole.

    Raises:
        FoveateError: no such file or folder, no JSON, no list of samples, a sample without conversations or with
            speakers out of order, placeholders and images that differ in number, a missing image.
    """

    def __init__(
        self,
        path: Path,
        images: Path,
        keep_text_only: bool = False,
        skip_missing: bool = False,
        dialogues: bool = False,
    ):
        self.path, self.images = path, images
        self._left_out: Counter[str] = Counter()
        samples = _read_samples(path)
        self.num_samples = len(samples)
        self.pairs = [
            pair for index, sample in enumerate(samples) for pair in self._pairs(index, sample, keep_text_only)
        ]
        if dialogues:
            self.pairs = [_as_one(list(group)) for _, group in itertools.groupby(self.pairs, lambda pair: pair.sample)]
        self._check_images(skip_missing)
        if not self.pairs:
            raise FoveateError(f"{path} has no example to train on ({self.summary}).")

    @property
    def summary(self) -> str:
        left_out = ", ".join(f"{number} {what}" for what, number in self._left_out.items() if number)
        found = f"{len(self.pairs)} examples of {self.num_samples} samples in {self.path.name}"
        return f"{found}; left out: {left_out}" if left_out else found

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> Example:
        pair = self.pairs[position % len(self.pairs)]
        name = self._name(pair.sample)
        images = tuple(self._open(file, name) for file in pair.images)
        return Example(name, pair.question, pair.answer, images, pair.later)

    def leave_out_long(self, collator: Collator) -> None:
        """Leaves examples out whose prompt alone is too long for a sequence."""
        # A token is at least a byte, so most need not be tokenized to know that they are short enough.
        frame = collator.longest_frame()

        def fits(pair: _Pair) -> bool:
            if len(pair.question.encode()) + max(1, len(pair.images)) * frame < collator.max_length:
                return True
            images = tuple(self._open(file, self._name(pair.sample)) for file in pair.images)
            example = Example(self._name(pair.sample), pair.question, pair.answer, images)
            return collator.prompt_length(example) < collator.max_length

        self._keep(fits, f"examples with a prompt of {collator.max_length} tokens or more")
        if not self.pairs:
            raise FoveateError(f"No prompt in {self.path} fits into max_length={collator.max_length}: raise it.")

    def _keep(self, wanted: Any, reason: str) -> None:
        kept = [pair for pair in self.pairs if wanted(pair)]
        self._left_out[reason] += len(self.pairs) - len(kept)
        self.pairs = kept

    def _name(self, index: int) -> str:
        return f"{self.path}, sample {index}"

    def _pairs(self, index: int, sample: Any, keep_text_only: bool) -> Iterator[_Pair]:
        """The pairs of a sample."""
        turns = sample.get("conversations") if isinstance(sample, dict) else None
        if not isinstance(turns, list) or not turns:
            raise FoveateError(f"{self._name(index)} has no conversations: it is not in LLaVA's format.")
        if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
            raise FoveateError(f"{self._name(index)} has a turn without a text as its value.")
        images = self._image_names(index, sample, turns)
        if not images and not keep_text_only:
            self._left_out["samples without an image"] += 1
            return
        asking = itertools.dropwhile(lambda turn: turn.get("from") != "human", turns)
        for human, gpt in itertools.zip_longest(*[asking] * 2, fillvalue=None):
            if gpt is None:
                break
            if (human.get("from"), gpt.get("from")) != ("human", "gpt"):
                raise FoveateError(
                    f"{self._name(index)} has its speakers out of order: 'human' and 'gpt' have to take turns."
                )
            question, answer = (turn["value"].replace(IMAGE_TOKEN, "").strip() for turn in (human, gpt))
            if answer:
                yield _Pair(index, question, answer, images)
            else:
                self._left_out["examples with an empty answer"] += 1

    def _image_names(self, index: int, sample: dict[str, Any], turns: list[dict[str, Any]]) -> tuple[str, ...]:
        found = sample.get("image") or []
        images = tuple(found) if isinstance(found, list) else (found,)
        if not all(isinstance(name, str) for name in images):
            raise FoveateError(f"{self._name(index)} names an image that is no path: {found!r}.")
        asked = [turn["value"].strip() for turn in turns if turn.get("from") == "human"]
        placeholders = sum(text.count(IMAGE_TOKEN) for text in asked)
        # A text can be about the word itself; at an edge of the first turn it stands for an image.
        meant = images or (asked and (asked[0].startswith(IMAGE_TOKEN) or asked[0].endswith(IMAGE_TOKEN)))
        if meant and placeholders != len(images):
            raise FoveateError(
                f"{self._name(index)} has {placeholders} {IMAGE_TOKEN} for {len(images)} image(s): there has to be "
                "one for each."
            )
        return images

    def _check_images(self, skip_missing: bool) -> None:
        there: dict[str, bool] = {}

        def exists(name: str) -> bool:
            if name not in there:
                there[name] = (self.images / name).is_file()
            return there[name]

        if skip_missing:
            self._keep(lambda pair: all(map(exists, pair.images)), "examples whose image is missing")
            return
        for pair in self.pairs[:_IMAGES_CHECKED]:
            for name in pair.images:
                if not exists(name):
                    raise FoveateError(self._missing(self._name(pair.sample), self.images / name))

    def _missing(self, name: str, path: Path) -> str:
        return (
            f"{name}: there is no image {path}; --images names the folder that image paths begin in, and "
            "--skip-missing leaves such samples out."
        )

    def _open(self, file: str, name: str) -> Image.Image:
        path = self.images / file
        try:
            return Image.open(path).convert("RGB")
        except FileNotFoundError:
            raise FoveateError(self._missing(name, path)) from None
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise FoveateError(f"{name}: the image {path} can't be read ({error}).") from error


def _as_one(pairs: list[_Pair]) -> _Pair:
    """The pairs of a dialogue, put together again."""
    return dataclasses.replace(pairs[0], later=tuple((pair.question, pair.answer) for pair in pairs[1:]))


class Examples(Protocol):
    """What is trained on: a dataset of [`Example`]; a position beyond the last one is another round.

    Attributes:
        summary: for readers and the training log.
    """

    @property
    def summary(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Example: ...


@dataclass(frozen=True)
class DataSource:
    """Examples that no file of the user's holds: `data: NAME` or `NAME:NUMBER` in a recipe (see `plugins.py`).

    Args:
        open: (a stage's recipe, how many) → the examples.
        number: how many, where the recipe doesn't say.
        unit: what is counted, for readers ("scenes").
    """

    open: Callable[[StageRecipe, int], Examples]
    number: int
    unit: str


def open_data(stage: StageRecipe) -> Examples:
    """The examples that a stage's recipe names. Raises `FoveateError`."""
    name, colon, number = stage.data.partition(":")
    source: DataSource | None = find_plugin(DATA_GROUP, name)
    if source is not None:
        if colon and (not number.isdecimal() or int(number) < 1):
            raise FoveateError(
                f"{stage.data} is no number of {source.unit}: write {name}:NUMBER, for instance {name}:{source.number}."
            )
        return source.open(stage, int(number) if colon else source.number)
    path = Path(stage.data).expanduser()
    images = Path(stage.images).expanduser() if stage.images is not None else path.parent
    if not path.is_file():
        raise FoveateError(f"There is no file {path}: --data takes a JSON file in LLaVA's format, lab or lab:NUMBER.")
    if not images.is_dir():
        raise FoveateError(f"There is no folder {images}: --images names the one that image paths begin in.")
    return LlavaExamples(path, images, stage.keep_text_only, stage.skip_missing, stage.dialogues)


def _read_samples(path: Path) -> list[Any]:
    try:
        samples = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FoveateError(f"{path} can't be read as JSON ({error}).") from error
    if not isinstance(samples, list) or not samples:
        raise FoveateError(f"{path} holds no list of samples: it is not in LLaVA's format.")
    return samples


class TrainingOrder(Sampler[int]):
    """All positions of a training, epoch after epoch, each epoch in an order of its own.

    Transformers' Trainer sees one long epoch: to go on after a break it skips what was read, and nothing has to be
    remembered of epochs.

    Args:
        number: examples in the data.
        length: examples to read in all.
        seed: chooses the orders.
    """

    def __init__(self, number: int, length: int, seed: int):
        self.number, self.length, self.seed = number, length, seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.length, self.number):
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + start // self.number)
            order = torch.randperm(self.number, generator=generator)[: self.length - start]
            yield from (start + order).tolist()


class Collator:
    """Batches of examples: prompts as generation sees them, then the answers, which alone are learned.

    Args:
        processor: of the checkpoint.
        max_length: longest sequence in tokens.
    """

    def __init__(self, processor: Any, max_length: int):
        self.processor, self.max_length = processor, max_length
        self._takes_question = "question" in inspect.signature(type(processor).__call__).parameters
        self._before, self._after = self._answer_frame()

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Examples → model inputs, padded on the right, with `labels` (batch, length), −100 outside of answers.

        Raises:
            FoveateError: an image that the processor refuses, a prompt that is too long.
        """
        if not any(example.images for example in examples):
            examples = [*examples, _BLANK]
        inputs = self._encode(examples, [self.prompt(example) for example in examples])
        mask = inputs.pop("attention_mask").bool()
        continuations = self._continuations(examples)
        rows, labels = [], []
        for example, ids, real, continuation in zip(examples, inputs.pop("input_ids"), mask, continuations):
            ids = ids[real]
            if len(ids) >= self.max_length:
                raise FoveateError(
                    f"{example.name}: the prompt has {len(ids)} tokens, which leaves nothing of "
                    f"max_length={self.max_length} for the answer: raise it."
                )
            pieces = [(torch.tensor(tokens, dtype=ids.dtype), learned) for tokens, learned in continuation]
            rows.append(torch.cat([ids, *(tokens for tokens, _ in pieces)])[: self.max_length])
            learned = [
                t if learned and example is not _BLANK else torch.full_like(t, _IGNORED) for t, learned in pieces
            ]
            labels.append(torch.cat([torch.full_like(ids, _IGNORED), *learned])[: self.max_length])
        pad = torch.nn.utils.rnn.pad_sequence
        padding = self.processor.tokenizer.pad_token_id
        return {
            **inputs,
            "input_ids": pad(rows, batch_first=True, padding_value=0 if padding is None else padding),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=_IGNORED),
        }

    def prompt(self, example: Example) -> str:
        """The question in the chat template, with the assistant's turn opened."""
        return self._render([self._user_turn(example.question, len(example.images))], add_generation_prompt=True)

    def prompt_length(self, example: Example) -> int:
        """Tokens of a prompt, visual ones among them."""
        return int(self._encode([example], [self.prompt(example)])["attention_mask"].sum())

    def longest_frame(self) -> int:
        """The most tokens that a prompt with one image can have beside those of its question."""
        side = 2048  # large and square: the most tiles, where a model has tiles
        return self.prompt_length(Example("a probe", "?", "", (Image.new("RGB", (side, side)),)))

    def _encode(self, examples: Sequence[Example], prompts: list[str]) -> dict[str, torch.Tensor]:
        """What the processor makes of prompts, as in generation."""
        images = [list(example.images) for example in examples]
        guides = [[" ".join(example.question.split())] * len(example.images) for example in examples]
        try:
            inputs = self.processor(
                images=images if any(images) else None,
                text=prompts,
                padding=True,
                return_tensors="pt",
                **({"question": guides} if self._takes_question else {}),
            )
        except ValueError as error:
            raise FoveateError(f"{', '.join(example.name for example in examples)}: {error}") from error
        return dict(inputs)

    def _continuations(self, examples: Sequence[Example]) -> list[list[tuple[list[int], bool]]]:
        """What follows each example's prompt, in pieces: the tokens that generation has to continue with, end of
        sequence included (learned), and the next question as its prompt has it (not learned), in turn."""
        texts = [self._pieces(example) for example in examples]
        tokenizer = self.processor.tokenizer
        whole = iter(tokenizer([text for pieces in texts for text in itertools.accumulate(pieces)])["input_ids"])
        found = []
        for pieces in texts:
            before, continuation = next(whole), []
            for index, piece in enumerate(pieces[1:]):
                tokens = next(whole)
                if tokens[: len(before)] == before:
                    new = tokens[len(before) :]
                else:  # the last token before would have swallowed something: generation can't undo it
                    new = tokenizer(piece, add_special_tokens=False)["input_ids"]
                continuation.append((new, index % 2 == 0))
                before = tokens
            found.append(continuation)
        return found

    def _pieces(self, example: Example) -> list[str]:
        """A dialogue as text: the first prompt, then answers and questions in turn; they begin with an answer."""
        turns = [self._user_turn(example.question, len(example.images))]
        pieces = [self._render(turns, add_generation_prompt=True)]
        answers = [example.answer, *(answer for _, answer in example.later)]
        for answer, asked in itertools.zip_longest(answers, [question for question, _ in example.later]):
            is_last = asked is None
            end = self._after or ("" if not is_last else self.processor.tokenizer.eos_token)
            pieces.append(f"{self._before}{answer}{end}")
            if not is_last:
                turns.append(self._assistant_turn(answer))
                closed = self._render(turns, add_generation_prompt=False)
                turns.append(self._user_turn(asked, 0))
                prompt = self._render(turns, add_generation_prompt=True)
                pieces.append(prompt[len(closed.rstrip()) :])
        return pieces

    def _answer_frame(self) -> tuple[str, str]:
        """What the chat template writes before an answer and after it."""
        word = "an-answer"
        user = self._user_turn("a question", 0)
        prompt = self._render([user], add_generation_prompt=True)
        whole = self._render([user, self._assistant_turn(word)], add_generation_prompt=False)
        before, found, after = whole[len(prompt) :].partition(word)
        if not whole.startswith(prompt) or not found:
            raise FoveateError(
                "The checkpoint's chat template doesn't write an answer right after the prompt that generation "
                "begins with, so nothing could be learned from it: correct chat_template.jinja."
            )
        return before, after.rstrip()

    def _render(self, conversation: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(
            conversation, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    @staticmethod
    def _assistant_turn(answer: str) -> dict[str, Any]:
        return {"role": "assistant", "content": [{"type": "text", "text": answer}]}

    def _user_turn(self, question: str, num_images: int) -> dict[str, Any]:
        pictures = [{"type": "image"}] * num_images
        return {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}
