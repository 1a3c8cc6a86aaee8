"""tools/check_sd15.py, on a tiny model of the same layout."""

import json

import pytest

from tests import tiny
from tools.check_sd15 import check


@pytest.mark.filterwarnings("ignore")  # the tiny text encoder cuts the prompts
def test_a_model_and_its_lora_are_compared(tmp_path):
    tiny.stable_diffusion().save_pretrained(tmp_path / "model")
    output = tmp_path / "check"
    assert check(str(tmp_path / "model"), output, steps=2, size=None, half=False) == []
    result = json.loads((output / "result.json").read_text())
    assert min(*result["model_psnr"], *result["lora_psnr"]) > 50 and min(result["lora_change_psnr"]) < 60
    assert (output / "images.png").is_file() and (output / "run" / "lora").is_dir()
    with pytest.raises(ValueError, match=f"{output} is not empty"):
        check(str(tmp_path / "model"), output, steps=2, size=None, half=False)
