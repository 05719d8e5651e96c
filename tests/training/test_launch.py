"""Training on two processes: the same weights as on one with batches of twice the size."""

import json
import os
import socket
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import TrainerCallback

import foveate.training
from foveate import convert, train

from ..helpers.tiny_checkpoints import write_llava
from ..helpers.training_runs import QUICK


WEIGHTS = "model.safetensors"
CONFIGS = os.path.join(os.path.dirname(foveate.training.__file__), "launch")
SETTINGS = {**QUICK, "data": "lab:8", "max_steps": 3, "lora.r": 2, "lora.dropout": 0.0}


def config(name):
    return os.path.join(CONFIGS, f"{name}.yaml")


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    settings = {**SETTINGS, "batch_size": 4, "learning_rate.question_projector": 1e-3}
    out = tmp_path_factory.mktemp("alone") / "out"
    return load_file(train("qg-vtc", tiny, out, 2, settings=settings, progress=False) / WEIGHTS)


def require_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5, msg=name)


def launch(method, checkpoint, out, *words):
    """`foveate train` on two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config("ddp"), "--num_processes", 2]
    command += ["--main_process_port", free_port(), "-m", "foveate", "train", method, checkpoint, out, *words]
    result = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_ddp_under_accelerate_launch(tiny, alone, tmp_path):
    words = ["--stage", 2, "--data", "lab:8", "--max-steps", 3, "--batch-size", 2, "--dtype", "float32"]
    changes = ["lora.r=2", "lora.dropout=0", "workers=0", "learning_rate.question_projector=1e-3"]
    words += [word for change in changes for word in ("--set", change)]
    result = launch("qg-vtc", tiny, tmp_path / "out", *words)
    assert result.stdout.count("Wrote ") == 1, "one process writes and says so"
    assert result.stderr.count("QG-VTC, stage 2") == 1
    require_equal(load_file(tmp_path / "out" / WEIGHTS), alone)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_distillation_under_accelerate_launch(instructions, tmp_path):
    """Teacher and student are one model, in which DDP waits for the gradients of the student alone."""
    base = write_llava(tmp_path / "base", dtype=torch.float32)
    checkpoint = convert(base, tmp_path / "checkpoint", "metacompress", settings={"key_width": 16}, keep_ratio=0.5)
    samples = [sample for sample in json.loads(instructions.read_text()) if "image" in sample]
    for sample in samples:  # answers of one length, as the loss is a mean over their tokens
        sample["conversations"] = sample["conversations"][:2]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(samples))
    settings = {**QUICK, "data": str(data), "images": str(instructions.parent), "max_steps": 3}
    settings |= {"learning_rate.compressor": 1.0, "batch_size": 4}
    alone = load_file(
        train("metacompress", checkpoint, tmp_path / "alone", settings=settings, progress=False) / WEIGHTS
    )
    words = ["--images", instructions.parent, "--data", data, "--max-steps", 3, "--batch-size", 2, "--dtype", "float32"]
    words += ["--set", "workers=0", "--set", "learning_rate.compressor=1.0"]
    launch("metacompress", checkpoint, tmp_path / "out", *words)
    require_equal(load_file(tmp_path / "out" / WEIGHTS), alone)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that used CUDA can't be forked")
def test_fsdp(tiny, alone, tmp_path):
    """Every weight in two halves. What launch/fsdp.yaml sets up is real here, but for one thing: accelerate shards on
    GPUs only, so the processes say that they are on some."""
    arguments = launch_command_parser().parse_args(["--config_file", config("fsdp"), "script"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    with patch.dict(os.environ, environment):
        torch.multiprocessing.start_processes(_train_sharded, (tiny, tmp_path / "out"), nprocs=2, start_method="fork")
    require_equal(load_file(tmp_path / "out" / WEIGHTS), alone)


def _train_sharded(rank, tiny, out):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    original = PartialState.__init__

    def say_gpu(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.extend(type(parameter.data).__name__ for parameter in model.parameters())

    settings = {**SETTINGS, "batch_size": 2, "learning_rate.question_projector": 1e-3}
    with patch.object(PartialState, "__init__", say_gpu):
        train("qg-vtc", tiny, out, 2, settings=settings, progress=False, callbacks=[Look()])
    assert set(seen) == {"DTensor"}, "it was sharded indeed"


def test_accelerate_reads_the_configuration_for_deepspeed():
    """As far as that goes without deepspeed, which needs a GPU."""
    arguments = launch_command_parser().parse_args(["--config_file", config("deepspeed_zero2"), "script"])
    read, defaults, _ = _validate_launch_command(arguments)
    assert read.use_deepspeed
    assert read.zero_stage == 2, "the paper's"
    assert defaults.deepspeed_config.keys() <= vars(read).keys(), "options that accelerate knows"


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
