"""The whole variational bound from its terms, as the papers define it: a reference for `variational_terms`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, add_noise
from ldm.diffusion.losses import Decoder, Variance, prior_term, variational_terms
from ldm.diffusion.schedule import NoiseSchedule, PredictionType


@dataclass(frozen=True)
class VariationalBound:
    """The variational bound of B samples, bits per dimension.

    Attributes:
        terms: [B, T]; column t is L_t, the term seen from timestep t. Column 0 is the decoder's.
        prior: [B], L_T: what the last state still tells of x_0.
    """

    terms: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """[B], the bound on −log₂ p(x_0) per dimension. DDPM, Eq. 5."""
        return self.prior + self.terms.sum(dim=1)


def variational_bound(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_0: Tensor,
    *,
    noise: Callable[[], Tensor],
    decoder: Decoder,
    prediction_type: PredictionType = "epsilon",
    variance: Variance = "small",
    clip_x0: Callable[[Tensor], Tensor] | None = None,
) -> VariationalBound:
    """All terms of the bound of each sample, each from one draw of x_t: T calls of `denoise`, without gradients.

    Args:
        original: x_0, [B, C, H, W].
        noise: fresh ε of the shape of `x_0` at every call, one call a timestep from T − 1 down to 0.
        decoder: `gaussian_decoder` for continuous data, `discretized_decoder(mean, std)` for pixels.
        variance: "small", "large", or "learned" where the denoiser gives 2C channels. For data with a density, "small"
            stays about 0.64 bits above its likelihood however large T is; "large" approaches it as 1/T.
        clip_x0: bounds x̂_0, as in sampling; None where nothing is known of its range.

    Raises:
        ValueError: if the denoiser's channels do not fit `variance`, or the schedule says nothing of its prediction.
    """
    prior = prior_term(schedule, x_0)
    terms = torch.empty(
        len(x_0),
        schedule.num_train_timesteps,
        dtype=prior.dtype,
        device=x_0.device,
    )
    with torch.no_grad():
        for t in reversed(range(schedule.num_train_timesteps)):
            timesteps = torch.full((len(x_0),), t, dtype=torch.int64)
            noisy = add_noise(x_0, noise(), *schedule.coefficients(timesteps, x_0))
            terms[:, t] = variational_terms(
                denoise(noisy, t),
                noisy,
                x_0,
                schedule,
                timesteps,
                decoder=decoder,
                prediction_type=prediction_type,
                variance=variance,
                clip_x0=clip_x0,
            )
    return VariationalBound(terms, prior)
