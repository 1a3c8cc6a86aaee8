"""What the tests of CUDA share. Without CUDA they are skipped; `LDM_REHEARSE_CUDA=1` runs them on the CPU instead,
which shows that they run, and no more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# cuBLAS reads this when its first handle is made; without it some of its products are not deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

REHEARSAL = os.environ.get("LDM_REHEARSE_CUDA") == "1"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if not (REHEARSAL or torch.cuda.is_available()):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
    # Compiling takes as long as all others together: last, where a limit costs least.
    items.sort(key=lambda item: item.originalname == "test_compiled" if isinstance(item, pytest.Function) else False)


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """No TF32: cuDNN rounds the inputs of float32 convolutions to 10 bits by default."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if REHEARSAL else "cuda")
