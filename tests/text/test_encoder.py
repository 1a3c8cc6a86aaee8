"""The protocol: captions to hidden states, the same as in diffusers; and saving without re-saving."""

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ldm.text import TextEncoder, load_text_encoder, load_text_encoder_folders


def stock_states(text_encoder: Any, tokenizer: Any, captions: list[str]) -> Tensor:
    """What cross-attention sees in diffusers."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        return pipeline.encode_prompt(captions, torch.device("cpu"), 1, False)[0]


def stock_folder_states(folder: Path, encoder: TextEncoder, captions: list[str]) -> Tensor:
    names = encoder.library_classes
    model = getattr(transformers, names["text_encoder"][1]).from_pretrained(folder / "text_encoder")
    tokenizer = getattr(transformers, names["tokenizer"][1]).from_pretrained(folder / "tokenizer")
    return stock_states(model.eval(), tokenizer, captions)


KINDS = {
    "clip": (False, "CLIPTextModel", "CLIPTokenizerFast"),
    "clip-full": (False, "CLIPTextModel", "CLIPTokenizerFast"),
    "bert": (True, "BertModel", "BertTokenizerFast"),
    "bert-masked": (True, "BertModel", "BertTokenizerFast"),
    "t5": (True, "T5EncoderModel", "T5TokenizerFast"),
    "t5-full": (True, "T5EncoderModel", "T5TokenizerFast"),
    "byt5": (True, "T5EncoderModel", "ByT5Tokenizer"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folders_give_in_diffusers_the_same_states(
    kind: str, save_encoder: Any, captions: list[str], tmp_path: Path
) -> None:
    masked, model_class, tokenizer_class = KINDS[kind]
    encoder = load_text_encoder(str(save_encoder(kind)))
    states = encoder(captions)

    assert states.shape == (4, 12, 32)
    assert (encoder.hidden_size, encoder.max_length, states.dtype) == (32, 12, torch.float32)
    assert not states.requires_grad
    assert encoder.library_classes == {
        "text_encoder": ("transformers", model_class),
        "tokenizer": ("transformers", tokenizer_class),
    }
    encoder.save(tmp_path / "saved")
    torch.testing.assert_close(stock_folder_states(tmp_path / "saved", encoder, captions), states, rtol=0, atol=0)
    config = json.loads((tmp_path / "saved/text_encoder/config.json").read_text())
    assert config.get("use_attention_mask") == (True if masked else None)

    again = load_text_encoder_folders(tmp_path / "saved/text_encoder", tmp_path / "saved/tokenizer")
    torch.testing.assert_close(again(captions), states, rtol=0, atol=0)
    assert (again.uses_attention_mask, again.max_length) == (masked, 12)
    assert again.library_classes == encoder.library_classes


@pytest.mark.parametrize("kind", ["clip", "bert"])
@pytest.mark.parametrize("said", [True, False, None])
def test_a_pipelines_folder_decides_about_the_mask(
    kind: str, said: bool | None, save_encoder: Any, captions: list[str]
) -> None:
    folder = save_encoder(kind, config={} if said is None else {"use_attention_mask": said})
    encoder = load_text_encoder_folders(folder, folder)
    assert encoder.uses_attention_mask is bool(said)
    model = getattr(transformers, encoder.library_classes["text_encoder"][1]).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = stock_states(model.eval(), tokenizer, captions)
    torch.testing.assert_close(encoder(captions), expected, rtol=0, atol=0)


def test_a_model_that_refuses_the_mask_is_obeyed(save_encoder: Any) -> None:
    assert not load_text_encoder(str(save_encoder("bert", config={"use_attention_mask": False}))).uses_attention_mask


def test_states_of_a_caption_do_not_depend_on_its_batch(save_encoder: Any, captions: list[str]) -> None:
    encoder = load_text_encoder(str(save_encoder("bert")))
    many = (captions * 40)[:150]  # more than one chunk
    states = encoder(many)
    assert states.shape == (150, 12, 32)
    for i, caption in [(0, captions[0]), (65, captions[1]), (149, captions[1])]:
        torch.testing.assert_close(states[i : i + 1], encoder([caption]), rtol=0, atol=1e-5)


def test_padded_positions_are_returned_and_a_longer_length_keeps_masked_words(save_encoder: Any) -> None:
    folder = str(save_encoder("bert"))
    short, long = load_text_encoder(folder, 8), load_text_encoder(folder, 16)
    assert (short(["a cat"]).shape, long(["a cat"]).shape) == ((1, 8, 32), (1, 16, 32))
    # [CLS] a cat [SEP]: masked, the words do not see how much padding follows them.
    torch.testing.assert_close(short(["a cat"])[:, :4], long(["a cat"])[:, :4], rtol=0, atol=1e-6)
    assert not torch.equal(short(["a cat"])[:, 4:], torch.zeros(1, 4, 32))


def test_overflow_counts_the_tokens_that_are_lost(save_encoder: Any, captions: list[str]) -> None:
    encoder = load_text_encoder(str(save_encoder("bert")), 8)
    assert encoder.truncated_tokens([*captions, "a red cat on a mat"]) == [0, 0, 0, 13 + 2 - 8, 0]
    assert encoder.truncated_tokens(["a red cat on a mat cat"]) == [1]
    # What fits exactly differs in its last word; what does not has lost it.
    fits = encoder(["a red cat on a mat", "a red cat on a dog"])
    assert not torch.equal(fits[0], fits[1])
    cut = encoder(["a red cat on a mat cat", "a red cat on a mat dog"])
    torch.testing.assert_close(cut[0], cut[1], rtol=0, atol=1e-6)


def test_counting_leaves_encoding_unchanged(save_encoder: Any, captions: list[str]) -> None:
    encoder = load_text_encoder(str(save_encoder("clip")))
    before = encoder(captions)
    encoder.truncated_tokens(captions)
    torch.testing.assert_close(encoder(captions), before, rtol=0, atol=0)


def test_bad_captions_are_refused(save_encoder: Any) -> None:
    encoder = load_text_encoder(str(save_encoder("bert")))
    for call in (encoder, encoder.truncated_tokens):
        with pytest.raises(ValueError, match="empty"):
            call([])
        with pytest.raises(ValueError, match="not one string"):
            call("a cat")
        with pytest.raises(ValueError, match=r"caption 1 has half of a surrogate pair at place 1 \('b\\ud800'\)"):
            call(["a", "b\ud800"])
        with pytest.raises(ValueError, match="caption 1 is 3; it must be a text"):
            call(["a cat", 3])  # type: ignore[list-item]


def test_moving_changes_dtype_and_frozen_stays_frozen(save_encoder: Any) -> None:
    encoder = load_text_encoder(str(save_encoder("clip")))
    assert encoder.to(dtype=torch.bfloat16) is encoder
    assert encoder(["cat"]).dtype == encoder.dtype == torch.bfloat16
    assert encoder.device == torch.device("cpu")
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    encoder.model.requires_grad_(True)
    assert not encoder(["cat"]).requires_grad  # no graph is kept, whatever became of the parameters


def test_half_precision_weights_are_computed_in_full(save_encoder: Any) -> None:
    folder = save_encoder("clip")
    transformers.CLIPTextModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    assert load_text_encoder(str(folder))(["cat"]).dtype == torch.float32


def test_a_saved_pipeline_opens_and_draws_in_diffusers(save_encoder: Any, captions: list[str], tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    encoder = load_text_encoder(str(save_encoder("bert")))
    encoder.save(tmp_path / "pipeline")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=encoder.hidden_size,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8, latent_channels=4)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    for name, part in {"unet": unet, "vae": vae, "scheduler": scheduler}.items():
        part.save_pretrained(tmp_path / "pipeline" / name)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {name: list(names) for name, names in encoder.library_classes.items()}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (tmp_path / "pipeline/model_index.json").write_text(json.dumps(index))

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    positive, negative = pipeline.encode_prompt(captions, "cpu", 1, True, negative_prompt=[""] * 4)
    torch.testing.assert_close(positive, encoder(captions), rtol=0, atol=0)
    torch.testing.assert_close(negative, encoder([""] * 4), rtol=0, atol=0)
    image = pipeline("a red cat", num_inference_steps=2, height=8, width=8, output_type="np").images
    assert image.shape == (1, 8, 8, 3)

    # The folder of a whole pipeline is a source of its text encoder, too.
    torch.testing.assert_close(
        load_text_encoder(str(tmp_path / "pipeline"))(captions), encoder(captions), rtol=0, atol=0
    )


def test_importing_the_package_leaves_transformers_alone() -> None:
    code = "import sys, ldm.text; print(sorted({'transformers', 'open_clip', 'diffusers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_with_project())
    assert run.stdout.strip() == "[]", run.stderr


def test_loading_says_nothing(save_encoder: Any, capfd: Any, caplog: Any) -> None:
    folder = save_encoder("clip-full")
    capfd.readouterr()
    logger = logging.getLogger("transformers")  # does not propagate to the handlers that pytest sets up
    logger.addHandler(caplog.handler)
    try:
        encoder = load_text_encoder(str(folder))
        encoder(["cat"])
        encoder.truncated_tokens(["cat " * 100])
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("hub_bars", [True, False])
def test_the_users_settings_of_transformers_are_left(hub_bars: bool, save_encoder: Any) -> None:
    from huggingface_hub import utils as hub
    from transformers.utils import logging as settings

    folder = str(save_encoder("clip"))
    verbosity = settings.get_verbosity()
    try:
        settings.set_verbosity_info()
        settings.enable_progress_bar()
        if not hub_bars:
            hub.disable_progress_bars()
        load_text_encoder(folder)
        assert settings.get_verbosity() == settings.INFO
        assert settings.is_progress_bar_enabled()
        assert hub.are_progress_bars_disabled() is not hub_bars
    finally:
        settings.set_verbosity(verbosity)
        settings.enable_progress_bar()


def _with_project() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_the_words_that_are_lost_are_named(save_encoder: Any) -> None:
    bert = load_text_encoder(str(save_encoder("bert")), 8)
    fits, cut = "a red cat on a mat", "A  red cat on a mat,\tblue dog "
    assert bert.truncated_words([fits, cut, ""]) == ["", ",\tblue dog", ""]
    clip = load_text_encoder(str(save_encoder("clip")))  # a byte is a token, and there is room for ten
    # What is cut within is lost as a whole; what is before it is not.
    assert clip.truncated_words(["red dog abcd", "reddish doggy cat", "grün grün a"]) == ["", "doggy cat", "a"]
    t5 = load_text_encoder(str(save_encoder("t5")), 4)
    assert t5.truncated_words(["a red cat", "a red cat on  a mat"]) == ["", "on  a mat"]
    byt5 = load_text_encoder(str(save_encoder("byt5")))
    assert byt5.truncated_words(["a red cat", "a red cat on a mat"]) == ["", "n a mat"]
    for encoder in (bert, clip, t5, byt5):
        texts = [fits[:length] for length in range(len(fits) + 1)] + [cut, cut * 9]
        assert [bool(text) for text in encoder.truncated_words(texts)] == [
            bool(count) for count in encoder.truncated_tokens(texts)
        ]


def test_many_captions_are_counted_in_pieces(save_encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_text_encoder(str(save_encoder("bert")), 4)
    texts = ["a cat", "a red cat", "a blue dog on a mat", "mat", "on a mat a cat"]
    whole = encoder.truncated_words(texts)
    assert whole == ["", "cat", "dog on a mat", "", "mat a cat"]
    monkeypatch.setattr("ldm.text.encoder._COUNTED", 2)
    assert encoder.truncated_words(texts) == whole


@pytest.mark.parametrize("kind", ["clip", "bert", "t5", "byt5"])
def test_threads_that_count_and_encode_with_one_encoder_do_not_disturb_each_other(kind: str, save_encoder: Any) -> None:
    encoder = load_text_encoder(str(save_encoder(kind)))
    texts = [" ".join(["a red cat on a mat"] * (1 + number % 7)) for number in range(40)]
    encode, lost, overflow = encoder(texts), encoder.truncated_words(texts), encoder.truncated_tokens(texts)
    fresh = load_text_encoder(str(save_encoder(kind)))  # its first calls are at once, too

    def call(number: int) -> None:
        if number % 3 == 0:
            torch.testing.assert_close(fresh(texts), encode, rtol=0, atol=1e-6)
        elif number % 3 == 1:
            assert fresh.truncated_words(texts) == lost
        else:
            assert fresh.truncated_tokens(texts) == overflow

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(call, range(90))) == [None] * 90


def test_one_line_names_the_words_that_prompts_lose(save_encoder: Any) -> None:
    encoder = load_text_encoder(str(save_encoder("bert")), 8)
    fits, cut = "a red cat on a mat", "a red cat on a mat,\nblue dog"
    assert encoder.truncation_message([fits, ""]) == ""
    line = encoder.truncation_message([fits, cut, cut, "a " * 8 + "dog"])
    assert line == (
        "the text encoder reads 8 tokens of a text; lost: ',\\nblue dog' of 'a red cat on a mat,\\nblue dog'; "
        "'a a dog' of 'a a a a a a a a dog'"
    )
    many = encoder.truncation_message(f"{fits} {'cat ' * count}" for count in range(1, 500))
    assert "\n" not in many and len(many) < 10 * 700
    assert many.endswith("; words of 489 texts more")
