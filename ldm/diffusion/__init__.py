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
from ldm.diffusion.objective import Denoiser, diffusion_loss
from ldm.diffusion.prediction import add_noise, as_noise, original_and_noise, split_variance, training_target, velocity
from ldm.diffusion.sampling import State, ddim, ddim_inversion, ddpm
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, ScheduleConfig, Step, TimestepSpacing
from ldm.diffusion.solvers import dpm_solver_pp_2m, euler_maruyama
from ldm.diffusion.thresholding import dynamic_threshold

__all__ = [
    "Denoise",
    "Denoiser",
    "LogLikelihood",
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
    "ddim",
    "ddim_inversion",
    "ddpm",
    "diffusion_loss",
    "dpm_solver_pp_2m",
    "drop_conditioning",
    "dynamic_threshold",
    "euler_maruyama",
    "guide_within",
    "langevin_corrector",
    "original_and_noise",
    "rescale_guidance",
    "slerp",
    "split_variance",
    "training_target",
    "velocity",
]
