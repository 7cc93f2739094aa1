from __future__ import annotations

import json
import platform
from importlib import metadata

import pytest
import torch

from gradbench.environment import fingerprint, resolve_device
from gradbench.errors import DeviceError

CPU = torch.device("cpu")


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


class TestResolveDevice:
    @pytest.mark.usefixtures("no_accelerator")
    @pytest.mark.parametrize("name", ["auto", "cpu"])
    def test_a_plain_machine_has_its_cpu(self, name: str) -> None:
        assert resolve_device(name) == (CPU, None)

    @pytest.mark.usefixtures("two_gpus")
    @pytest.mark.parametrize(
        ("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
    )
    def test_a_gpu_has_a_number(self, name: str, index: int) -> None:
        assert resolve_device(name) == (torch.device("cuda", index), None)

    @pytest.mark.usefixtures("two_gpus")
    def test_the_cpu_can_be_had_beside_gpus(self) -> None:
        assert resolve_device("cpu") == (CPU, None)

    @pytest.mark.usefixtures("two_gpus")
    def test_one_gpu_too_many_is_refused(self) -> None:
        with pytest.raises(DeviceError, match="one of 2 CUDA devices, found 'cuda:2'"):
            resolve_device("cuda:2")

    @pytest.mark.usefixtures("no_accelerator")
    @pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
    def test_what_is_not_there_is_refused_with_a_way_out(self, name: str) -> None:
        with pytest.raises(DeviceError, match="Use --device cpu"):
            resolve_device(name)

    @pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "cuda:²", "cpu:0"])
    def test_a_name_of_nothing_is_refused(self, name: str) -> None:
        with pytest.raises(DeviceError, match="Expected a device auto, cpu, cuda, cuda:N or mps"):
            resolve_device(name)

    def test_the_nearest_name_is_shown(self) -> None:
        with pytest.raises(DeviceError, match="Did you mean 'cuda:0'"):
            resolve_device("cude:0")

    def test_mps_comes_with_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        device, warning = resolve_device("mps")
        assert device.type == "mps"
        assert warning is not None
        assert "not tested" in warning


class TestFingerprint:
    def test_says_all_that_bits_may_depend_on(self) -> None:
        found = fingerprint(CPU, channels_last=False)
        assert found == {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "timm": metadata.version("timm"),
            "numpy": metadata.version("numpy"),
            "device": platform.machine(),
            "cuda": None,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "compile": False,
            "memory_format": "contiguous",
            "tf32": False,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "world_size": 1,
        }
        assert json.loads(json.dumps(found)) == found

    def test_says_the_memory_format(self) -> None:
        assert fingerprint(CPU, channels_last=True)["memory_format"] == "channels-last"

    @pytest.mark.usefixtures("two_gpus")
    def test_says_which_gpu_and_that_a_run_on_it_uses_deterministic_kernels(self) -> None:
        found = fingerprint(torch.device("cuda", 1), channels_last=True)
        assert found["device"] == "GPU 1"
        assert found["deterministic"] is True
