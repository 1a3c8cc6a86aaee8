"""The mathematics of the papers. Imports torch and nothing else."""

from ldm.diffusion.guidance import Denoise, classifier_free_guidance, drop_conditioning
from ldm.diffusion.langevin import annealed_langevin, langevin_corrector
from ldm.diffusion.objective import Denoiser, diffusion_loss
from ldm.diffusion.prediction import add_noise, original_and_noise, training_target, velocity
from ldm.diffusion.sampling import State, ddim, ddim_inversion, ddpm
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, ScheduleConfig, Step, TimestepSpacing
from ldm.diffusion.solvers import dpm_solver_pp_2m, euler_maruyama

__all__ = [
    "Denoise",
    "Denoiser",
    "NoiseSchedule",
    "PredictionType",
    "ScheduleConfig",
    "State",
    "Step",
    "TimestepSpacing",
    "add_noise",
    "annealed_langevin",
    "classifier_free_guidance",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "diffusion_loss",
    "dpm_solver_pp_2m",
    "drop_conditioning",
    "euler_maruyama",
    "langevin_corrector",
    "original_and_noise",
    "training_target",
    "velocity",
]
