"""foveate: vision-language models that answer with fewer visual tokens, native to Hugging Face Transformers.

Importing it registers every model with Transformers' Auto classes, so that a converted checkpoint loads without
`trust_remote_code`.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


__version__ = "0.1.0"


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Imports make hundreds of thousands of objects and hardly any garbage: looking for it takes a second of five."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


with _without_garbage_collection():
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from .conversion.bundle import write_bundle
    from .conversion.convert import convert
    from .conversion.original_llava import import_original
    from .errors import FoveateError
    from .evaluation.ask import ask
    from .evaluation.harness import evaluate
    from .lab import lab_folder, load_lab
    from .modeling.compatibility import AutoModelForVision2Seq, register_image_processor
    from .modeling.compressed_model import CompressedModelMixin
    from .registry import METHODS, Backbone, Method, backbones

    for _backbone in backbones():
        AutoConfig.register(_backbone.model_type, _backbone.config_class)
        AutoProcessor.register(_backbone.config_class, _backbone.processor_class)
        if _backbone.image_processor_class is not None:
            register_image_processor(_backbone.config_class, _backbone.image_processor_class)
        AutoModel.register(_backbone.config_class, _backbone.model_class)
        AutoModelForImageTextToText.register(_backbone.config_class, _backbone.generation_class)
        if AutoModelForVision2Seq is not AutoModelForImageTextToText:
            AutoModelForVision2Seq.register(_backbone.config_class, _backbone.generation_class)
        for _class in (
            _backbone.config_class,
            _backbone.processor_class,
            _backbone.image_processor_class,
            _backbone.model_class,
            _backbone.generation_class,
        ):
            if _class is not None:
                globals()[_class.__name__] = _class

    CompressedModelMixin.code_writer = staticmethod(write_bundle)

__all__ = [
    "METHODS",
    "AutoModelForVision2Seq",
    "Backbone",
    "FoveateError",
    "Method",
    "ask",
    "convert",
    "evaluate",
    "import_original",
    "lab_folder",
    "load_lab",
    "train",
]
__all__ += [_name for _name in globals() if _name.startswith(tuple(b.stem for b in backbones()))]


def __getattr__(name: str):
    """`train` is imported when it is asked for: it brings the Trainer and PEFT along."""
    if name == "train":
        from .training.train import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
