"""nanogspo/device.py: bf16 where it is fast, and a line where it is not."""

import os

import pytest
import torch

from nanogspo import device
from nanogspo.device import choose_device, choose_dtype, lacks_bf16


@pytest.fixture
def machine(monkeypatch):
    """A CPU with the units that a test names, on a machine without a GPU."""

    def make(name="x86_64", onednn=True, avx512_bf16=False, amx=False, mkldnn=True, gpu=(9, 0), **variables):
        for variable in device.CAPS:
            monkeypatch.delenv(variable, raising=False)
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(device.platform, "machine", lambda: name)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)

    return make


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"avx512_bf16": True}, ""),
        ({"amx": True}, ""),
        ({"name": "AMD64", "avx512_bf16": True}, ""),  # Windows' word
        ({"name": "aarch64"}, ""),
        ({"avx512_bf16": True, "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, ""),
        ({"amx": True, "ONEDNN_MAX_CPU_ISA": "AVX10_1_512_AMX"}, ""),
        ({}, "this CPU has no bf16 units"),  # oneDNN says yes to AVX-512 without them: it converts
        ({"onednn": False, "avx512_bf16": True}, "this CPU has no bf16 units"),
        ({"name": "aarch64", "onednn": False}, "this CPU has no bf16 units"),
        ({"name": "arm64", "mkldnn": False}, "this torch has no oneDNN"),  # Apple's
        ({"avx512_bf16": True, "ATEN_CPU_CAPABILITY": "avx2"}, "ATEN_CPU_CAPABILITY=avx2 keeps"),
        ({"avx512_bf16": True, "ATEN_CPU_CAPABILITY": "default"}, "ATEN_CPU_CAPABILITY=default keeps"),
        ({"avx512_bf16": True, "ONEDNN_MAX_CPU_ISA": "AVX2"}, "ONEDNN_MAX_CPU_ISA=AVX2 keeps"),
        ({"avx512_bf16": True, "ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, "ONEDNN_MAX_CPU_ISA=avx512_core_vnni keeps"),
        ({"amx": True, "DNNL_MAX_CPU_ISA": "AVX512_CORE"}, "DNNL_MAX_CPU_ISA=AVX512_CORE keeps"),
    ],
    ids=str,
)
def test_bf16_only_where_the_cpu_multiplies_it(machine, facts, reason, capsys):
    machine(**facts)
    assert lacks_bf16().startswith(reason) and bool(lacks_bf16()) == bool(reason)
    assert choose_dtype("auto", "cpu") == ("fp32" if reason else "bf16")
    said = capsys.readouterr().err
    assert said.startswith(f"computing in fp32: {reason}") and said.count("\n") == 1 if reason else said == ""


def test_what_is_asked_for_is_given_and_what_is_stored_is_kept(machine, capsys):
    machine()
    assert [choose_dtype(dtype, "cpu") for dtype in ("bf16", "fp32")] == ["bf16", "fp32"]
    assert [choose_dtype("auto", "cpu", stored) for stored in (torch.float32, torch.float16)] == ["fp32", "fp32"]
    assert [choose_dtype("auto", "cuda", stored) for stored in (torch.float32, torch.bfloat16)] == ["bf16", "bf16"]
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="got --device cuda, but torch sees no GPU; want --device cpu"):
        choose_device("cuda")
    assert capsys.readouterr() == ("", "")


def test_a_gpu_without_bf16_units_computes_in_fp32_or_not_at_all(machine):
    machine(gpu=(7, 5))
    assert choose_dtype("fp32", "cuda") == "fp32"
    for dtype in ("auto", "bf16"):
        with pytest.raises(ValueError, match=f"got --dtype {dtype} on a GPU of sm_75, without .*; want --dtype fp32$"):
            choose_dtype(dtype, "cuda")
    machine(gpu=(8, 0))
    assert choose_dtype("auto", "cuda") == choose_dtype("bf16", "cuda") == "bf16"


def test_bf16_products_are_summed_in_fp32():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.allow_bf16_reduced_precision_reduction = True
        choose_device("cpu")
        assert matmul.allow_bf16_reduced_precision_reduction is False
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.isa
def test_this_machine_without_a_cap_and_with_one(monkeypatch):
    """Under a cap on instructions, as CI sets it, bf16 is never chosen; what libraries found of it stays as it was."""
    capped = any("avx2" in os.environ.get(name, "").lower() for name in device.CAPS)
    assert choose_dtype("auto", "cpu") == ("fp32" if capped or lacks_bf16() else "bf16")
    for name in device.CAPS:
        monkeypatch.delenv(name, raising=False)
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not units and device.platform.machine().lower() in ("x86_64", "amd64"):
        assert choose_dtype("auto", "cpu") == "fp32"
    for name in device.CAPS:
        with monkeypatch.context() as patched:
            patched.setenv(name, "AVX2")
            assert choose_dtype("auto", "cpu") == "fp32" and lacks_bf16().startswith(f"{name}=AVX2 keeps")
