"""The mathematics of the papers. Imports torch and nothing else."""

from ldm.diffusion.guidance import (
    Denoise,
    LogLikelihood,
    Rescale,
    alpha_sigma_at,
    classifier_free_guidance,
    classifier_guidance,
    drop_conditioning,
    guide_within,
    rescale_guidance,
    with_condition,
)
from ldm.diffusion.interpolation import slerp
from ldm.diffusion.langevin import annealed_langevin, langevin_corrector
from ldm.diffusion.likelihood import (
    Decoder,
    VariationalBound,
    discretized_decoder,
    gaussian_decoder,
    interpolated_log_variance,
    variational_bound,
    variational_terms,
)
from ldm.diffusion.objective import Denoiser, LossConfig, diffusion_loss, loss_weights, stratified_timestep
from ldm.diffusion.prediction import (
    add_noise,
    convert,
    posterior_mean,
    score_from_epsilon,
    split_variance,
    to_epsilon_model,
    training_target,
    velocity,
    x0_and_epsilon,
)
from ldm.diffusion.sampling import State, ddim, ddim_inversion, ddpm
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, ScheduleConfig, Step, TimestepSpacing
from ldm.diffusion.solvers import dpm_solver_pp_2m, euler_maruyama
from ldm.diffusion.thresholding import dynamic_threshold

__all__ = [
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
    "VariationalBound",
    "add_noise",
    "alpha_sigma_at",
    "annealed_langevin",
    "classifier_free_guidance",
    "classifier_guidance",
    "convert",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "diffusion_loss",
    "discretized_decoder",
    "dpm_solver_pp_2m",
    "drop_conditioning",
    "dynamic_threshold",
    "euler_maruyama",
    "gaussian_decoder",
    "guide_within",
    "interpolated_log_variance",
    "langevin_corrector",
    "loss_weights",
    "posterior_mean",
    "rescale_guidance",
    "score_from_epsilon",
    "slerp",
    "split_variance",
    "stratified_timestep",
    "to_epsilon_model",
    "training_target",
    "variational_bound",
    "variational_terms",
    "velocity",
    "with_condition",
    "x0_and_epsilon",
]
