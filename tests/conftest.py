import os
import shutil

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("quick", max_examples=60, deadline=None)
hypothesis.settings.register_profile("brief", max_examples=25, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


# The emulator executes what nvcc makes of the CUDA kernels: no compiler, nothing to execute.
NEED_NVCC = (
    "cuda/test_cuda_host.py",
    "cuda/test_cuda_library.py",
    "cuda/test_cuda_kernels.py",
    "cuda/test_cuda_plans.py",
    "cuda/test_cuda_primitives.py",
    "cuda/test_cuda_primitives_sm90.py",
    "cuda/test_cuda_hopper_forward.py",
    "cuda/test_cuda_hopper_backward.py",
    "tools/ptx_emulator/test_emulator_kernels.py",
    "tools/ptx_emulator/test_emulator_hopper_kernels.py",
)
HAS_NVCC = shutil.which("nvcc") is not None
collect_ignore = [] if HAS_NVCC else list(NEED_NVCC)


def pytest_report_header() -> str:
    return "" if HAS_NVCC else f"nvcc is not on PATH: left out {', '.join(NEED_NVCC)}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
