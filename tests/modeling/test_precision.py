"""Which dtype is chosen where: by what the processor can do, what oneDNN may use and how the checkpoint is stored."""

import contextlib
import os
import platform
import subprocess
import sys

import pytest
import torch

from foveate.modeling.core.precision import dtype_name, fast_dtype


HERE = fast_dtype("cpu")  # in the environment that the tests were started in
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

#: Processors by what `torch.cpu.get_capabilities` says of them.
PROCESSORS = {
    "AVX2 alone": {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False},
    "AVX2, which converts": {"architecture": "x86_64", "avx2": True, "avx_ne_convert": True},
    "AVX-512": {"architecture": "x86_64", "avx512_f": True, "avx512_vnni": True, "avx512_bf16": False},
    "AVX-512 BF16": {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "avx512_fp16": False},
    "AMX": {"architecture": "x86_64", "avx512_f": True, "amx_bf16": True, "avx512_fp16": True},
    "AVX10": {"architecture": "x86_64", "avx10_1": True},
    "ARM with BF16": {"architecture": "arm64", "neon": True, "fp16_arith": True, "bf16": True},
    "ARM with FP16": {"architecture": "arm64", "neon": True, "fp16_arith": True, "bf16": False},
    "another": {"architecture": "ppc64"},
}


@pytest.fixture(autouse=True)
def unlimited(monkeypatch):
    """oneDNN is there and may use all that the processor has, whatever the environment of the tests says."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


def be(monkeypatch, processor):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: PROCESSORS[processor], raising=False)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("AVX2 alone", {None: FP32, BF16: FP32, FP16: FP32, FP32: FP32, FP64: FP64}),
        ("AVX2, which converts", {None: FP32, BF16: FP32, FP16: FP32}),
        ("AVX-512", {None: FP32, BF16: FP32, FP16: FP32}),
        ("AVX-512 BF16", {None: BF16, BF16: BF16, FP16: BF16, FP32: FP32, FP64: FP64}),
        ("AMX", {None: BF16, BF16: BF16, FP16: FP16, FP32: FP32}),
        ("AVX10", {None: BF16, BF16: BF16, FP16: FP16, FP32: FP32}),
        ("ARM with BF16", {None: BF16, BF16: BF16, FP16: FP16, FP32: FP32}),
        ("ARM with FP16", {None: FP32, BF16: FP32, FP16: FP16, FP32: FP32}),
        ("another", {None: FP32, BF16: FP32, FP16: FP32, FP32: FP32}),
    ],
)
def test_a_processor_computes_in_what_it_has_instructions_for(processor, expected, monkeypatch):
    be(monkeypatch, processor)
    assert {stored: fast_dtype("cpu", stored) for stored in expected} == expected
    assert {stored: fast_dtype(torch.device("cpu"), stored) for stored in expected} == expected


@pytest.mark.parametrize(
    ("limit", "of_bfloat16", "of_float16"),
    [
        ("AVX2", FP32, FP32),
        ("avx2", FP32, FP32),  # oneDNN reads it so too
        ("AVX2_VNNI_2", FP32, FP32),
        ("AVX512_CORE", FP32, FP32),
        ("AVX512_CORE_VNNI", FP32, FP32),
        ("AVX512_CORE_BF16", BF16, BF16),
        ("AVX10_1_512", BF16, FP16),
        ("ALL", BF16, FP16),
        ("no such name", BF16, FP16),
        ("", BF16, FP16),
    ],
)
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_what_onednn_may_not_use_does_not_count(variable, limit, of_bfloat16, of_float16, monkeypatch):
    be(monkeypatch, "AMX")
    monkeypatch.setenv(variable, limit)
    assert (fast_dtype("cpu", BF16), fast_dtype("cpu", FP16)) == (of_bfloat16, of_float16)


def test_onednns_own_variable_comes_before_its_older_name(monkeypatch):
    be(monkeypatch, "AMX")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert fast_dtype("cpu") == FP32
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert fast_dtype("cpu") == BF16


def test_without_onednn_instructions_do_not_help(monkeypatch):
    be(monkeypatch, "AMX")
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert (fast_dtype("cpu"), fast_dtype("cpu", FP16)) == (FP32, FP32)
    assert fast_dtype("cpu") == BF16
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert (fast_dtype("cpu"), fast_dtype("cpu", FP16)) == (FP32, FP32)


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({}, {None: FP32, BF16: FP32, FP16: FP32}),
        ({"_is_avx512_bf16_supported"}, {None: BF16, BF16: BF16, FP16: BF16}),
        ({"_is_amx_tile_supported"}, {None: BF16, BF16: BF16, FP16: BF16}),
        ({"_is_amx_tile_supported", "_is_amx_fp16_supported"}, {None: BF16, BF16: BF16, FP16: FP16}),
    ],
)
def test_an_older_pytorch_is_asked_as_it_can_be(has, expected, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda answer=name in has: answer)
    assert {stored: fast_dtype("cpu", stored) for stored in expected} == expected


@pytest.mark.parametrize(
    ("has_bfloat16", "expected"),
    [
        (True, {None: BF16, BF16: BF16, FP16: FP16, FP32: FP32}),
        (False, {None: FP16, BF16: FP16, FP16: FP16, FP32: FP32}),
    ],
)
def test_a_gpu_is_asked_for_bfloat16_that_is_not_emulated(has_bfloat16, expected, monkeypatch):
    asked, current = [], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    def is_supported(including_emulation=True):
        asked.append(current[-1])
        return including_emulation or has_bfloat16

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert {stored: fast_dtype("cuda:1", stored) for stored in expected} == expected
    assert set(asked) == {torch.device("cuda:1")}, "the device that was named, not the current one"


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_accelerators_take_bfloat16_and_keep_float16(device):
    found = {stored: fast_dtype(device, stored) for stored in (None, BF16, FP16, FP32)}
    assert found == {None: BF16, BF16: BF16, FP16: FP16, FP32: FP32}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the limit is one of x86's")
def test_pytorch_itself_has_no_fast_bfloat16_under_the_limit():
    """Which is what the demo and the benchmarks are run under to see what they do on a processor without it."""
    code = "from torch import ops; from foveate.modeling.core.precision import *; "
    code += "print(fast_dtype('cpu'), ops.mkldnn._is_mkldnn_bf16_supported())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["torch.float32", "False"]


def test_where_it_says_bfloat16_pytorch_multiplies_it_by_onednn():
    if HERE == BF16:
        assert torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_a_name_is_as_commands_take_it():
    assert [dtype_name(dtype) for dtype in (BF16, FP16, FP32)] == ["bfloat16", "float16", "float32"]
