"""The lab: a small trained vision-language model that ships with the project, its scenes and its training."""

from __future__ import annotations

from pathlib import Path

from foveate.errors import FoveateError


BASES = {"tiny-llava": "tiny-clip", "tiny-llava-next": "tiny-clip"}
"""The lab's LLaVA models, each with the CLIP checkpoint whose text tower is aligned with its vision tower. A further
base, "tiny-qwen3vl", has none."""

_WEIGHTS = Path(__file__).resolve().parent / "weights"


def lab_folder(name: str) -> Path:
    """The folder of a checkpoint that ships with the lab ("tiny-llava", "tiny-clip", or a trained method's, such as
    "tiny-llava-qg-vtc-72", which is put together first). Raises `FoveateError`."""
    folder = _WEIGHTS / name
    if (folder / "shard.json").exists():
        from foveate.lab.shards import composed

        return composed(folder)
    if not (folder / "config.json").exists():
        known = sorted(path.name for path in _WEIGHTS.glob("*") if path.is_dir())
        has = ", ".join(known) or "none (run `make lab`)"
        raise FoveateError(f"The lab has no checkpoint '{name}'; it has: {has}.")
    return folder


def load_lab(name: str = "tiny-llava", **kwargs):
    """Loads a base model of the lab with its processor.

    Args:
        name: a name in `BASES`, or "tiny-qwen3vl".
        kwargs: for `from_pretrained`, for instance `dtype=torch.float32`.

    Returns:
        (model in evaluation mode, processor), ordinary Transformers classes.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = lab_folder(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval()
    return model, AutoProcessor.from_pretrained(folder)
