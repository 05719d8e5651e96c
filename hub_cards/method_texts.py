"""What a card says of a method: what it does, in three sentences, and what it can't do. A new method adds its own."""

from __future__ import annotations


_BASELINE = "It is a baseline of MetaCompress's paper: nothing is trained, and nothing reads the question."

SUMMARIES: dict[str, str] = {
    "recoverable": (
        "A visual filter keeps the patches that the vision tower's class token attends to most. Of the others, those "
        "that are most similar to the question are recovered, and what is left is clustered and merged, one token a "
        "cluster. Nothing is trained."
    ),
    "qg-vtc": (
        "The question, read by CLIP's text tower, ranks the patches at chosen layers of the vision tower. The best "
        "stay in their order, and what the others hold is recycled into them by attention, so that later layers run "
        "on fewer and fewer patches. The number of visual tokens follows from the settings and the image's size alone."
    ),
    "metacompress": (
        "A small module makes a compression matrix of an image's own visual tokens, however many there are. The "
        "tokens that are left are mixtures of them, and because nothing reads the prompt they serve every turn of a "
        "conversation. The module is trained by distillation: the compressed model learns to answer as the "
        "uncompressed one does."
    ),
    "random": (
        f"A random choice of an image's visual tokens is kept, in their order. The others are dropped. {_BASELINE}"
    ),
    "sample": (
        f"Every so many of an image's visual tokens are kept, at equal distances. The others are dropped. {_BASELINE}"
    ),
    "spatial": (
        "An image's visual tokens are divided into stretches. Each becomes one token, the mean of what it holds. "
        f"{_BASELINE}"
    ),
    "etc": (
        "The language model reads the whole image and, right after it, a few learned tokens that take up what matters. "
        "The text that follows sees those tokens alone, and the image's own keys and values are freed, so that the "
        "cache holds little more than the text. The tokens are trained with the answers and an auxiliary loss that "
        "has them give back what the text looks at."
    ),
    "meteor": (
        "An image is seen as a whole and, where it is larger than a view, in slices besides. Two state space blocks "
        "let the patches of a view know of each other in linear time. Of every view, the patches that the class token "
        "and a learned instruction token find important together are kept."
    ),
}

#: What else than `foveate train` may have trained a checkpoint, by the config's `trained_by`: a card's words for its
#: state, and a limit.
ORIGINS: dict[str, tuple[str, str]] = {
    "voco-llama": (
        "trained by VoCo-LLaMA (https://arxiv.org/abs/2406.12275)",
        "It was trained by VoCo-LLaMA's code and objective, not ETC's. Two things differ from that code: no line break "
        "stands between an image and its compressed tokens, and later text sees the start token.",
    ),
}

LIMITS: dict[str, tuple[str, ...]] = {
    "recoverable": (
        "How many tokens an image needs is known only when it has been seen (unless `num_visual_tokens` is set), and "
        "prompts hold a placeholder for every patch: serving engines that count placeholders beforehand gain nothing.",
        "An image is compressed for the question that stands beside it; later turns see what that question left.",
    ),
    "qg-vtc": ("An image is compressed for one question: another question means encoding it again.",),
    "metacompress": (
        "It is trained at one share of tokens. `set_compression` takes others, at which it has not been trained.",
    ),
    "etc": (
        "The whole image is read once before it is freed: the cache and later tokens get cheaper, the first token "
        "does not, unless the image was compressed before (`model.compress`).",
        "A compressed image belongs to the text before it. Videos are not supported.",
    ),
    "meteor": ("A large image is several views, and can cost more than LLaVA-1.5, which sees every image as one.",),
}
