"""Llama's `tokenizer.model` as a tokenizer of the tokenizers library, without the packages that wrote it.

The file is a protocol buffer (sentencepiece's `sentencepiece_model.proto`): pieces with scores, and how it was trained.
A byte pair encoding joins, of all neighbours that make a piece, those whose piece scores best; the tokenizers library
wants the joins themselves, in their order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from ..errors import FoveateError


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BYTE_PAIR_ENCODING = 2
_SPACE = "▁"


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; `kind` is sentencepiece's number for it."""

    text: str
    score: float
    kind: int


def read_pieces(path: Path) -> list[Piece]:
    """The vocabulary, in the order of its ids.

    Raises:
        FoveateError: a file that is damaged or none of sentencepiece's, or a model that is no byte pair encoding.
    """
    try:
        pieces, model_type = [], 1
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                entry = dict(_fields(value))
                pieces.append(Piece(entry[1].decode(), entry.get(2, 0.0), entry.get(3, _NORMAL)))
            elif field == 2:
                model_type = dict(_fields(value)).get(3, model_type)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise FoveateError(f"{path} is damaged or not a sentencepiece model: download it again.") from error
    if not pieces:
        raise FoveateError(f"{path} is damaged or not a sentencepiece model: download it again.")
    if model_type != _BYTE_PAIR_ENCODING:
        raise FoveateError(f"{path} is no byte pair encoding, as Llama's is: put a tokenizer.json beside it.")
    return pieces


def llama_tokenizer(path: Path, bos_token: str = "<s>") -> Tokenizer:
    """A tokenizer that does as Llama's does with `path`: a space before the text and before what follows a special
    token, unknown characters as bytes, and `bos_token` at the start.

    Raises:
        FoveateError: as [`read_pieces`] does.
    """
    pieces = read_pieces(path)
    ids = {piece.text: number for number, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None)
    if len(ids) != len(pieces) or unknown is None or bos_token not in ids:
        raise FoveateError(f"{path} is not Llama's kind of vocabulary: put a tokenizer.json beside it.")
    model = models.BPE(ids, _joins(pieces, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece.text, normalized=False) for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    )
    start = f"{bos_token}:0"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A:0",
        pair=f"{start} $A:0 {bos_token}:1 $B:1",
        special_tokens=[(bos_token, ids[bos_token])],
    )
    return tokenizer


def _joins(pieces: list[Piece], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the best score first; those that make the same one, by their ids."""
    text = {piece.text for piece in pieces if piece.kind in (_NORMAL, _USER_DEFINED)}
    found = []
    for piece in pieces:
        if piece.text in text:
            halves = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
            found += [
                (-piece.score, ids[piece.text], ids[left], ids[right], left, right)
                for left, right in halves
                if left in text and right in text
            ]
    return [(left, right) for *_, left, right in sorted(found)]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: bytes, or a number."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        field, wire = key >> 3, key & 7
        value: Any
        if wire == 0:
            value, place = _varint(data, place)
        elif wire in (1, 5):
            kind, size = ("<d", 8) if wire == 1 else ("<f", 4)
            value, place = struct.unpack_from(kind, data, place)[0], place + size
        elif wire == 2:
            size, place = _varint(data, place)
            value, place = data[place : place + size], place + size
            if len(value) != size:
                raise ValueError("cut off")
        else:
            raise ValueError("no such kind of field")
        yield field, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number in groups of seven bits, the last ones first, and the place behind it."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
        shift += 7
