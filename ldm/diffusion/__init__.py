"""The mathematics of the papers. Imports torch and nothing else."""

from ldm.diffusion.denoiser import (
    Denoise,
    Denoiser,
    LogLikelihood,
    add_noise,
    alpha_sigma_at,
    classifier_free_guidance,
    classifier_guidance,
    drop_conditioning,
    dynamic_threshold,
    guide_within,
    rescale_guidance,
    split_variance,
    to_epsilon_model,
    training_target,
    with_condition,
    x0_and_epsilon,
)
from ldm.diffusion.losses import (
    NOISE_BANDS,
    Decoder,
    LossConfig,
    diffusion_loss,
    discretized_decoder,
    gaussian_decoder,
    logit_normal_timesteps,
    loss_weights,
    noise_bands,
    stratified_timestep,
    variational_terms,
    without_variance,
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
