"""The lab: a small trained vision-language model that ships with the project, its scenes and its training."""

from __future__ import annotations

from foveate.conversion.shards import lab_folder


__all__ = ["lab_folder", "load_lab"]


def load_lab(name: str = "tiny-llava", **kwargs):
    """Loads a base model of the lab with its processor.

    Args:
        name: "tiny-llava", "tiny-llava-next" or "tiny-qwen3vl".
        kwargs: for `from_pretrained`, for instance `dtype=torch.float32`.

    Returns:
        (model in evaluation mode, processor), ordinary Transformers classes.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = lab_folder(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval()
    return model, AutoProcessor.from_pretrained(folder)
