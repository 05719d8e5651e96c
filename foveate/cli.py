"""The `foveate` command: one thin command a Python function, with tables for people and one line for bad input.

What is heavy to import is imported by the command that needs it.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from foveate.errors import FoveateError, first_sentence
from foveate.units import show_flops, show_size


if TYPE_CHECKING:
    from foveate.evaluation.ask import Answer
    from foveate.evaluation.flops import FlopsReport


BAD_INPUT, UPGRADE_DUE, INTERRUPTED = 2, 3, 130
_OPTIONAL = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


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

    A plain `ValueError` is a bug: one that input caused became a `FoveateError` where the input was used.
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
NumVisualTokens = Annotated[
    int | None, typer.Option(help="Tokens that an image is compressed to; the method's own number, if not said.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's own, or a faster one where the device is slow in it), float32, bfloat16 or "
        "float16."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the GPU when there is one, if not said.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from foveate import __version__

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
def methods(
    backbones: Annotated[
        bool, typer.Option("--backbones", help="List every model of the installed Transformers, and what works on it.")
    ] = False,
) -> None:
    """List the compression methods."""
    from foveate.registry import METHODS, pairs_of

    if backbones:
        _list_backbones()
        return
    table = _table()
    for method in METHODS.values():
        names = ", ".join(backbone.title for backbone in pairs_of(method.name))
        if method.kind == "sequence":
            names += " and any other model with the same doors (--backbones)"
        training = "trained" if method.needs_training else "training-free"
        table.add_row(f"[bold]{method.name}[/]", f"{method.title}; on {names}; {training}\n{method.paper}")
    Console().print(table)


def _list_backbones() -> None:
    """Of every `model_type` that has images and text, the methods that run on it, or why none does."""
    _quiet()
    from foveate.families import stock_families, why_unfit, writes_placeholders
    from foveate.registry import BACKBONES, METHODS, pair_on

    table = _table()
    families = stock_families()
    for model_type in sorted({*BACKBONES, *families}):
        names = ", ".join(name for name in METHODS if pair_on(name, model_type) is not None)
        if model_type in families and (reason := why_unfit(model_type)) is not None:
            names = f"[dim]–: {reason}[/]"
        elif model_type in families and not writes_placeholders(model_type):
            names += "; the model alone, without a processor (foveate.compress)"
        table.add_row(f"[bold]{model_type}[/]", names)
    Console().print(table)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for what it makes.")] = Path("demo"),
    picture: Annotated[
        Path | None, typer.Argument(metavar="PICTURE", help="Picture to ask about; a drawn scene, if not said.")
    ] = None,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="What to ask about PICTURE.")] = None,
) -> None:
    """Convert the small model that ships with foveate, and ask it from a process without foveate.

    FOLDER has the checkpoint afterwards, and the picture of what was kept.
    """
    _quiet()
    from foveate.evaluation.demo import run_demo

    run_demo(folder, picture, question)


@app.command()
def convert(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Folder or hub id in Transformers' own layout, or lab:tiny-llava.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    method: Annotated[str, typer.Option(help="A name that `foveate methods` lists.")] = "recoverable",
    text_encoder: Annotated[
        str | None, typer.Option(metavar="CLIP", help="CLIP checkpoint that reads the question; known for most bases.")
    ] = None,
    num_visual_tokens: NumVisualTokens = None,
    keep_ratio: Annotated[
        float | None,
        typer.Option(metavar="R", help="Share of an image's visual tokens to keep, above 0 and at most 1."),
    ] = None,
    settings: Settings = None,
    layout: Annotated[
        str,
        typer.Option(
            help="full, or adapter: only what the method adds, and where the base is; loading finds it there, and "
            "`foveate merge` makes it whole."
        ),
    ] = "full",
    link: Annotated[
        bool,
        typer.Option(
            "--link",
            help="Hard links to the base's weight files instead of copies: done in seconds, without disk space. Both "
            "folders have the same files then: what writes into one changes the other (save_pretrained of a "
            "compressed model makes new files).",
        ),
    ] = False,
) -> None:
    """Make a checkpoint with visual token compression from a base model's.

    OUT loads with Transformers alone (trust_remote_code=True). It appears when it is complete, or not at all.
    """
    changes = parse_settings(settings)
    if num_visual_tokens is not None and keep_ratio is not None:
        raise FoveateError("--num-visual-tokens and --keep-ratio both set the budget: give one of them.")
    if num_visual_tokens is not None:
        changes["num_visual_tokens"] = num_visual_tokens
    _quiet()
    from foveate.conversion.convert import convert as convert_checkpoint

    written = convert_checkpoint(
        base, out, method, text_encoder, changes, keep_ratio, layout=layout, link=link, progress=True
    )
    typer.echo(f"Wrote {written} ({_size_of(written)}).")


@app.command()
def merge(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Checkpoint in the adapter layout, or with LoRA weights beside it.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
) -> None:
    """Make a whole checkpoint of a small one and its base, with LoRA weights merged."""
    _quiet()
    from foveate.training.merge import merge as merge_checkpoint

    written = merge_checkpoint(checkpoint, out)
    typer.echo(f"Wrote {written} ({_size_of(written)}).")


@app.command("import")
def import_checkpoint(
    original: Annotated[
        str,
        typer.Argument(
            metavar="ORIGINAL", help="Folder or hub id of a LLaVA-1.5 or VoCo-LLaMA as its own repository writes it."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    vision_tower: Annotated[
        str | None, typer.Option(metavar="CLIP", help="CLIP checkpoint that it sees with; the one its config names.")
    ] = None,
    num_visual_tokens: Annotated[
        int | None, typer.Option(help="VoCo-LLaMA: how many <voco> tokens an image has.")
    ] = None,
) -> None:
    """Bring a checkpoint of LLaVA's own repository into the layout that `convert` and Transformers read.

    One of VoCo-LLaMA's becomes a checkpoint of the method etc at once.
    """
    _quiet()
    from foveate.conversion.original_llava import import_original

    written = import_original(original, out, vision_tower, num_visual_tokens)
    typer.echo(f"Wrote {written} ({_size_of(written)}).")


@app.command()
def ask(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Folder, hub id, or lab:tiny-llava.")],
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="Path, or lab:, lab-next: or lab-sliced:NUMBER: a scene.")
    ],
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
    from foveate.evaluation.ask import ask as ask_checkpoint

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
    task: Annotated[
        str,
        typer.Option(
            help="lab-vqa, lab-dialogue (three turns), lab-next-…, lab-sliced-vqa; with --data mt-vqa-v2 or mt-gqa."
        ),
    ] = "lab-vqa",
    limit: Annotated[int | None, typer.Option(help="Questions or dialogues to ask; the task's own number.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses other scenes and questions, or dialogues of a dataset.")] = 0,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with VQA-v2's or GQA's files as published.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with the images; val2014 or images in --data, if not said."),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out dialogues with an image that is missing.")
    ] = False,
    reuse_cache: Annotated[
        bool, typer.Option("--reuse-cache", help="Later turns go on with the cache; else each is a fresh run.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result for `foveate.evaluation.results`.")
    ] = None,
    settings: Settings = None,
    batch_size: Annotated[int, typer.Option(help="Examples at a time.")] = 32,
    label: Annotated[str | None, typer.Option(help="Name of the run in tables; the method's, if not said.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Narrower weights: 8bit or 4bit (bitsandbytes), or int8 (torchao).")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Count a checkpoint's right answers and visual tokens on a task."""
    changes = parse_settings(settings)
    _quiet()
    from foveate.evaluation.harness import evaluate as evaluate_checkpoint

    result = evaluate_checkpoint(
        checkpoint,
        task,
        limit,
        seed,
        batch_size,
        json_file,
        changes,
        dtype,
        device,
        method_label=label,
        reuse_cache=reuse_cache,
        data=data,
        images=images,
        skip_missing=skip_missing,
        quantize=quantize,
    )
    Console().print(_result_table(result))
    if skipped := result.get("skipped", {}).get("n"):
        names = result["skipped"]["names"]
        more = "; …" if len(names) < skipped else ""
        typer.echo(f"Left out {skipped} dialogue(s) without their image: {'; '.join(names)}{more}")
    if json_file:
        typer.echo(f"Result: {json_file}")


@app.command()
def flops(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CKPT", help="Folder, hub id, or lab:tiny-llava; only its config is read.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A published model without its checkpoint: llava-1.5-7b, …"),
    ] = None,
    method: Annotated[str | None, typer.Option(help="With --shape: a name that `foveate methods` lists.")] = None,
    num_visual_tokens: Annotated[
        int | None, typer.Option(help="Tokens that an image, or each of its tiles, is compressed to.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="I,J,…", help="Layers of the vision tower that compress, counted from 0.")
    ] = None,
    settings: Settings = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Size of the image in pixels; one tile's, if not said.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Length of the prompt without its visual tokens.")] = 60,
    encoder_ratio: Annotated[
        bool,
        typer.Option(
            "--encoder-ratio", help="R, a compressing vision tower's share of FLOPs, in percent, of CLIP ViT-L/14-336."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with raw numbers instead of a table.")] = False,
) -> None:
    """Count a model's FLOPs and KV-cache bytes by account, beside the same model uncompressed."""
    changes = parse_settings(settings)
    if num_visual_tokens is not None:
        changes["num_visual_tokens"] = num_visual_tokens
    if layers is not None:
        changes["layers"] = parse_layers(layers)
    size = parse_image_size(image_size) if image_size is not None else None
    _quiet()
    from foveate.evaluation.flops import encoder_ratio as ratio_of
    from foveate.evaluation.flops import flops as count

    if encoder_ratio:
        if layers is None or num_visual_tokens is None or checkpoint or shape or method or settings or image_size:
            raise FoveateError("--encoder-ratio takes --layers and --num-visual-tokens, and nothing else but --json.")
        ratio = round(ratio_of(changes["layers"], num_visual_tokens), 2)
        typer.echo(json.dumps({"R": ratio}) if as_json else f"R = {ratio:.2f} %")
        return
    report = count(checkpoint, shape, method, changes, size, text_tokens)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    Console().print(_flops_table(report))


@app.command()
def train(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A name that `foveate methods` lists as trained.")],
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Folder or hub id: converted, or trained in the stage before.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    stage: Annotated[int, typer.Option(help="Stage of the recipe.")] = 1,
    data: Annotated[
        str | None, typer.Option(metavar="JSON", help="File in LLaVA's format, lab, or lab:NUMBER of scenes.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the file's image paths begin; its own folder, if not said."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="YAML", help="A recipe in place of the method's own.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A value of the recipe's stage, for instance lora.r=8; repeatable."
        ),
    ] = None,
    aux: Annotated[
        str | None, typer.Option(metavar="LOSS", help="What ETC learns beside the answers: vid, mse or none.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps of the optimizer, in place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a device and step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the data, and initial values.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What to compute in: auto (bfloat16 where the device computes fast in it, else float32), float32 or "
            "bfloat16; the recipe's precision, if not said."
        ),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out what has an image that is missing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training of OUT that was broken off.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge/--keep-adapter", help="Merge LoRA into the weights, or keep it in OUT/adapter.")
    ] = True,
    keep_state: Annotated[
        bool, typer.Option("--keep-state", help="Leave OUT.training, what training goes on from, there at the end.")
    ] = False,
) -> None:
    """Train a stage of a method's recipe; the result is again a checkpoint that loads with Transformers alone.

    For many devices: accelerate launch --config_file CONFIG -m foveate train … (training/launch has configurations).
    """
    options = {"data": data, "images": images and str(images), "max_steps": max_steps, "batch_size": batch_size}
    options |= {
        "auxiliary.loss": aux,
        "seed": seed,
        "skip_missing": skip_missing or None,
        "precision": _precision(dtype),
    }
    changes = parse_settings(settings) | {key: value for key, value in options.items() if value is not None}
    _quiet()
    from foveate.training.train import train as train_checkpoint

    written = train_checkpoint(
        method, checkpoint, out, stage, recipe, changes, resume=resume, merge=merge, keep_state=keep_state
    )
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"Wrote {written} ({_size_of(written)}).")


@app.command()
def card(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Folder of a compressed checkpoint.")],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A result of `foveate evaluate --json` of these weights; repeatable."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="What it was converted from, and its license; as the card says, if not said."
        ),
    ] = None,
) -> None:
    """Write a checkpoint's model card, with the evaluations that are named and no others."""
    _quiet()
    from foveate.conversion.shards import find_checkpoint
    from foveate.hub_cards.card import write_card
    from foveate.hub_cards.names import CARD_FILE

    source = None if base is None else find_checkpoint(base)
    write_card(checkpoint.expanduser(), base, source, evaluation or ())
    typer.echo(f"Wrote {checkpoint / CARD_FILE}.")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Folder of a checkpoint.")],
    full: Annotated[
        bool, typer.Option("--full", help="Read weight files whole; else their sizes, headers and samples.")
    ] = False,
) -> None:
    """Say whether a folder is what foveate wrote.

    The exit status is 0 if all of it is as the installed version writes it, 3 if its files are as listed but its code
    is that of another version (`foveate upgrade` is due), and else 1.
    """
    _quiet()
    from foveate.conversion.verify import verify as verify_folder

    found = verify_folder(checkpoint, full)
    typer.echo(f"{checkpoint}: {found.verdict}")
    for kind, names in found.findings.items():
        typer.echo(f"  {kind}: {', '.join(names)}")
    if found.num_files:
        code = "as this version writes it" if found.same_code else "not this version's"
        typer.echo(f"  {found.num_files} files listed, {found.num_weights} of them weights; code {code}.")
    if found.not_whole:
        which = f"weights ({len(found.not_whole)})" if full else "weights"
        more = ", as the list has no more of them" if full else "; --full reads them whole"
        typer.echo(f"  Compared of {which}: size, header and samples{more}.")
    raise typer.Exit(0 if found.as_written else UPGRADE_DUE if found.upgrade_due else 1)


@app.command()
def upgrade(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Folder, upgraded in place; or hub id, with --out or --push.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write an upgraded copy; the folder must not exist.")
    ] = None,
    push: Annotated[
        bool, typer.Option("--push", help="Upgrade a repository on the hub by one commit; weights stay there.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also where other files than code and card were changed: list them so.")
    ] = False,
) -> None:
    """Bring a checkpoint's code, card and list of files up to date with this version.

    Weights, settings and what was edited in the card stay as they are. A folder changes as a whole, or not at all.
    """
    _quiet()
    from foveate.conversion.upgrade import upgrade as upgrade_checkpoint

    done = upgrade_checkpoint(checkpoint, out, push=push, force=force)
    if not done.is_change:
        typer.echo(f"{done.place} is up to date with foveate {done.after}: nothing was changed.")
        return
    before = f"from foveate {done.before}" if done.before else "as Transformers saved it, without a list of files,"
    typer.echo(f"Upgraded {done.place} {before} to foveate {done.after}.")
    for kind, names in done.findings.items():
        typer.echo(f"  {kind}: {', '.join(names)}")
    if done.kept_passages:
        typer.echo(
            f"  Passages of the card that were edited, and stay though this version differs: {done.kept_passages}"
        )


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Folder of a checkpoint.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the hub; made if it isn't there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private, if it is made.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and upload nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also a folder that `foveate verify` doesn't find as written.")
    ] = False,
) -> None:
    """Upload a checkpoint to the hub, in one commit, if there is nothing in it that shouldn't be there."""
    _quiet()
    from foveate.conversion.push import push as push_checkpoint

    upload = push_checkpoint(checkpoint, repo_id, private, dry_run, force)
    table = _table()
    for name, num_bytes in upload.sizes.items():
        table.add_row(_plain(name), show_size(num_bytes))
    Console().print(table)
    if upload.left_out:
        typer.echo(f"Left out: {', '.join(upload.left_out)}")
    total = f"{len(upload.sizes)} files, {show_size(sum(upload.sizes.values()))}"
    typer.echo(f"Dry run: {total} would go to {upload.url}." if dry_run else f"Pushed {total} to {upload.url}.")


def main() -> None:
    """Entry point of the `foveate` command."""
    # Imports make hundreds of thousands of objects and hardly any garbage. Looking for it less often takes
    # `foveate convert --link` of a lab model from 4.4 s to 3.9 s (Transformers 5.24, best of 6).
    gc.set_threshold(20_000)
    try:
        app(prog_name="foveate")
    except SystemExit as end:
        if isinstance(end.code, int):
            _end_at_once(end.code)
        raise


def _end_at_once(status: int) -> None:
    """Ends the process without taking apart all that was imported: by that `foveate convert --link` of a lab model
    takes 4.4 s where it takes 5.7 s without (Transformers 5.24, best of 6).

    What is registered for the end of the process runs. Returns where output can't be written out: Python says it.
    """
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:
        return
    os._exit(status)


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


def parse_layers(words: str) -> list[int]:
    """`"12,14"` → [12, 14]. Raises `FoveateError` for anything but whole numbers."""
    numbers = [word.strip() for word in words.split(",")]
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise FoveateError(f"--layers {words} is no list of layers: write numbers with commas, for instance 12,14,16.")
    return [int(number) for number in numbers]


def parse_image_size(words: str) -> tuple[int, int]:
    """`"640x480"` → (640, 480), width first. Raises `FoveateError` for anything else."""
    numbers = words.lower().split("x")
    if len(numbers) != 2 or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise FoveateError(f"--image-size {words} is no size: write WIDTHxHEIGHT in pixels, for instance 640x480.")
    return int(numbers[0]), int(numbers[1])


def _precision(dtype: str | None) -> str | None:
    """A recipe's word for a dtype; `None` for `None`. Raises `FoveateError`."""
    if dtype is None:
        return None
    words = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16"}
    if dtype not in words:
        raise FoveateError(f"Training can't compute in '{dtype}': choose one of {', '.join(words)}.")
    return words[dtype]


def _quiet() -> None:
    """Transformers' notes on loading are not for those who only want an answer."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers.foveate").setLevel(logging.WARNING)  # that this version is untested is for all
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which kernels of its own it doesn't find
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # how torchao, on import, registers types
    warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)\b")


def _answer_table(answer: Answer) -> Table:
    measured = answer.base_kv_bytes is not None
    table = _table("", "this model", "base" if measured else "uncompressed, by account")
    table.add_row("answer", f"[bold]{_plain(answer.answer)}[/]", _plain(answer.base_answer or "") if measured else "")
    base_tokens = answer.base_visual_tokens if measured else answer.visual_tokens_before
    table.add_row("visual tokens", str(answer.visual_tokens_after), str(base_tokens))
    base_time = _milliseconds(answer.base_time_to_first_token) if answer.base_time_to_first_token is not None else ""
    table.add_row("time to first token", _milliseconds(answer.time_to_first_token), base_time)
    base_bytes = answer.base_kv_bytes if answer.base_kv_bytes is not None else answer.kv_bytes_uncompressed
    table.add_row("KV cache of the prompt", show_size(answer.kv_bytes), show_size(base_bytes))
    table.caption, table.caption_justify = f"{answer.dtype} on {answer.device}", "left"
    return table


def _flops_table(report: FlopsReport) -> Table:
    """TFLOPs and so on of the model and its base, and the share that is left; for a stock model, its own alone."""
    model, base = report.model, report.base
    compressed = report.method != "none"
    table = _table("", report.method, "uncompressed", "share") if compressed else _table("", "this model")

    def row(name: str, show: Callable[[int], str], mine: int, theirs: int) -> None:
        share = f"{mine / theirs:.1%}" if theirs else ""
        table.add_row(name, *([show(mine), show(theirs), share] if compressed else [show(mine)]))

    for part in ("vision_tower", "text_encoder", "compressor", "projector", "llm_prefill", "total"):
        name = "[bold]total[/]" if part == "total" else part.replace("_", " ").replace("llm", "LLM")
        row(name, show_flops, getattr(model, part), getattr(base, part))
    row("visual tokens", str, model.visual_tokens, base.visual_tokens)
    row("KV cache of the prompt", show_size, model.kv_bytes, base.kv_bytes)
    width, height = report.image_size
    bound = "; at most: the method chooses the number by the image" if model.at_most else ""
    table.caption = f"{width}x{height} pixels, {report.text_tokens} text tokens{bound}"
    table.caption_justify = "left"
    return table


def _result_table(result: dict[str, Any]) -> Table:
    from foveate.evaluation.metrics import METRICS

    metric = next(name for name in METRICS if name in result)
    table = _table("", METRICS[metric].title, "95 %", "n")
    rows = {f"[bold]{_plain(result['label'])}[/] on {result['task']}": result[metric], **result["by_type"]}
    rows |= {f"turn {turn}": share for turn, share in enumerate(result.get("by_turn", []), start=1)}
    for name, share in rows.items():
        low, high = share["interval"]
        table.add_row(name, f"{share['value']:.1%}", f"{low:.1%} – {high:.1%}", str(share["n"]))
    table.caption = (
        f"visual tokens: {result['base_visual_tokens']:.0f} → {result['mean_visual_tokens']:.1f} an image; "
        f"{result['dtype']} on {result['timing']['device']}"
    )
    table.caption_justify = "left"
    return table


def _table(*titles: str) -> Table:
    return Table(*titles, box=None, pad_edge=False, show_header=bool(titles))


def _plain(text: str) -> str:
    """Text that rich doesn't read as markup."""
    return text.replace("[", r"\[")


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _size_of(folder: Path) -> str:
    return show_size(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
