"""The mathematics of the papers. Imports torch and nothing else."""

from ldm.diffusion.guidance import Denoise, classifier_free_guidance, drop_conditioning
from ldm.diffusion.likelihood import (
    Bound,
    Decoder,
    discretised_decoder,
    gaussian_decoder,
    interpolated_log_variance,
    variational_bound,
    variational_terms,
)
from ldm.diffusion.objective import Denoiser, LossConfig, diffusion_loss, loss_weights, stratified_timestep
from ldm.diffusion.prediction import (
    add_noise,
    as_noise,
    convert,
    original_and_noise,
    posterior_mean,
    score_of,
    split_variance,
    training_target,
    velocity,
)
from ldm.diffusion.sampling import State, ddim, ddpm
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, ScheduleConfig, Step, TimestepSpacing

__all__ = [
    "Bound",
    "Decoder",
    "Denoise",
    "Denoiser",
    "LossConfig",
    "NoiseSchedule",
    "PredictionType",
    "ScheduleConfig",
    "State",
    "Step",
    "TimestepSpacing",
    "add_noise",
    "as_noise",
    "classifier_free_guidance",
    "convert",
    "ddim",
    "ddpm",
    "diffusion_loss",
    "discretised_decoder",
    "drop_conditioning",
    "gaussian_decoder",
    "interpolated_log_variance",
    "loss_weights",
    "original_and_noise",
    "posterior_mean",
    "score_of",
    "split_variance",
    "stratified_timestep",
    "training_target",
    "variational_bound",
    "variational_terms",
    "velocity",
]
