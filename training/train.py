"""`foveate train`: one stage of a method's recipe, on `transformers.Trainer`.

What trains is kept in float32, everything else is frozen as the checkpoint has it. A state to go on from lies in
`OUT.training` while training runs. At the end the trained weights go into a fresh copy of the checkpoint, so that OUT
is again a checkpoint as conversion writes one. Under `accelerate launch` the same code runs on many processes: all of
them train, the main one writes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from foveate.conversion.atomic_folder import atomic_folder, require_free
from foveate.conversion.checkpoints import fetch_weights, read_config, read_shards
from foveate.conversion.merged_weights import copy_small_files, merge_lora
from foveate.conversion.shards import find_checkpoint
from foveate.conversion.without_base import leave_base_out
from foveate.errors import FoveateError, first_sentence
from foveate.hub_cards.card import read_base_name, write_card
from foveate.hub_cards.manifest import write_manifest
from foveate.hub_cards.training_records import ADAPTER_FOLDER, LOG_FILE, RECIPE_FILE, earlier_stages
from foveate.modeling.compatibility import CHECKPOINTING
from foveate.modeling.core.loading import BASE_FIELDS
from foveate.modeling.core.precision import dtype_name, fast_dtype
from foveate.registry import METHODS, pairs_of
from foveate.training.data import Collator, Examples, LlavaExamples, TrainingOrder, open_data
from foveate.training.distillation import Distillation
from foveate.training.muon import MuonWithAdamW
from foveate.training.recipe import (
    OBJECTIVES,
    OPTIMIZERS,
    LoraRecipe,
    StageRecipe,
    read_stage,
    show,
    write_recipe,
)
from foveate.training.visual_distillation import AUXILIARY, VisualDistillation


_RUN_FILE = "run.json"
_TRAINED_FILE = "trained.safetensors"
_MAY_DIFFER = ("workers", "save_steps", "logging_steps")  # on resuming: they change nothing that is learned
_SMALL_FILES_BYTES = 32_000_000


@dataclass(frozen=True)
class _Job:
    """A training that was asked for.

    Attributes:
        checkpoint, folder: what it starts from, as the user calls it and where its files are.
        out, state: absolute paths: the checkpoint to be, and the folder of what training needs to go on.
        recipe: with the precision that "auto" is here.
    """

    method: str
    checkpoint: str
    folder: Path
    out: Path
    state: Path
    stage: int
    recipe: StageRecipe
    merge: bool

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in; what trains is float32 in any case."""
        return torch.bfloat16 if self.recipe.precision == "bf16" else torch.float32

    def record(self, num_processes: int) -> dict[str, Any]:
        """What has to be the same when training goes on after a break."""
        return {
            "method": self.method,
            "checkpoint": self.checkpoint,
            "stage": self.stage,
            "num_processes": num_processes,
            **{key: value for key, value in self.recipe.to_dict().items() if key not in _MAY_DIFFER},
        }


def train(
    method: str,
    checkpoint: str | Path,
    out: str | Path,
    stage: int = 1,
    recipe: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    merge: bool = True,
    keep_state: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains one stage of a method's recipe, and writes a checkpoint.

    Args:
        method: a name in `foveate.registry.METHODS`.
        checkpoint: folder or hub id of a checkpoint of that method: converted, or the result of the stage before.
        out: the folder to write. It appears when it is complete, or not at all.
        stage: number of the stage in the recipe.
        recipe: a YAML file in place of the method's own.
        settings: values of the stage's recipe to change, by their path, for instance `{"max_steps": 300,
            "data": "lab:2048", "learning_rate.multi_modal_projector": 1e-3, "lora.r": 8}`.
        resume: go on from the last state in `OUT.training`.
        merge: merge the adapters into the language model; else they lie in `OUT/adapter` beside unmerged weights.
        keep_state: leave `OUT.training` there at the end.
        progress: show the recipe, a progress bar and the log.
        callbacks: Trainer callbacks beside its own.

    Returns:
        The absolute path of `out`.

    Raises:
        FoveateError: bad input, in one sentence; all that can be known beforehand, before anything is written.
    """
    job = _make_job(method, checkpoint, out, stage, recipe, settings or {}, merge, resume)
    arguments = _training_arguments(job, progress)
    resume_from = _find_state(job, arguments, resume)
    data = open_data(job.recipe)
    model, processor = _open_checkpoint(job, arguments)
    collator = Collator(processor, job.recipe.max_length)
    if isinstance(data, LlavaExamples):
        data.leave_out_long(collator)
    num_steps = _plan_steps(job.recipe, len(data), arguments)
    _make_state(job, arguments)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=data,
        callbacks=[*_callbacks_of(job.recipe), *callbacks],
        recipe=job.recipe,
        num_steps=num_steps,
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)
    if progress and arguments.process_index == 0:
        _announce(job, trainer, data, num_steps)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except FoveateError as error:
        # A process that prepares batches passes its error on as a text with the traceback in front.
        raise FoveateError(str(error).strip().rpartition(f"{FoveateError.__name__}: ")[2]) from error
    trained = trainer.gather_trained()
    if arguments.process_index == 0:
        _write(job, trained, _facts(trainer, data, time.perf_counter() - started))
        if not keep_state:
            shutil.rmtree(job.state, ignore_errors=True)
    arguments.distributed_state.wait_for_everyone()
    return job.out


# Before training


def _make_job(
    method: str,
    checkpoint: str | Path,
    out: str | Path,
    stage: int,
    recipe: str | Path | None,
    settings: Mapping[str, Any],
    merge: bool,
    resume: bool,
) -> _Job:
    if method not in METHODS:
        raise FoveateError(f"There is no method '{method}': choose one of {', '.join(METHODS)}.")
    folder = find_checkpoint(checkpoint)
    config = read_config(folder)
    of_base = {backbone.model_type: backbone.base_model_type for backbone in pairs_of(method)}
    read = read_stage(method, stage, recipe, settings, of_base.get(str(config.get("model_type")), ""))
    compression = config.get("compression")
    found = compression.get("method") if isinstance(compression, dict) else None
    if found != method:
        is_what = f"a checkpoint of '{found}'" if found else "not compressed: convert it first"
        raise FoveateError(f"{checkpoint} is {is_what}; training '{method}' needs a checkpoint of '{method}'.")
    if (folder / ADAPTER_FOLDER).is_dir():
        raise FoveateError(f"{checkpoint} has adapters that are not merged: train on from a merged checkpoint.")
    fetch_weights(checkpoint, folder)
    read_shards(folder)  # a truncated file is told apart here, before a loader trips over it
    out = Path(os.path.abspath(Path(out).expanduser()))
    state = out.with_name(f"{out.name}.training")
    if read.precision == "auto":
        read = replace(read, precision=(_begun_precision(state) if resume else None) or _fast_precision())
    return _Job(method, str(checkpoint), folder, out, state, stage, read, merge)


def _fast_precision() -> str:
    """What "auto" is on the device that trains. float16, which older GPUs are faster in, would need scaled losses."""
    return "bf16" if fast_dtype("cpu" if _on_cpu() else "cuda") == torch.bfloat16 else "fp32"


def _begun_precision(state: Path) -> str | None:
    """The precision of a training that was broken off, which it keeps; `None` where nothing is known of one."""
    try:
        return json.loads((state / _RUN_FILE).read_bytes()).get("precision")
    except (OSError, ValueError):  # `_find_state` says what is wrong with it
        return None


def _on_cpu() -> bool:
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")


def _training_arguments(job: _Job, progress: bool) -> TrainingArguments:
    recipe, on_cpu = job.recipe, _on_cpu()
    checkpointing = not on_cpu if recipe.gradient_checkpointing is None else recipe.gradient_checkpointing
    # Older versions of Transformers don't clear what an earlier training or a launcher's configuration left here.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if recipe.precision == "bf16" else "no"
    activations: dict[str, Any] = {}
    if checkpointing:
        activations = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(job.state),
        use_cpu=on_cpu,
        bf16=recipe.precision == "bf16",
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        num_train_epochs=1,  # see TrainingOrder
        lr_scheduler_type=recipe.schedule,
        optim=OPTIMIZERS[recipe.optimizer],
        max_grad_norm=recipe.max_grad_norm or 0.0,
        weight_decay=recipe.weight_decay,
        learning_rate=max([*recipe.learning_rate.values(), *([recipe.lora.learning_rate] if recipe.lora else [])]),
        **activations,
        seed=recipe.seed,
        dataloader_num_workers=(1 if on_cpu else 4) if recipe.workers is None else recipe.workers,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # all get a gradient in every batch, see Collator
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=1,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        disable_tqdm=not progress,
    )
    if arguments.n_gpu > 1:  # in one process: nn.DataParallel would cut batches where images don't end
        arguments._n_gpu = 1
    return arguments


def _find_state(job: _Job, arguments: TrainingArguments, resume: bool) -> str | None:
    """The state to go on from, if that is wanted and there is one. Raises `FoveateError`."""
    record = job.record(arguments.world_size)  # joins the other processes
    require_free(job.out)
    if not resume:
        if job.state.exists():
            raise FoveateError(f"{job.state} holds a training that was broken off: go on with --resume, or remove it.")
        return None
    found = _last_state(job.state)
    _require_same(record, job.state)
    return found


def _make_state(job: _Job, arguments: TrainingArguments) -> None:
    """Makes the folder of the state, when every process has seen that it may be made."""
    arguments.distributed_state.wait_for_everyone()
    if arguments.process_index != 0:
        return
    record = json.dumps(job.record(arguments.world_size), indent=2)
    try:
        job.state.mkdir(parents=True, exist_ok=True)
        (job.state / _RUN_FILE).write_text(record + "\n", encoding="utf-8")
    except OSError as error:
        raise FoveateError(f"{job.state} can't be written: {error.strerror or error}.") from error


def _last_state(folder: Path) -> str | None:
    """The newest complete state in a folder; `None` if training was broken off before the first."""
    if not (folder / _RUN_FILE).is_file():
        raise FoveateError(f"There is nothing to resume: {folder} holds no training. Leave --resume out to begin one.")
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:  # the Trainer writes this file last
            complete.append((int(json.loads((path / TRAINER_STATE_NAME).read_bytes())["global_step"]), path))
        except (OSError, ValueError, KeyError):
            continue
    return str(max(complete)[1]) if complete else None


def _require_same(record: Mapping[str, Any], folder: Path) -> None:
    begun = json.loads((folder / _RUN_FILE).read_bytes())
    for key, value in record.items():
        if json.loads(json.dumps(value)) != begun.get(key):
            raise FoveateError(
                f"The training in {folder} began with {key} = {begun.get(key)}, not {value}: go on with the same, or "
                "remove the folder."
            )


def _open_checkpoint(job: _Job, arguments: TrainingArguments) -> tuple[nn.Module, Any]:
    """The model, ready to be trained, and its processor."""
    on_cpu = arguments.device.type == "cpu"
    attention = "eager" if on_cpu else None  # SDPA's backward is slow there
    model = _load_model(job, job.dtype, attn_implementation=attention)
    try:
        processor = AutoProcessor.from_pretrained(job.folder)
    except Exception as error:
        raise FoveateError(f"{job.checkpoint}'s processor can't be read: {first_sentence(error)}") from error
    # Nothing is generated, and keys and values of the past would only take memory.
    model.config.use_cache = model.config.get_text_config().use_cache = False
    set_seed(job.recipe.seed)
    _set_budget(job, model, processor)
    unfreeze(model, job.recipe)
    for objective in OBJECTIVES:
        if getattr(job.recipe, objective) is not None and objective != METHODS[job.method].objective:
            owners = "', '".join(name for name, method in METHODS.items() if method.objective == objective)
            raise FoveateError(f"The recipe has `{objective}`, which is of '{owners}', not of '{job.method}'.")
    if job.recipe.auxiliary is not None:
        VisualDistillation.prepare(model, job.recipe.auxiliary)
    return model, processor


def _load_model(job: _Job, dtype: torch.dtype | str, **kwargs: Any) -> Any:
    try:
        return AutoModelForImageTextToText.from_pretrained(job.folder, dtype=dtype, **kwargs)
    except Exception as error:  # loaders raise many kinds; a config can be wrong in any way
        raise FoveateError(
            f"{job.checkpoint} can't be loaded as an image-text model: {first_sentence(error)}"
        ) from error


def _set_budget(job: _Job, model: Any, processor: Any) -> None:
    if job.recipe.num_visual_tokens is None:
        return
    try:
        model.set_trained_budget(job.recipe.num_visual_tokens, processor)
    except ValueError as error:
        raise FoveateError(f"{job.checkpoint} can't be trained at this budget: {first_sentence(error)}") from error


def unfreeze(model: Any, recipe: StageRecipe) -> Any:
    """Freezes a model but for what a recipe trains, which becomes float32, and adds the recipe's adapters.

    Returns:
        PEFT's view of the model, for merging or saving the adapters; `None` without any. The model itself has them in
        place either way.

    Raises:
        FoveateError: the model has no module of a name in the recipe.
    """
    model.requires_grad_(False)
    peft_model = _add_lora(model, recipe.lora) if recipe.lora else None
    for name in recipe.learning_rate:
        _find_module(model, name).requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def _add_lora(model: Any, lora: LoraRecipe) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise FoveateError("Adapters need PEFT, which is not installed: pip install 'foveate[train]'.") from error
    target = _find_module(model, lora.target)
    linear = sorted({name.rpartition(".")[2] for name, part in target.named_modules() if isinstance(part, nn.Linear)})
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=rf"(.*\.)?{lora.target}\.(.*\.)?({'|'.join(linear)})",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _find_module(model: Any, name: str) -> nn.Module:
    """A part of the model without a head, by its name there, or the head."""
    try:
        return model.lm_head if name == "lm_head" else model.model.get_submodule(name)
    except AttributeError:
        parts = ", ".join([*(part for part, _ in model.model.named_children()), "lm_head"])
        raise FoveateError(f"The model has no module '{name}' to train: it has {parts}.") from None


def _plan_steps(recipe: StageRecipe, num_examples: int, arguments: TrainingArguments) -> int:
    """Steps of the optimizer; also tells `arguments`, and how many of them warm up."""
    per_step = _examples_per_step(recipe, arguments)
    num_steps = recipe.max_steps or max(1, math.ceil(recipe.epochs * num_examples / per_step))
    arguments.max_steps, arguments.warmup_steps = num_steps, math.ceil(recipe.warmup_ratio * num_steps)
    return num_steps


def _examples_per_step(recipe: StageRecipe, arguments: TrainingArguments) -> int:
    return recipe.batch_size * recipe.gradient_accumulation * arguments.world_size


def _announce(job: _Job, trainer: StageTrainer, data: Examples, num_steps: int) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"{METHODS[job.method].title}, stage {job.stage} of {job.checkpoint} → {job.out}", markup=False)
    console.print(show(job.recipe.to_dict()).rstrip(), style="dim", markup=False)
    counts = [sum(p.numel() for p in trainer.model.parameters() if p.requires_grad is flag) for flag in (True, False)]
    steps = f"{num_steps} steps in {dtype_name(job.dtype)} on {trainer.args.device.type}"
    console.print(f"{data.summary}; {steps}; {counts[0]:,} parameters train, {counts[1]:,} are frozen")


# Training


class StageTrainer(Trainer):
    """`Trainer` with a learning rate a module, an order of the data that survives a break, and states that hold only
    what trains.

    Args:
        recipe: the stage's.
        num_steps: steps of the optimizer.
        others: as in `Trainer`.
    """

    model: Any
    train_dataset: Any

    def __init__(self, *args: Any, recipe: StageRecipe, num_steps: int, **kwargs: Any):
        self.recipe, self.num_steps = recipe, num_steps
        super().__init__(*args, **kwargs)
        self.trained_names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if self.is_fsdp_enabled:
            # The layers of the language model are sharded one by one. A vision tower's must not be: methods run parts
            # of a layer, and FSDP gathers the weights of a layer only where all of it is called.
            layers = self.model.model.language_model.layers
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [type(layers[0]).__name__]

        self.objective: Distillation | VisualDistillation | None = None
        if recipe.distillation is not None:
            self.objective = Distillation(self.model, recipe.distillation)
        elif recipe.auxiliary is not None:
            self.objective = VisualDistillation(self.model, recipe.auxiliary)
        if self.objective is not None:
            self.model_accepts_loss_kwargs = False  # the loss is a mean already, whatever is accumulated

    def compute_loss(  # type: ignore[override] # newer versions name what older ones lack
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss = self.objective(model, inputs)
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.objective is not None and "loss" in logs:
            logs |= {name: round(float(term), 4) for name, term in self.objective.terms.items()}
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, *args: Any) -> Sampler:
        per_step = _examples_per_step(self.recipe, self.args)
        return TrainingOrder(len(self.train_dataset), self.num_steps * per_step, self.recipe.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's, with a group of parameters a module of the recipe, and one for the adapters."""
        rates = dict(self.recipe.learning_rate)
        if hasattr(self.model, AUXILIARY):  # as fast as the fastest
            rates[AUXILIARY] = self.args.learning_rate
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in (self.model if model is None else model).named_parameters():
            if parameter.requires_grad:
                groups.setdefault(_group_of(name, rates), []).append((name, parameter))
        if self.recipe.lora is not None:
            rates[_ADAPTERS] = self.recipe.lora.learning_rate
        if self.recipe.optimizer == "muon":
            by_rate = [{"named_params": groups[name], "lr": rates[name]} for name in rates]
            self.optimizer = MuonWithAdamW(by_rate, self.args.weight_decay)
            return self.optimizer
        cls, options = self.get_optimizer_cls_and_kwargs(self.args)
        options = {**options, "weight_decay": self.args.weight_decay}
        by_rate = [{"params": [p for _, p in groups[name]], "lr": rates[name]} for name in rates]
        self.optimizer = cls(by_rate, **options)
        return self.optimizer

    def gather_trained(self) -> dict[str, torch.Tensor]:
        """What trained, float32 on the CPU, by the names of the model's parameters; every process has to call it, and
        the main one gets it."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.process_index != 0:
            return {}
        return {name: state[name].detach().float().cpu() for name in self.trained_names}

    # A state to go on from: the Trainer's own, with the trained parameters in place of the whole model.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        trained = {name: state[name].detach().cpu().contiguous() for name in self.trained_names}
        save_file(trained, folder / _TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        _fill(self.model, load_file(Path(resume_from_checkpoint) / _TRAINED_FILE))


class _ClipValues(TrainerCallback):
    """Cuts every entry of the gradients, which the Trainer itself doesn't do."""

    def __init__(self, limit: float):
        self.limit = limit

    def on_pre_optimizer_step(self, args, state, control, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_value_(kwargs["model"].parameters(), self.limit)


class _LetNativeExpertIn(TrainerCallback):
    """Lets the say of LLaVA-Meteor's native expert rise from nothing to all of it."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def on_step_begin(self, args, state, control, **kwargs: Any) -> None:
        kwargs["model"].model.native_warmup = min(1.0, state.global_step / self.num_steps)


def _callbacks_of(recipe: StageRecipe) -> list[TrainerCallback]:
    found: list[TrainerCallback] = []
    if recipe.max_grad_value is not None:
        found.append(_ClipValues(recipe.max_grad_value))
    if recipe.native_warmup_steps is not None:
        found.append(_LetNativeExpertIn(recipe.native_warmup_steps))
    return found


_ADAPTERS = "lora"


def _group_of(name: str, modules: Mapping[str, float]) -> str:
    """The module of the recipe that a parameter belongs to; the innermost, where one is part of another."""
    if ".lora_" in name:
        return _ADAPTERS
    within = [module for module in modules if f".{module}." in f".{name}"]
    return max(within, key=len)


def _fill(model: nn.Module, trained: Mapping[str, torch.Tensor]) -> None:
    """Copies trained values into the parameters that they are of."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != trained.keys():
        odd = sorted(parameters.keys() ^ trained.keys())[0]
        raise FoveateError(f"The state of the training doesn't fit the model: {odd} is in one of them only.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])


# After training


def _facts(trainer: StageTrainer, data: Examples, seconds: float) -> dict[str, Any]:
    """What the log says of a run beside its recipe."""
    return {
        "examples": data.summary,
        "steps": trainer.state.global_step,
        "num_processes": trainer.args.world_size,
        "device": trainer.args.device.type,
        "precision": trainer.recipe.precision,
        "seconds": round(seconds, 1),  # since the last start
        # For the Trainer all of it is one epoch.
        "log": [{key: entry[key] for key in entry if key != "epoch"} for entry in trainer.state.log_history],
    }


def _write(job: _Job, trained: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Writes OUT: the checkpoint that training began with, and in it what was trained."""
    model = _load_model(job, "auto")
    processor = AutoProcessor.from_pretrained(job.folder)
    _set_budget(job, model, processor)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    peft_model = unfreeze(model, job.recipe)
    _fill(model, {name: value for name, value in trained.items() if not name.startswith(f"{AUXILIARY}.")})
    num_bytes = sum(shard.num_bytes for shard in read_shards(job.folder)) + _SMALL_FILES_BYTES
    with atomic_folder(job.out, num_bytes) as folder:
        if peft_model is not None and not job.merge:
            peft_model.active_peft_config.base_model_name_or_path = job.out.name
            peft_model.save_pretrained(folder / ADAPTER_FOLDER)
            (folder / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)  # an empty form; ours says how to load it
        if peft_model is not None:
            model = merge_lora(peft_model) if job.merge else peft_model.unload()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
        model.save_pretrained(folder)
        copy_small_files(job.folder, folder)
        if job.recipe.num_visual_tokens is not None:
            _write_budget(model, processor, folder)
        if (base := read_config(job.folder).get(BASE_FIELDS[0])) is not None:
            leave_base_out(folder, base)
        for path in folder.rglob("*.safetensors"):  # safetensors lets the owner alone read what it writes
            shutil.copymode(folder / "config.json", path)
        stages = {**earlier_stages(job.folder), job.stage: job.recipe.to_dict()}
        write_recipe(job.method, stages, folder / RECIPE_FILE)
        (folder / LOG_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if (job.state / "runs").is_dir():
            shutil.copytree(job.state / "runs", folder / "runs")
        base_name = read_base_name(job.folder)
        write_card(folder, base_name, job.folder)
        write_manifest(folder, base_name)


def _write_budget(model: Any, processor: Any, folder: Path) -> None:
    """Tells the config and the processor in a checkpoint's folder what they count with."""
    config = {**read_config(folder), "compression": model.config.compression.to_dict()}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as saved:
        processor.save_pretrained(saved)
        for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):
            if (Path(saved) / name).is_file():
                shutil.copyfile(Path(saved) / name, folder / name)
