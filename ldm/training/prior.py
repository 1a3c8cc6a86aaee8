"""Prior preservation: on other prompts, fine-tuning holds a model to what it predicted before.

After learning without forgetting (arXiv:1606.09282) and the prior-preservation loss of DreamBooth (arXiv:2208.12242,
section 3.3), but without extra images: the model's own samples take their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm import disk, hub
from ldm.config import LDMConfig
from ldm.data import Batch, generator
from ldm.diffusion import NoiseSchedule
from ldm.diffusion.denoiser import add_noise, x0_and_epsilon
from ldm.diffusion.losses import without_variance
from ldm.pipelines import Pipeline
from ldm.text.encoder import ignore_cut_prompts
from ldm.training.run import Run

SAMPLES, SAMPLING_STEPS = 128, 10
TIMESTEPS_PER_SAMPLE = 8
EMPTY_EVERY = 8  # one prompt in so many is empty: guidance needs what the model draws without a caption
PRIOR_FRACTION = 0.25  # of the images of a batch, each of which brings one of these predictions


@dataclass(frozen=True)
class Prior:
    """Predictions of the model before fine-tuning.

    Each is stored as the x̂_0 and ε̂ that it means at its x_t, so that `diffusion_loss` of these at its timestep is the
    squared difference between the present prediction and that one.
    """

    latents: Tensor  # x̂_0, [N, C, h, w]
    noise: Tensor  # ε̂, [N, C, h, w]
    timesteps: Tensor  # [N] int64
    condition: Tensor  # [N, L, D]

    def rows(self, seed: int, batch: Batch) -> Tensor:
        """Indices of the predictions that belong to a batch: a function of seed, epoch and image, not of the batch."""
        rows = []
        for epoch, name in zip(batch.epochs, batch.ids, strict=True):
            rng = generator(seed, "prior", epoch, name)
            if rng.random() < PRIOR_FRACTION:
                rows.append(int(rng.integers(len(self.latents))))
        return torch.tensor(rows, dtype=torch.int64)


def make_prior(config: LDMConfig, pipeline: Pipeline, run: Run) -> Prior | None:
    """None without `finetune.prior_weight`; ValueError without prompts for it. A resumed run computes it again."""
    if config.start_from is None or config.finetune.prior_weight == 0:
        return None
    prompts = read_prompts(config)
    run.print(f"prior preservation: {SAMPLES} samples of {config.start_from} are generated before training")
    latents: list[Tensor] = []
    with ignore_cut_prompts():
        pipeline(
            prompts,
            seed=config.seed,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=1.0,
            sampler="ddim",
            on_step=lambda state: latents.append(state.latents) if state.index == SAMPLING_STEPS - 1 else None,
        )
    return frozen_predictions(pipeline, torch.cat(latents), prompts, config.seed)


def read_prompts(config: LDMConfig) -> list[str]:
    """`SAMPLES` prompts, one in `EMPTY_EVERY` empty: of `finetune.prior_prompts`, or `prompts.txt` of the model."""
    assert config.start_from is not None
    path = config.finetune.prior_prompts or hub.find_pipeline(config.start_from) / "prompts.txt"
    if isinstance(path, Path) and not path.is_file():
        why = f"finetune.prior_weight needs prompts that {config.start_from} can draw"
        raise ValueError(f"{why}: set finetune.prior_prompts to a text file with one per line, or the weight to 0")
    known = disk.read_lines("finetune.prior_prompts", path)
    return ["" if i % EMPTY_EVERY == 0 else known[i % len(known)] for i in range(SAMPLES)]


@torch.no_grad()
def frozen_predictions(pipeline: Pipeline, latents: Tensor, prompts: Sequence[str], seed: int) -> Prior:
    """Predictions for samples x_0 [N, C, h, w] at `TIMESTEPS_PER_SAMPLE` timesteps each, spread over the schedule."""
    schedule, prediction_type = NoiseSchedule.from_config(pipeline.schedule), pipeline.schedule.prediction_type
    denoiser, total = without_variance(pipeline.unet), schedule.num_train_timesteps
    condition = pipeline.text_encoder(prompts).to(latents)
    parts = []
    for part in range(TIMESTEPS_PER_SAMPLE):
        rng = generator(seed, "prior", part)
        place = (part + torch.from_numpy(rng.random(len(latents)))) / TIMESTEPS_PER_SAMPLE
        timesteps = (place * total).long().clamp(max=total - 1)
        noise = torch.from_numpy(rng.standard_normal(tuple(latents.shape), "float32")).to(latents)
        for batch in torch.arange(len(latents)).split(16):
            alpha, sigma = schedule.coefficients(timesteps[batch], latents)
            x_t = add_noise(latents[batch], noise[batch], alpha, sigma)
            output = denoiser(x_t, timesteps[batch].to(latents.device), condition[batch])
            x_0, epsilon = x0_and_epsilon(output, x_t, alpha, sigma, prediction_type)
            parts.append((x_0, epsilon, timesteps[batch], condition[batch]))
    return Prior(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
