"""Parts of tiny runs that are made once."""

import pytest
import torch

from tests import tiny
from tests.training.runs import captioned_folder, run_autoencoder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(1)
    tiny.clip_text_model().save_pretrained(folder)
    tiny.clip_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def first_stage(tmp_path_factory):
    """A first stage of two steps."""
    folder = tmp_path_factory.mktemp("first") / "run"
    run_autoencoder(folder)
    return folder


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory):
    """A folder as diffusers writes it, with random weights."""
    folder = tmp_path_factory.mktemp("stable_diffusion")
    tiny.stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Twelve images with captions."""
    return captioned_folder(tmp_path_factory.mktemp("data") / "mine", 12)
