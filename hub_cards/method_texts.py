"""What a card says of a checkpoint's origin. What it says of a method is declared beside the method."""

from __future__ import annotations


#: What else than `foveate train` may have trained a checkpoint, by the config's `trained_by`: a card's words for its
#: state, and a limit.
ORIGINS: dict[str, tuple[str, str]] = {
    "voco-llama": (
        "trained by VoCo-LLaMA (https://arxiv.org/abs/2406.12275)",
        "It was trained by VoCo-LLaMA's code and objective, not ETC's. Two things differ from that code: no line break "
        "stands between an image and its compressed tokens, and later text sees the start token.",
    ),
}
