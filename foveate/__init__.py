"""foveate: vision-language models that answer with fewer visual tokens, native to Hugging Face Transformers.

Importing it is light: neither torch nor Transformers is imported before a name that needs them is used. Every model is
known to Transformers' Auto classes nevertheless (`registration.py`), so that a converted checkpoint loads without
`trust_remote_code`.
"""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


# In a checkout the other folders lie beside this one; installed, and in a development install's links, they lie in it.
if not (Path(__file__).parent / "modeling").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from foveate.errors import FoveateError
from foveate.registration import register_method, register_models
from foveate.registry import METHODS, Method, Pair, all_pairs, pairs


if TYPE_CHECKING:  # what is imported when it is asked for
    from foveate.conversion.convert import convert
    from foveate.conversion.in_memory import compress, uncompress
    from foveate.conversion.original_llava import import_original
    from foveate.conversion.shards import lab_folder
    from foveate.evaluation.ask import ask
    from foveate.evaluation.harness import evaluate
    from foveate.lab import load_lab
    from foveate.modeling.compatibility import AutoModelForVision2Seq
    from foveate.modeling.core.precision import fast_dtype
    from foveate.training.train import train


__version__ = "0.2.0"

#: The module of each name that is imported when it is asked for. So is every class that the registry names.
_MODULES = {
    "AutoModelForVision2Seq": "foveate.modeling.compatibility",
    "ask": "foveate.evaluation.ask",
    "compress": "foveate.conversion.in_memory",
    "convert": "foveate.conversion.convert",
    "evaluate": "foveate.evaluation.harness",
    "fast_dtype": "foveate.modeling.core.precision",
    "import_original": "foveate.conversion.original_llava",
    "lab_folder": "foveate.conversion.shards",
    "load_lab": "foveate.lab",
    "train": "foveate.training.train",
    "uncompress": "foveate.conversion.in_memory",
}
_FOLDERS = {"configuration", "conversion", "evaluation", "hub_cards", "lab", "modeling", "processing", "training"}

__all__ = [
    "METHODS",
    "AutoModelForVision2Seq",
    "FoveateError",
    "Method",
    "Pair",
    "ask",
    "compress",
    "convert",
    "evaluate",
    "fast_dtype",
    "import_original",
    "lab_folder",
    "load_lab",
    "register_method",
    "train",
    "uncompress",
]


def _classes(found: Iterable[Pair] | None = None) -> dict[str, str]:
    """The module of each class of the registry, to which methods may be added; or of some pairs."""
    found = pairs() if found is None else found
    return {reference.name: reference.module for pair in found for reference in pair.references.values()}


__all__ += sorted(_classes())


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"foveate.{name}")
    module = _MODULES.get(name) or _classes().get(name) or _classes(all_pairs()).get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(module), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS, *_classes()})


register_models()
