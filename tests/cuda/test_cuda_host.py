"""What the host code makes of a GPU, on a stand-in for the CUDA driver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tools.cuda_host import run

pytestmark = pytest.mark.needs_nvcc

LAUNCH_FAILED = 719
CALL_ROPE = "answer = host.call_rope().decode()"
ROPE_LAUNCHES = "answer = [host.call_rope().decode(), *launches()]"


def launched(capability: tuple[int, int] = (9, 0), call: str = "attention(2, 8192, 1024, 3, 64)", **how: Any) -> str:
    """Names of the kernels of a call, each without its type."""
    answer = run(f"failed = {call}\nanswer = [failed, *launches()]", capability=capability, **how)
    assert isinstance(answer[0], float), answer[0]
    return " ".join(line[0].partition("IN")[0] for line in answer[1:])


@pytest.mark.parametrize("capability", [(5, 0), (7, 5)])
def test_a_gpu_that_is_too_old_is_turned_away_before_a_launch(capability: tuple[int, int]) -> None:
    has = ".".join(map(str, capability))
    expected = f"anchor_attention: the GPU is too old: compute capability 8.0 (Ampere) is needed, cuda:3 has {has}"
    assert run(ROPE_LAUNCHES, capability=capability) == [expected]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)])
def test_newer_gpus_are_launched_on(capability: tuple[int, int]) -> None:
    """On the stream and in the context of the tensor's device."""
    error, (name, *sizes) = run(ROPE_LAUNCHES, capability=capability)
    assert error == "" and "4rope" in name and sizes == ["1", "256", "0", "0x1003", "0xc003"]


def test_hopper_runs_its_own_kernels_and_others_those_for_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper, every = "_ZN16anchor_attention4sm9017attention_forward", "_ZN16anchor_attention4sm8017attention_forward"
    assert launched((9, 0)) == hopper
    assert launched((8, 6)) == every
    assert launched((12, 0)) == every
    monkeypatch.setenv("ANCHOR_ATTENTION_CUDA_KERNELS", "sm80")
    assert launched((9, 0)) == every


def test_a_launch_that_fails_says_which_and_why() -> None:
    answer = run(CALL_ROPE, launch_result=LAUNCH_FAILED)
    assert answer == "anchor_attention: rope failed on the GPU: unspecified launch failure (cuLaunchKernel)"


@pytest.mark.parametrize("mode", ["RTLD_LOCAL", "RTLD_GLOBAL"])
def test_the_stream_is_found_however_torch_was_loaded(mode: str) -> None:
    """Python loads torch's libraries locally; a program that links them has their symbols everywhere."""
    assert run(ROPE_LAUNCHES, torch_cuda=mode)[1][4] == "0x1003"


def test_a_torch_without_cuda_is_named() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    assert run(CALL_ROPE, torch_cuda="") == "anchor_attention: this torch is built without CUDA"


@pytest.mark.parametrize(("version", "release"), [(11080, "11.8"), (12000, "12.0")])
def test_a_driver_that_is_too_old_is_named(version: int, release: str) -> None:
    answer = run(ROPE_LAUNCHES, version=version)
    assert answer == [
        "anchor_attention: rope failed on the GPU: the NVIDIA driver is too old: "
        f"it is for CUDA {release}, and the GPU code of this library needs one for CUDA 12.1 or newer (530 or newer)"
    ]


@pytest.mark.parametrize("version", [12010, 12040, 12080, 13000, 13020])
def test_drivers_of_cuda_12_and_13_load_the_kernels(version: int) -> None:
    assert "attention_forward" in launched(version=version)


def test_a_machine_without_a_driver_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    answer = run(CALL_ROPE, driver=False)
    assert answer == (
        "anchor_attention: rope failed on the GPU: there is no NVIDIA driver: libcuda.so.1 can't be loaded"
    )


@pytest.mark.parametrize("context", [0, 0xBEEF])
def test_a_thread_keeps_its_context(context: int) -> None:
    """One that torch has not launched from has none; a library of somebody else may have set another."""
    code = f"driver.set_context_of_thread({context})\n{ROPE_LAUNCHES}\nanswer += [driver.context_of_thread()]"
    _, launch, after = run(code)
    assert launch[5] == "0xc003" and after == (context or None)


def test_the_first_call_may_be_part_of_a_capture() -> None:
    """Kernels are loaded then, too; what the thread may do otherwise during a capture stays as it was."""
    code = "answer = [driver.set_capturing(1), attention(2, 1024, 1024, 3, 64), driver.capture_mode_of_thread()]"
    _, time, mode = run(code)
    assert isinstance(time, float), time
    assert mode == 0


def test_what_a_call_finds_out_is_kept_for_the_next() -> None:
    """Images, attributes of kernels and tensor maps of the same memory."""
    counts = "[driver.loaded_images(), driver.attributes_set(), driver.encoded_maps()]"
    call = "attention(2, 8192, 1024, 3, 64)"
    code = f"answer = [{call}, {counts}, {call}, {counts}, attention(2, 4096, 1024, 3, 64), {counts}]"
    _, first, _, second, _, other = run(code)
    assert first == second == [1, 1, 3]
    assert other[:2] == first[:2] and other[2] == 4  # the outputs are fewer; keys and values are those


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("head_dim", [48, 64, 96, 128])
def test_every_launch_gets_the_shared_memory_that_it_asks_for(backward: bool, head_dim: int) -> None:
    """The stand-in refuses what was not asked for, or more than a block of Hopper has."""
    assert "sm90" in launched(call=f"attention(2, 1024, 1024, 3, {head_dim}, {backward})")


def test_long_tables_are_uploaded_before_they_are_read() -> None:
    kernels = launched(call="attention(3000, 8, 64, 2, 64)").split()
    assert all("upload" in kernel for kernel in kernels[:-1]) and len(kernels) > 1
    assert "attention_forward" in kernels[-1]


def test_few_queries_of_many_keys_are_two_launches() -> None:
    kernels = launched(call="attention(1, 64, 50000, 3, 64)").split()
    assert [kernel[len("_ZN16anchor_attention4") :] for kernel in kernels] == [
        "sm9017attention_forward",
        "cuda15attention_merge",
    ]
