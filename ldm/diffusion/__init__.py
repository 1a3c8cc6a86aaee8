"""The mathematics of the papers. Imports torch and nothing else."""

from ldm.diffusion.guidance import (
    Denoise,
    LogLikelihood,
    Rescale,
    alpha_sigma_at,
    classifier_free_guidance,
    classifier_guidance,
    conditioned,
    drop_conditioning,
    guide_within,
    rescale_guidance,
)
from ldm.diffusion.interpolation import slerp
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
from ldm.diffusion.thresholding import dynamic_threshold

__all__ = [
    "Bound",
    "Decoder",
    "Denoise",
    "Denoiser",
    "LogLikelihood",
    "LossConfig",
    "NoiseSchedule",
    "PredictionType",
    "Rescale",
    "ScheduleConfig",
    "State",
    "Step",
    "TimestepSpacing",
    "add_noise",
    "alpha_sigma_at",
    "annealed_langevin",
    "as_noise",
    "classifier_free_guidance",
    "classifier_guidance",
    "conditioned",
    "convert",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "diffusion_loss",
    "discretised_decoder",
    "dpm_solver_pp_2m",
    "drop_conditioning",
    "dynamic_threshold",
    "euler_maruyama",
    "gaussian_decoder",
    "guide_within",
    "interpolated_log_variance",
    "langevin_corrector",
    "loss_weights",
    "original_and_noise",
    "posterior_mean",
    "rescale_guidance",
    "score_of",
    "slerp",
    "split_variance",
    "stratified_timestep",
    "training_target",
    "variational_bound",
    "variational_terms",
    "velocity",
]
