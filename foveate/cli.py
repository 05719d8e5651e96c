"""The `foveate` command: one thin command a Python function, with tables for people and one line for bad input.

What is heavy to import is imported by the command that needs it.
"""

from __future__ import annotations

import json
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from .errors import FoveateError, first_sentence


if TYPE_CHECKING:
    from .evaluation.ask import Answer


BAD_INPUT, INTERRUPTED = 2, 130
_OPTIONAL = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
_SPEAKING = ("foveate", "transformers", "transformers_modules", "huggingface_hub", "PIL")


class _Commands(TyperGroup):
    """Bad input becomes one line on stderr and exit status 2; a bug keeps its traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("foveate: interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            message = _message_of_bad_input(error)
            if message is None:
                raise
            typer.echo(f"foveate: {message}", err=True)
            raise typer.Exit(BAD_INPUT) from None


def _message_of_bad_input(error: Exception) -> str | None:
    """What to tell the user, on one line; `None` for an error that is not theirs to mend.

    A `ValueError` is theirs where this package or a library that checks input raised it, not where arithmetic failed.
    """
    from safetensors import SafetensorError

    if isinstance(error, FoveateError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return f"{error.filename}: {error.strerror}." if error.filename and error.strerror else first_sentence(error)
    if isinstance(error, ModuleNotFoundError) and error.name in _OPTIONAL:
        return f"This needs {_OPTIONAL[error.name]}, which is not installed: pip install 'foveate[eval]'."
    if isinstance(error, SafetensorError):
        return f"A weight file is damaged or not safetensors ({first_sentence(error).rstrip('.')}): download it again."
    if isinstance(error, ValueError):
        frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package == "foveate":
            return " ".join(str(error).split())
        return first_sentence(error) if package in _SPEAKING else None
    return None


app = typer.Typer(
    name="foveate",
    cls=_Commands,
    help="Vision-language models that answer with fewer visual tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the compression, as JSON or plain text; repeatable."),
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the GPU when there is one, if not said.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"foveate {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def methods() -> None:
    """List the compression methods."""
    from .registry import METHODS

    table = _table()
    for method in METHODS.values():
        names = ", ".join(backbone.title for backbone in method.backbones)
        training = "trained" if method.needs_training else "training-free"
        table.add_row(f"[bold]{method.name}[/]", f"{method.title}; on {names}; {training}\n{method.paper}")
    Console().print(table)


@app.command()
def convert(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Folder or hub id in the llava-hf layout, or lab:tiny-llava.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    method: Annotated[str, typer.Option(help="A name that `foveate methods` lists.")] = "recoverable",
    text_encoder: Annotated[
        str | None, typer.Option(metavar="CLIP", help="CLIP checkpoint that reads the question; known for most bases.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Make a checkpoint with visual token compression from a base model's.

    OUT loads with Transformers alone (trust_remote_code=True). It appears when it is complete, or not at all.
    """
    changes = parse_settings(settings)
    _quiet()
    from .conversion.convert import convert as convert_checkpoint

    written = convert_checkpoint(base, out, method, text_encoder, changes)
    typer.echo(f"Wrote {written} ({_size(sum(path.stat().st_size for path in written.rglob('*') if path.is_file()))}).")


@app.command()
def ask(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Folder, hub id, or lab:tiny-llava.")],
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Path, or lab:NUMBER for a test scene of the lab.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    compare: Annotated[
        str | None, typer.Option(metavar="BASE", help="Ask and time the uncompressed model as well.")
    ] = None,
    show: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Save a picture of what became of each patch.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 32,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Ask a question about an image, and see what compression saves."""
    _quiet()
    from .evaluation.ask import ask as ask_checkpoint

    answer = ask_checkpoint(checkpoint, image, question, compare, show, max_new_tokens, dtype, device)
    if as_json:
        typer.echo(json.dumps(answer.to_dict(), indent=2, ensure_ascii=False))
        return
    Console().print(_answer_table(answer))
    if answer.picture:
        typer.echo(f"Picture: {answer.picture}")


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Folder, hub id, or lab:tiny-llava.")],
    task: Annotated[str, typer.Option(help="lab-vqa (single questions) or lab-dialogue (three turns).")] = "lab-vqa",
    limit: Annotated[int | None, typer.Option(help="Questions or dialogues to ask; the task's own number.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses other scenes and questions.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result for `foveate.evaluation.results`.")
    ] = None,
    settings: Settings = None,
    batch_size: Annotated[int, typer.Option(help="Examples at a time.")] = 32,
    label: Annotated[str | None, typer.Option(help="Name of the run in tables; the method's, if not said.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Count a checkpoint's right answers and visual tokens on a task."""
    changes = parse_settings(settings)
    _quiet()
    from .evaluation.harness import evaluate as evaluate_checkpoint

    result = evaluate_checkpoint(
        checkpoint, task, limit, seed, batch_size, json_file, changes, dtype, device, method_label=label
    )
    Console().print(_result_table(result))
    if json_file:
        typer.echo(f"Result: {json_file}")


def main() -> None:
    """Entry point of the `foveate` command."""
    app(prog_name="foveate")


def parse_settings(words: list[str] | None) -> dict[str, Any]:
    """`["num_visual_tokens=64", "variant=paper"]` → a dictionary; values are JSON where they can be, else text.

    Raises:
        FoveateError: a word without a key or without "=".
    """
    settings = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise FoveateError(f"--set {word} is no setting: write --set KEY=VALUE.")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def _quiet() -> None:
    """Transformers' notes on loading are not for those who only want an answer."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)\b")


def _answer_table(answer: Answer) -> Table:
    measured = answer.base_kv_bytes is not None
    table = _table("", "this model", "base" if measured else "uncompressed, by account")
    table.add_row("answer", f"[bold]{_plain(answer.answer)}[/]", _plain(answer.base_answer or "") if measured else "")
    table.add_row("visual tokens", str(answer.visual_tokens_after), str(answer.visual_tokens_before))
    base_time = _milliseconds(answer.base_time_to_first_token) if answer.base_time_to_first_token is not None else ""
    table.add_row("time to first token", _milliseconds(answer.time_to_first_token), base_time)
    base_bytes = answer.base_kv_bytes if answer.base_kv_bytes is not None else answer.kv_bytes_uncompressed
    table.add_row("KV cache of the prompt", _size(answer.kv_bytes), _size(base_bytes))
    return table


def _result_table(result: dict[str, Any]) -> Table:
    table = _table("", "exact match", "95 %", "n")
    rows = {f"[bold]{_plain(result['label'])}[/] on {result['task']}": result["exact_match"], **result["by_type"]}
    rows |= {f"turn {turn}": share for turn, share in enumerate(result.get("by_turn", []), start=1)}
    for name, share in rows.items():
        low, high = share["interval"]
        table.add_row(name, f"{share['value']:.1%}", f"{low:.1%} – {high:.1%}", str(share["n"]))
    table.caption = f"visual tokens: {result['base_visual_tokens']:.0f} → {result['mean_visual_tokens']:.1f} an image"
    table.caption_justify = "left"
    return table


def _table(*titles: str) -> Table:
    return Table(*titles, box=None, pad_edge=False, show_header=bool(titles))


def _plain(text: str) -> str:
    """Text that rich doesn't read as markup."""
    return text.replace("[", r"\[")


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if unit != "bytes" else f"{num_bytes} bytes"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
