"""The two controls: a model that was overfitted to 50 images, and held-out images passed off as its pictures."""

import dataclasses

import pytest
import torch

from experiments.small_models import SCHEDULE, Recipe, read_data, trained_model
from ldm.config import TrainConfig
from ldm.data import CaptionedImages, DataConfig, generator, split
from ldm.data.layouts import open_source
from ldm.evaluation.memorization import color_layout, find_copies, loss_gap
from ldm.evaluation.verdict import MAX_LOSS_GAP, verdict
from ldm.models import UNetConfig
from ldm.pipelines import Pipeline
from ldm.pipelines.images import from_pil
from ldm.text import load_text_encoder

UNET = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=8,
)
TRAIN = TrainConfig(max_steps=1500, batch_size=32, learning_rate=1e-3, warmup_steps=50, ema_decay=0.99)


@pytest.mark.slow
def test_a_model_overfitted_to_50_scans_is_memorising_and_held_out_scans_are_not(tmp_path):
    everything = read_data("digits", 8, grey=False, max_length=12)
    chosen = generator(0, "50").permutation(everything.training)[:50].tolist()
    data = dataclasses.replace(
        everything,
        ids=tuple(everything.ids[i] for i in chosen),
        images=everything.images[chosen],
        captions=tuple(everything.captions[i] for i in chosen),
        training=50,
    )
    unet = trained_model(Recipe(unet=UNET, train=TRAIN), data, tmp_path / "model", torch.device("cpu"))
    pipeline = Pipeline(
        unet=unet.unet.eval(),
        codec=data.codec(),
        text_encoder=load_text_encoder("minilm", 12),
        schedule=SCHEDULE,
        guidance_scale=1.5,
        num_inference_steps=40,
    )
    _, captions = data.draw_captions(7, range(64))
    pictures = color_layout(from_pil(pipeline(captions, seed=0).images))
    config = DataConfig(path="digits", resolution=8)
    training, held_out = split(open_source(config).samples, 0.1)
    sides = [CaptionedImages(side, config, 0) for side in ([training[i] for i in chosen], held_out)]
    gap = loss_gap(pipeline, *sides, images=50, draws=1)
    assert gap.widest().min_relative_gap > MAX_LOSS_GAP
    known, unseen = color_layout(data.images), color_layout(everything.held_out)
    for held_out_features in (unseen, unseen[:5], None):
        assert verdict(find_copies(pictures, known, held_out_features), gap).kind == "memorizing"
        passed_off = find_copies(unseen[5:], known, held_out_features)
        assert verdict(passed_off, None).kind != "memorizing"
        assert verdict(passed_off, gap).kind == "undecided"  # no copies, of a model that knows its images by heart
