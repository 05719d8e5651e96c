"""Makes errors of what Transformers logs of names that it will drop: some of that is no Python warning (for those:
`filterwarnings` in pyproject.toml). Processes that tests start without foveate run this file too."""

import logging


#: What Transformers logs of itself: of its own pipelines' and assisted decoding's calls of `generate`, and of one of
#: its classes.
_ITS_OWN = (
    "Passing `generation_config` together with generation-related arguments",
    "`PaddleOCRVL",  # its processor, and what inherits it
)


class _Deprecated(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower() and not message.startswith(_ITS_OWN):
            raise DeprecationWarning(message)


def refuse_deprecated_names() -> None:
    logging.getLogger("transformers").addHandler(_Deprecated())
