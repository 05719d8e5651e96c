"""Llama's `tokenizer.model` as a tokenizer of the tokenizers library, which every version of Transformers reads.

The file lists pieces with scores. A byte pair encoding joins, of all neighbours that make a piece, those whose piece
scores best; the tokenizers library wants the joins themselves, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from foveate.errors import FoveateError


_SPACE = "▁"


def read_model(path: Path) -> Any:
    """The file as sentencepiece's `ModelProto`, its `pieces` in the order of their ids.

    Raises:
        FoveateError: a file that is damaged or none of sentencepiece's, or a model that is no byte pair encoding; or
            sentencepiece is not installed.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError as error:
        raise FoveateError(
            f"{path} is read by sentencepiece and protobuf, which are not installed: pip install 'foveate[import]', or "
            "put a tokenizer.json beside it."
        ) from error
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError:
        model = ModelProto()
    if not model.pieces:
        raise FoveateError(f"{path} is damaged or not a sentencepiece model: download it again.")
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise FoveateError(f"{path} is no byte pair encoding, as Llama's is: put a tokenizer.json beside it.")
    return model


def llama_tokenizer(path: Path, bos_token: str = "<s>") -> Tokenizer:
    """A tokenizer that does as Llama's does with `path`: a space before the text and before what follows a special
    token, unknown characters as bytes, and `bos_token` at the start.

    Raises:
        FoveateError: as [`read_model`] does.
    """
    pieces = read_model(path).pieces
    ids = {piece.piece: number for number, piece in enumerate(pieces)}
    unknown = next((piece.piece for piece in pieces if piece.type == piece.UNKNOWN), None)
    if len(ids) != len(pieces) or unknown is None or bos_token not in ids:
        raise FoveateError(f"{path} is not Llama's kind of vocabulary: put a tokenizer.json beside it.")
    model = models.BPE(ids, _joins(pieces, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in pieces if piece.type in (piece.UNKNOWN, piece.CONTROL)]
    )
    start = f"{bos_token}:0"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A:0",
        pair=f"{start} $A:0 {bos_token}:1 $B:1",
        special_tokens=[(bos_token, ids[bos_token])],
    )
    return tokenizer


def _joins(pieces: Sequence[Any], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the best score first; those that make the same one, by their ids."""
    scores = {piece.piece: piece.score for piece in pieces if piece.type in (piece.NORMAL, piece.USER_DEFINED)}
    found = []
    for text, score in scores.items():
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        found += [
            (-score, ids[text], ids[left], ids[right], left, right)
            for left, right in halves
            if left in scores and right in scores
        ]
    return [(left, right) for *_, left, right in sorted(found)]
