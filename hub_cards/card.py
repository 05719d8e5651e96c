"""The model card of a converted checkpoint: what it is, how to use it, and what is known of it."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..registry import METHODS


TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(folder: Path, base_name: str) -> None:
    """Writes `README.md` into a converted checkpoint, from its `config.json`.

    Args:
        folder: the checkpoint.
        base_name: what it was converted from: a hub id, or the name of a folder.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = METHODS[config["compression"]["method"]]
    is_hub_id = base_name.count("/") == 1 and not base_name.startswith((".", "/", "~"))
    data = ModelCardData(
        base_model=base_name if is_hub_id else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["foveate", method.name, "visual-token-compression"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=folder.name,
        base_name=base_name if is_hub_id else Path(base_name).name,
        method_title=method.title,
        paper=method.paper,
        state="untrained: its new parameters are freshly initialised" if method.needs_training else "training-free",
        settings=json.dumps(config["compression"], indent=2, sort_keys=True),
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")
