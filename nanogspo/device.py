"""What a run computes with: the device, and the dtype that the device is fast in.

    device auto     cuda where torch sees a GPU, else cpu
    dtype auto      bf16, as published checkpoints are stored; fp32 on a CPU that cannot multiply bf16 numbers

A GPU older than sm_80 (T4, V100) has no bf16 units either: there only --dtype fp32 is accepted.

Tests: tests/test_device.py
"""

import os
import platform
import re
import sys

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_device(device: str) -> str:
    """ "auto", "cpu" or "cuda" -> "cpu" or "cuda". Raises ValueError for cuda without a GPU.

    Also tells cuBLAS to keep the sums of bf16 products in fp32: by default it may add the parts of a product that it
    splits along K in bf16.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("got --device cuda, but torch sees no GPU; want --device cpu or a CUDA build of torch")
    return device


def choose_dtype(dtype: str, device: str, stored: torch.dtype = torch.bfloat16) -> str:
    """ "auto", "bf16" or "fp32" -> "bf16" or "fp32". Where a CPU lacks bf16 units, stderr says so; where a GPU does, a
    ValueError.

    stored  dtype of the checkpoint: on a CPU only bf16 weights stay bf16. (fp16 becomes fp32: no digit is lost, and few
            CPUs multiply it.) A GPU computes in bf16 whatever the file holds
    """
    if device == "cuda" and dtype != "fp32" and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        raise ValueError(f"got --dtype {dtype} on a GPU of sm_{major}{minor}, without bf16 units; want --dtype fp32")
    if dtype != "auto":
        return dtype
    if device == "cuda":
        return "bf16"
    if stored != torch.bfloat16:
        return "fp32"
    reason = lacks_bf16()
    if reason:
        print(f"computing in fp32: {reason}; --dtype bf16 halves the weights' memory and is slower", file=sys.stderr)
    return "fp32" if reason else "bf16"


def lacks_bf16() -> str:
    """Why bf16 is slow on this CPU; "" where it multiplies bf16 numbers itself, by AVX512-BF16, AMX or ARM's BF16.

    Without such units torch multiplies bf16 matrices several times more slowly than fp32 ones: a GSPO rollout of a 135M
    model and its four updates took 200 s in bf16 and 25 s in fp32 on 2 cores with AVX2. Two environment
    variables hold torch and oneDNN to older instructions, and then the units are not used either.
    """
    for name, enough in CAPS.items():
        if (cap := os.environ.get(name, "")) and not re.search(enough, cap, re.IGNORECASE):
            return f"{name}={cap} keeps torch from the CPU's bf16 units"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN, which multiplies bf16 on CPUs"
    units = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if platform.machine().lower() in ("x86_64", "amd64"):  # there oneDNN also says yes to AVX-512 alone: it converts
        units = units and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "" if units else "this CPU has no bf16 units (AVX512-BF16, AMX or ARM's BF16)"


# environment variable -> what its value must contain for bf16 units to be used
ONEDNN = "bf16|fp16|amx|avx10|sve|all|default"
CAPS = {"ATEN_CPU_CAPABILITY": "avx512|amx|sve", "ONEDNN_MAX_CPU_ISA": ONEDNN, "DNNL_MAX_CPU_ISA": ONEDNN}
