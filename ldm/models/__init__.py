"""The networks: plain `nn.Module`s built from frozen configs, with the names of diffusers."""

from ldm.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    CodebookUsage,
    Quantized,
    VectorQuantizer,
    VQConfig,
    VQModel,
    codebook_usage,
    kl_divergence,
    sample_posterior,
    upgrade_state_dict,
)
from ldm.models.blocks import enable_gradient_checkpointing, set_attention_backend
from ldm.models.similarity import (
    DiscriminatorConfig,
    PatchDiscriminator,
    PerceptualDistance,
    discriminator_loss,
    generator_loss,
)
from ldm.models.unet import UNet, UNetConfig

FirstStage = AutoencoderKL | VQModel
"""Both have `statistics`, `sample_latents`, `expectations` and `fold_statistics`: no caller asks which one it is."""
