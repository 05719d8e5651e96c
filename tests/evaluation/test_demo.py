"""The demo: the process without foveate computes in what it is told, and the text says in what."""

import subprocess

import pytest

from foveate.evaluation import demo


@pytest.mark.parametrize("fast", ["bfloat16", "float32"])
def test_the_stranger_computes_in_what_the_processor_is_fast_in(fast, devices, tmp_path, monkeypatch, capfd):
    run = subprocess.run

    def run_and_say_the_dtype(command, **options):
        python, option, code, *arguments = command
        return run([python, option, code + "print('computed in', model.dtype)", *arguments], **options)

    monkeypatch.setattr(demo.subprocess, "run", run_and_say_the_dtype)
    devices.compute_fast_in(fast)
    demo.main(tmp_path / "demo")
    printed = capfd.readouterr().out
    assert f"Asked in {fast} by a process without foveate:" in printed
    assert f"computed in torch.{fast}\n" in printed
    assert "What is at the middle left?  ->  square" in printed
    assert (tmp_path / "demo" / "kept.png").is_file()
