"""The mathematics of the papers. Imports torch and nothing else."""

from ldm.diffusion.guidance import Denoise, classifier_free_guidance, drop_conditioning
from ldm.diffusion.objective import Denoiser, diffusion_loss
from ldm.diffusion.prediction import add_noise, original_and_noise, training_target, velocity
from ldm.diffusion.sampling import State, ddim, ddpm
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, ScheduleConfig, Step, TimestepSpacing

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
    "classifier_free_guidance",
    "ddim",
    "ddpm",
    "diffusion_loss",
    "drop_conditioning",
    "original_and_noise",
    "training_target",
    "velocity",
]
