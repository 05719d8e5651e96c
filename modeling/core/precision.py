"""Which floating-point type a device computes fast in: what "auto" means wherever foveate takes a dtype.

PyTorch multiplies 16-bit matrices on a CPU by oneDNN where the processor has instructions for them. Where it has none,
the product of two matrices takes tens of times as long as in float32, and a checkpoint is best computed in float32,
whatever it is stored in. Checkpoints don't carry this file: it is for whoever chooses a dtype before loading one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch


#: Instructions that multiply 16-bit numbers, by their names in `torch.cpu.get_capabilities`. AVX-NE-CONVERT is not
#: among them: it only converts. ARM's `sve_bf16` is not: PyTorch asks for `bf16`, which whoever has the first has too.
_FOR_BFLOAT16 = ("avx512_bf16", "amx_bf16", "avx10_1", "avx10_2", "bf16")
_FOR_FLOAT16 = ("avx512_fp16", "amx_fp16", "avx10_1", "avx10_2", "fp16_arith")

#: Values of oneDNN's ONEDNN_MAX_CPU_ISA that keep it from using those instructions.
_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
_WITHOUT_FLOAT16 = (*_WITHOUT_BFLOAT16, "AVX512_CORE_BF16")


def fast_dtype(device: str | torch.device, stored: torch.dtype | None = None) -> torch.dtype:
    """The floating-point type to compute in on a device.

    - CPU: bfloat16 where the processor has instructions for it (AVX-512 BF16, AMX or AVX10; BF16 on ARM) and PyTorch
      multiplies by oneDNN, which may use them; else float32. ONEDNN_MAX_CPU_ISA counts: with `AVX2` there are none.
    - CUDA: bfloat16 from compute capability 8.0 on, and by ROCm; else float16.
    - MPS and every other accelerator: bfloat16.

    Args:
        device: where the model will run.
        stored: the dtype of a checkpoint. It is kept where the device computes fast in it, float16 too (on a CPU that
            takes AVX512-FP16, AMX-FP16, AVX10 or ARM's FP16), and where it is float32 or wider: nothing is narrowed.

    Returns:
        `stored` where it is kept, else the device's own of the list.
    """
    device = torch.device(device)
    preferred, *others = _fast_dtypes(device)
    if stored is not None and (stored in (preferred, *others) or stored.itemsize >= torch.float32.itemsize):
        return stored
    return preferred


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → "bfloat16", as commands, results and `from_pretrained` have it."""
    return str(dtype).removeprefix("torch.")


def _fast_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What a device computes fast in, beside float32 and wider; first what it is best at, which may be float32."""
    if device.type == "cpu":
        # float16 is never preferred here: its range is too small for what others store in bfloat16.
        best = torch.bfloat16 if _cpu_has(_FOR_BFLOAT16, _WITHOUT_BFLOAT16) else torch.float32
        return (best, torch.float16) if _cpu_has(_FOR_FLOAT16, _WITHOUT_FLOAT16) else (best,)
    if device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return (torch.float16,)
    return torch.bfloat16, torch.float16


def _cpu_has(instructions: tuple[str, ...], ruled_out: tuple[str, ...]) -> bool:
    """Whether the processor has one of these instructions, and oneDNN is there and may use it."""
    mkldnn = torch.backends.mkldnn  # oneDNN's name in PyTorch; not built for Apple's processors
    # oneDNN reads the first of the two that is not empty, in either case.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if not (mkldnn.is_available() and mkldnn.enabled) or limit.upper() in ruled_out:
        return False
    capabilities = _cpu_capabilities()
    return any(capabilities.get(name, False) for name in instructions)


def _cpu_capabilities() -> Mapping[str, Any]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    # PyTorch 2.9 has no public function for it, and none at all for ARM, which counts as without: float32 is slow
    # nowhere. Every processor with AMX has its bfloat16.
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "amx_fp16": torch.cpu._is_amx_fp16_supported(),
    }
