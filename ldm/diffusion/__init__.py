"""The mathematics of the papers. Imports torch and nothing else."""

from ldm.diffusion.guidance import (
    LogLikelihood,
    alpha_sigma_at,
    classifier_free_guidance,
    classifier_guidance,
    drop_conditioning,
    dynamic_threshold,
    guide_within,
    rescale_guidance,
    with_condition,
)
from ldm.diffusion.likelihood import Decoder, discretized_decoder, gaussian_decoder, variational_terms
from ldm.diffusion.losses import (
    NOISE_BANDS,
    LossConfig,
    diffusion_loss,
    logit_normal_timesteps,
    loss_weights,
    noise_bands,
    stratified_timestep,
    without_variance,
)
from ldm.diffusion.prediction import (
    Denoise,
    Denoiser,
    add_noise,
    split_variance,
    to_epsilon_model,
    training_target,
    x0_and_epsilon,
)
from ldm.diffusion.samplers import (
    State,
    annealed_langevin,
    ddim,
    ddim_inversion,
    ddpm,
    dpm_solver_pp_2m,
    euler_maruyama,
    langevin_corrector,
    slerp,
)
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, ScheduleConfig, Step
