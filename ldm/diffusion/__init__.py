"""The mathematics of the papers. Imports torch and nothing else."""

from ldm.diffusion.guidance import Denoise, classifier_free_guidance, drop_conditioning
from ldm.diffusion.langevin import annealed_langevin, langevin_corrector
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
from ldm.diffusion.sampling import State, ddim, ddim_inversion, ddpm
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, ScheduleConfig, Step, TimestepSpacing
from ldm.diffusion.solvers import dpm_solver_pp_2m, euler_maruyama

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
    "annealed_langevin",
    "as_noise",
    "classifier_free_guidance",
    "convert",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "diffusion_loss",
    "discretised_decoder",
    "dpm_solver_pp_2m",
    "drop_conditioning",
    "euler_maruyama",
    "gaussian_decoder",
    "interpolated_log_variance",
    "langevin_corrector",
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
