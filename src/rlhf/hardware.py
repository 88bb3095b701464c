"""The hardware of a run: the device, and what `dtype: auto` means on it."""

import os

import torch

from rlhf.errors import InputError

# bfloat16 matrix instructions, by torch's names: AVX-512 and AMX on x86, ARM's.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
# Values of ONEDNN_MAX_CPU_ISA (formerly DNNL_MAX_CPU_ISA) that keep oneDNN from using them. It then
# emulates bfloat16, 6 to 100 times slower than float32.
ISA_WITHOUT_BFLOAT16 = (
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"),
)


def pick_device(device: str) -> torch.device:
    """Return the device that a configuration's `device` means; `auto` is cuda if any, else cpu.

    Raises:
        InputError: If torch has no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device: {device!r} cannot be used here ({reason}); try auto") from error
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the type that a configuration's `dtype` means on a device.

    `auto` is bfloat16 if the hardware multiplies matrices in it, else float32. It depends on what
    the hardware reports and is never measured: load must not change a result.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _cpu_multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: str, device: str) -> str:
    """Return the name of the type that a configuration's `dtype` means on its `device`.

    Raises:
        InputError: If torch has no such device here.
    """
    return str(pick_dtype(dtype, pick_device(device))).removeprefix("torch.")


def _cpu_multiplies_bfloat16() -> bool:
    """Return whether torch's matrix products use the CPU's own bfloat16 instructions.

    Only oneDNN provides them in torch, and macOS builds lack it.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    if limit.upper() in ISA_WITHOUT_BFLOAT16 or not torch.backends.mkldnn.is_available():
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BFLOAT16_INSTRUCTIONS)
