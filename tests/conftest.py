"""What every test can rely on: no network, one thread of arithmetic, the same random numbers each time."""

import os
import tempfile

# These are read while transformers, datasets and tokenizers are imported, so they are set before any of them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Nothing that a user has cached is read, and nothing is left in their cache.
os.environ["LDM_CACHE"] = tempfile.mkdtemp(prefix="ldm-tests-")

import random

import numpy as np
import pytest
import torch

# The tensors of the tests are tiny: threads would cost more than they bring, and change the order of sums.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Start each test from seed 0 in all three generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
