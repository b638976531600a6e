from __future__ import annotations

import json

import pytest
import torch

from moe_fx import hardware
from moe_fx.hardware import CALIBRATION, catalogue, detect

from .golden import DEVICES

FILES = sorted(CALIBRATION.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_description_is_complete_and_says_where_its_numbers_come_from(path) -> None:
    data, device = json.loads(path.read_text()), catalogue()[path.stem]
    assert len(data["source"]) > 30
    assert device.kind in {"cpu", "cuda", "rocm", "xpu", "tpu"}
    assert {"bfloat16", "float16", "float32", "float64"} == set(dict(device.peaks))
    assert 2**32 < device.memory_bytes < 2**41
    assert 1e9 < device.bandwidth < 1e14
    assert 1e-7 < device.launch_s < 1e-4
    assert device.peak("int8") == min(p for _, p in device.peaks)


def test_the_described_machines() -> None:
    assert set(DEVICES) <= set(catalogue())


def test_detect_this_machine() -> None:
    found = detect(torch.device("cpu"))
    assert found.kind == "cpu"
    assert found.units == torch.get_num_threads()
    assert ("torch.grouped_mm" in found.installed) == hasattr(torch.nn.functional, "grouped_mm")
    assert found == detect(torch.device("cpu"))


ZEN5 = {
    "vendor_id": "AuthenticAMD",
    "cpu family": "26",
    "model": "2",
    "model name": "AMD EPYC",
    "flags": "avx512f avx512_bf16",
}


@pytest.mark.parametrize(
    ("threads", "like", "bandwidth", "peak"),
    [(1, "zen5_epyc_2", 0.5, 0.5), (2, "zen5_epyc_2", 1, 1), (4, "zen5_epyc_2", 1, 2), (128, "zen5_epyc_64", 1, 2)],
)
def test_detect_scales_the_nearest_calibration(monkeypatch, threads: int, like: str, bandwidth: float, peak: float):
    monkeypatch.setattr(hardware, "_cpuinfo", lambda: ZEN5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    found, described = detect(torch.device("cpu")), catalogue()[like]
    assert found.units == threads
    assert found.arch == "avx512_bf16"
    assert found.bandwidth == bandwidth * described.bandwidth
    assert found.peak("float32") == peak * described.peak("float32")


@pytest.mark.parametrize(
    ("capability", "flags", "arch"),
    [
        ("AVX512", "avx512f amx_tile avx512_bf16", "amx"),
        ("AVX512", "avx512f", "avx512"),
        ("AVX2", "avx512f avx512_bf16", "avx2"),  # ATEN_CPU_CAPABILITY=avx2
        ("DEFAULT", "fp asimd", "neon"),
        ("DEFAULT", "", "default"),
        ("SVE256", "asimd sve", "sve256"),
    ],
)
def test_instruction_sets(monkeypatch, capability: str, flags: str, arch: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert hardware._cpu_arch(flags) == arch


def test_an_unknown_cpu_gets_low_numbers(monkeypatch) -> None:
    monkeypatch.setattr(hardware, "_cpuinfo", dict)
    found, generic = detect(torch.device("cpu")), catalogue()["generic_cpu"]
    assert found.bandwidth <= generic.bandwidth
    assert found.name == generic.name


@pytest.mark.parametrize(
    ("kind", "name", "like"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", "h100"),
        ("cuda", "NVIDIA H200", "h200"),
        ("cuda", "NVIDIA B200", "b200"),
        ("cuda", "NVIDIA A100-SXM4-80GB", "a100"),
        ("cuda", "NVIDIA GeForce RTX 5090", "rtx5090"),
        ("cuda", "NVIDIA T1000", "generic_cuda"),
        ("rocm", "AMD Instinct MI300X", "mi300x"),
        ("rocm", "AMD Radeon", "generic_rocm"),
    ],
)
def test_gpus_are_found_by_name(kind: str, name: str, like: str) -> None:
    assert hardware._closest(kind, name, 100) == catalogue()[like]


def test_another_kind_of_device_is_described_with_low_numbers() -> None:
    found = detect(torch.device("meta"))
    assert (found.kind, found.bandwidth) == ("meta", catalogue()["generic_cpu"].bandwidth)
