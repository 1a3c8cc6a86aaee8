"""Training configs: frozen objects that refuse what cannot be meant, before anything heavy starts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldm import disk
from ldm.data import DataConfig
from ldm.data.sources import BUILT_IN
from ldm.diffusion import LossConfig, NoiseSchedule, PredictionType, ScheduleConfig, loss_weights
from ldm.diffusion.losses import log_variance_tables
from ldm.diffusion.samplers import check_sampler
from ldm.diffusion.schedule import check_first_step, check_precision
from ldm.models import AutoencoderConfig, DiscriminatorConfig, UNetConfig, VQConfig
from ldm.models.similarity import MIN_IMAGE_SIZE, AdversarialLoss


def _positive(config: object, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{key} is {value}; it must be a number greater than 0")


def _not_negative(config: object, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(config, key) < math.inf:
            raise ValueError(f"{key} is {getattr(config, key)}; it must be a number, not negative")


def _check_paths(output_dir: str, data: DataConfig, **read: str | None) -> None:
    """Refuses `~name/…` of no user, and a run folder that contains what the run reads, or is inside its data."""
    if not output_dir.strip():
        raise ValueError("output_dir is empty; name a folder for the run")
    for key, path in {**read, "output_dir": output_dir}.items():
        try:
            disk.expand_user(path or "")
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    run, folder = Path(output_dir).expanduser().resolve(), Path(data.path).expanduser()
    for key, path in {"data.path": data.path, **read}.items():  # an earlier run in that folder is moved aside
        if path is not None and run in (inside := Path(path).expanduser().resolve(), *inside.parents):
            raise ValueError(f"{key} is {path!r}, inside output_dir {output_dir!r}; choose another output_dir")
    # The pictures of a run would be data of the next.
    if data.path not in BUILT_IN and folder.is_dir() and folder.resolve() in run.parents:
        raise ValueError(f"output_dir {output_dir!r} is inside data.path {data.path!r}; choose another output_dir")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The frozen text encoder.

    Args:
        encoder: "minilm" (from a package, offline), "open_clip:NAME:WEIGHTS", a folder, or a hub id.
        layer: with open_clip, whose states: those of its "last" layer or, as Stable Diffusion 2, the "penultimate".
        max_length: tokens to which captions are padded and cut; None takes the encoder's own length.
    """

    __pydantic_config__ = {"extra": "forbid"}

    encoder: str = "minilm"
    layer: Literal["last", "penultimate"] = "last"
    max_length: int | None = 32

    def __post_init__(self) -> None:
        _positive(self, "max_length")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization, common to both scripts.

    Args:
        max_steps: number of optimizer steps.
        batch_size: images per step, over all processes and accumulated micro-batches.
        lr_schedule: after `warmup_steps` of linear rise, "constant", or "cosine" down to 0 at `max_steps`.
        cooldown_steps: the last steps, in which a constant rate falls linearly to 0 (arXiv:2405.18392). Before them, a
            run can be made longer.
        max_grad_norm: gradients are clipped to this 2-norm.
        ema_decay: d of the moving average of the weights, whose decay at update n is min(d, (1 + n)/(10 + n)).
        num_workers: processes that load images; 0 loads in the main one.
        cpu_threads: threads per process on the CPU. None: OMP_NUM_THREADS or MKL_NUM_THREADS, else those of the
            resumed run, else the measured fastest.
        checkpoint_every, checkpoint_minutes: maximum steps and minutes between checkpoints, besides the last one; None
            counts steps only.
        keep_checkpoints: number of newest checkpoints to keep; multiples of `keep_every` are kept too.
        max_nonfinite_steps: maximum number of steps in a row that are skipped because of a non-finite loss or gradient.
        validation_samples: maximum number of held-out images for the held-out loss.
    """

    __pydantic_config__ = {"extra": "forbid"}

    max_steps: int
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 100
    cooldown_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    num_workers: int = 0
    cpu_threads: int | None = None
    log_every: int = 20
    validate_every: int = 500
    validation_samples: int = 256
    sample_every: int = 1000
    checkpoint_every: int = 1000
    checkpoint_minutes: float | None = 10.0
    keep_checkpoints: int = 2
    keep_every: int | None = None
    max_nonfinite_steps: int = 10

    def __post_init__(self) -> None:
        _positive(
            self,
            *("max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "max_grad_norm"),
            *("log_every", "validate_every", "validation_samples", "sample_every", "checkpoint_every"),
            *("keep_checkpoints", "max_nonfinite_steps", "cpu_threads", "checkpoint_minutes", "keep_every"),
        )
        _not_negative(self, "warmup_steps", "cooldown_steps", "weight_decay", "num_workers")
        if self.cooldown_steps and self.lr_schedule != "constant":
            raise ValueError(
                f'cooldown_steps is for lr_schedule "constant", and lr_schedule is "{self.lr_schedule}"; leave it out'
            )
        if self.cooldown_steps and self.warmup_steps + self.cooldown_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and cooldown_steps {self.cooldown_steps} are more than max_steps "
                f"{self.max_steps}; make them fewer (train.cooldown_steps=0), or the run longer"
            )
        for key in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 0 and less than 1")


@dataclass(frozen=True, kw_only=True)
class DiffusionTrainConfig(TrainConfig):
    """What training of the UNet adds.

    Args:
        caption_dropout: probability of the empty caption, 0 to 1.
        attention: "sdpa", or "xformers" if installed, on CUDA.
        loss: with `weighting: hybrid` the network learns variances and has twice as many output channels.
        timesteps: "uniform", independent, or "stratified": one from each of B equal parts of the schedule, B the batch
            size.
        timestep_density: "uniform", or "logit_normal" (arXiv:2403.03206): t / T = sigmoid(z), z normal with
            `logit_mean` and `logit_std`. A mean above 0 trains more on noisy latents, where the text decides most.
        evaluate_every: steps between evaluations, besides the last one, of `evaluation_samples` generated images; None
            evaluates never.
        evaluation_features: the network whose features compare images: see `ldm.evaluation.features`.
        final_weights: which weights the model in the run folder has after the last step: the "last", or the "best" by
            the held-out loss.
    """

    __pydantic_config__ = {"extra": "forbid"}

    caption_dropout: float = 0.1
    attention: Literal["sdpa", "xformers"] = "sdpa"
    loss: LossConfig = field(default_factory=LossConfig)
    timesteps: Literal["uniform", "stratified"] = "uniform"
    timestep_density: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    evaluate_every: int | None = None
    evaluation_samples: int = 128
    evaluation_features: Literal["efficientnet", "pixel"] = "efficientnet"
    final_weights: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "evaluation_samples", "evaluate_every")
        for key, weighting in (("gamma", "min_snr"), ("vlb_weight", "hybrid"), ("variance", "vlb")):
            if self.loss.weighting != weighting and getattr(self.loss, key) != getattr(LossConfig(), key):
                raise ValueError(
                    f"loss.{key} is for weighting {weighting}, and weighting is {self.loss.weighting}; leave it out"
                )
        if not -10 <= self.logit_mean <= 10:
            raise ValueError(f"logit_mean is {self.logit_mean}; it must be -10 to 10")
        if not 0 < self.logit_std <= 10:
            raise ValueError(f"logit_std is {self.logit_std}; it must be above 0 and at most 10")
        if self.timestep_density == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError(
                "logit_mean and logit_std are for timestep_density logit_normal; set that too, or leave them out"
            )
        if self.timestep_density != "uniform" and self.loss.weighting in ("vlb", "hybrid"):
            raise ValueError(
                f"timestep_density is {self.timestep_density}, but loss.weighting {self.loss.weighting} estimates the "
                "variational bound from uniform timesteps; choose uniform, or loss.weighting simple or min_snr"
            )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is {self.caption_dropout}; it must be 0 to 1")

    @property
    def logit_normal(self) -> tuple[float, float] | None:
        """Mean and std of the density of timesteps; None where it is uniform."""
        return (self.logit_mean, self.logit_std) if self.timestep_density == "logit_normal" else None


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Which weights learn when training starts from a model.

    Args:
        method: "full": all of the UNet; "attention": its self- and cross-attention layers; "lora": low-rank additions
            to some linear layers (arXiv:2106.09685), a file of a few MB beside an untouched model.
        rank: of the additions.
        alpha: they are scaled by alpha / rank; None is alpha = rank.
        target_modules: the layers that get one, by the ends of their names.
        prior_weight: of the squared difference to the predictions before fine-tuning, on `prior_prompts`; 0 is none.
        prior_prompts: a text file with one prompt per line, of what the model should still know; None takes
            `prompts.txt` in its folder, which the built-in model has.
    """

    __pydantic_config__ = {"extra": "forbid"}

    method: Literal["full", "attention", "lora"] = "full"
    rank: int = 8
    alpha: float | None = None
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    prior_weight: float = 0.0
    prior_prompts: str | None = None

    def __post_init__(self) -> None:
        _positive(self, "rank", "alpha")
        _not_negative(self, "prior_weight")
        if not self.target_modules or not all(self.target_modules):
            raise ValueError("target_modules is empty or names nothing; name at least one layer, such as to_q")
        for item in dataclasses.fields(self):
            is_general = item.name == "method" or item.name.startswith("prior_")
            if self.method != "lora" and not is_general and getattr(self, item.name) != item.default:
                raise ValueError(f"{item.name} is for method lora, and method is {self.method}; leave it out")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The pictures made while training, and the defaults stored with the model.

    Args:
        prompts: a row of the sample grid each; image j of every row has seed `seed` + j.
        captions: as many captions of the data are rows before them; when a run starts, they become prompts.
        sampler: a name of `ldm.diffusion.samplers.SAMPLER_NAMES`.
    """

    __pydantic_config__ = {"extra": "forbid"}

    prompts: tuple[str, ...] = ()
    captions: int = 0
    images_per_prompt: int = 4
    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    sampler: str = "ddim"

    def __post_init__(self) -> None:
        check_sampler(self.sampler)
        if not self.prompts and not self.captions:
            raise ValueError("prompts is empty; give at least one text, or captions, the number of captions to use")
        _not_negative(self, "captions")
        _positive(self, "images_per_prompt", "num_inference_steps")
        if not 0 <= self.seed < 2**63 - self.images_per_prompt:
            raise ValueError(f"seed is {self.seed}; it must be a whole number from 0 on, below 2**63 for all pictures")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be a finite number")


def check_objective(
    loss: LossConfig, schedule: NoiseSchedule, prediction_type: PredictionType, sample: SampleConfig
) -> None:
    """Refuses pairs of loss, schedule, prediction and sampler that make no sense together. Raises ValueError naming
    both keys and the reason.
    """
    if loss.weighting == "hybrid":
        log_variance_tables(schedule)  # refuses schedules between whose variances there is nothing to learn
    else:
        weights = loss_weights(schedule, prediction_type, loss)
        if float(weights[-1]) == 0:
            raise ValueError(
                f"train.loss.weighting is {loss.weighting}, whose weight is 0 where SNR is 0, at the last timestep of "
                "schedule.rescale_betas_zero_snr: sampling starts there, and it would never be trained; choose simple "
                "or vlb"
            )
    if schedule.alphas_cumprod[-1] > 0:
        return
    if prediction_type == "posterior_mean":
        raise ValueError(
            "schedule.prediction_type is posterior_mean, which samplers read as noise, and where alpha is 0 "
            "(schedule.rescale_betas_zero_snr) noise says nothing about x_0; choose v_prediction or sample"
        )
    if sample.sampler == "langevin":
        raise ValueError(
            "sample.sampler is langevin, which walks in x/alpha and cannot start where alpha is 0 "
            "(schedule.rescale_betas_zero_snr); choose another sampler"
        )


@dataclass(frozen=True, kw_only=True)
class LDMConfig:
    """A run of `train/train_ldm.py`.

    Args:
        seed: of all randomness of training.
        output_dir: the run folder.
        space: what is diffused: "pixel", or "latent" with `first_stage`; "auto" decides by measuring how well
            `first_stage` (or the built-in one) reconstructs this data.
        first_stage: folder or hub id of an autoencoder (or of a pipeline that holds one).
        unet: keys of diffusers' UNet2DConditionModel, less those that follow from codec and text encoder.
        start_from: folder or hub id of a pipeline whose UNet training goes on from. Everything but data, train and
            sample follows from it: `unet`, `space`, `first_stage`, `text` and `schedule` are left out.
        finetune: with `start_from`, which weights learn.
    """

    __pydantic_config__ = {"extra": "forbid"}

    output_dir: str
    data: DataConfig
    train: DiffusionTrainConfig
    sample: SampleConfig
    seed: int = 0
    start_from: str | None = None
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    space: Literal["pixel", "latent", "auto"] = "pixel"
    first_stage: str | None = None
    unet: UNetConfig | None = None
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _check_paths(self.output_dir, self.data, first_stage=self.first_stage, start_from=self.start_from)
        if self.start_from is not None:
            if self.finetune.prior_weight > 0 and self.train.loss.weighting == "hybrid":
                raise ValueError("finetune.prior_weight is not for loss.weighting hybrid; set one of them otherwise")
            return
        if self.unet is None:
            raise ValueError("unet is missing; describe the network, or name a model to go on from in start_from")
        if self.space == "latent" and self.first_stage is None:
            raise ValueError("space is latent but first_stage is not set; name the folder of a trained autoencoder")
        if self.space == "pixel" and self.first_stage is not None:
            raise ValueError(
                f"first_stage is {self.first_stage!r} but space is pixel, which has none; set space: latent or drop it"
            )
        spacing, offset = self.schedule.timestep_spacing, self.schedule.steps_offset
        if self.space != "pixel" and spacing == "leading" and offset != 1:
            raise ValueError(
                f"schedule.steps_offset is {offset} with leading timesteps, but diffusers opens every latent model "
                "with 1; set schedule.steps_offset=1, or schedule.timestep_spacing=trailing"
            )
        check_precision(self.schedule.prediction_type, self.train.mixed_precision)
        schedule = NoiseSchedule.from_config(self.schedule)
        check_objective(self.train.loss, schedule, self.schedule.prediction_type, self.sample)
        grid = schedule.grid(self.sample.num_inference_steps, spacing, steps_offset=offset)
        check_first_step(schedule, grid, self.schedule.prediction_type, bounded=self.space == "pixel")

    @property
    def export(self) -> str:
        """What a run makes, and the name of its folder: "pipeline", or "lora" beside an untouched model."""
        return "lora" if self.start_from is not None and self.finetune.method == "lora" else "pipeline"


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    """What a first stage minimizes: LDM (arXiv:2112.10752), Eq. 25.

    Args:
        reconstruction: "l1" or "l2": mean absolute or squared error of an image's values. Its weight is 1.
        kl_weight: of KL(q(z|x) ‖ N(0, I)), summed over the latents of an image and divided by its number of values.
        codebook_weight: with a codebook, of |sg(z) − e|², which moves the codes (VQ-VAE, arXiv:1711.00937, Eq. 3).
        commitment_weight: of |z − sg(e)|², which moves the encoder: β there.
        perceptual_weight: of the distance of features of EfficientNet-Lite0, about 1 between different images.
        adversarial_weight: of the loss of a patch discriminator, times the adaptive weight.
        adversarial: "hinge" or "non_saturating".
        adversarial_start: first step with that loss.
        adaptive_weight_limit: maximum ratio of the gradients of both losses at the last layer of the decoder. The ratio
            is 0.5 to 1 while the discriminator works, and grows when its gradient vanishes.
    """

    __pydantic_config__ = {"extra": "forbid"}

    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    perceptual_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial: AdversarialLoss = "hinge"
    adversarial_start: int = 0
    adaptive_weight_limit: float = 10.0

    def __post_init__(self) -> None:
        _not_negative(self, "kl_weight", "codebook_weight", "commitment_weight", "perceptual_weight")
        _not_negative(self, "adversarial_weight", "adversarial_start")
        _positive(self, "adaptive_weight_limit")


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainingConfig:
    """A run of `train/train_autoencoder.py`.

    Args:
        autoencoder: keys of diffusers' AutoencoderKL: a first stage with a normal posterior, held by `loss.kl_weight`.
        vq: instead of it, keys of diffusers' VQModel: a first stage with a codebook.
        revive_codes_after: steps without use after which a code is put where a latent is; null revives none.
        start_from: folder or hub id of an autoencoder (or of a pipeline that holds one) that training goes on from;
            `autoencoder` and `vq` are then left out.
        trained: with `start_from`, "all" of it or the "decoder" alone, which leaves the latents as they are.
        discriminator: shape of the network that `loss.adversarial_weight` above 0 brings in.
    """

    __pydantic_config__ = {"extra": "forbid"}

    output_dir: str
    data: DataConfig
    train: TrainConfig
    autoencoder: AutoencoderConfig | None = None
    vq: VQConfig | None = None
    revive_codes_after: int | None = 100
    start_from: str | None = None
    trained: Literal["all", "decoder"] = "all"
    seed: int = 0
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        _check_paths(self.output_dir, self.data, start_from=self.start_from)
        if self.autoencoder is not None and self.vq is not None:
            raise ValueError(
                "autoencoder and vq are both set; a first stage has a normal posterior (autoencoder) or a codebook (vq)"
            )
        if self.start_from is None:
            if self.network is None:
                raise ValueError(
                    "autoencoder is missing; describe the network, or name one that training goes on from in "
                    "start_from (a network with a codebook is described in vq)"
                )
            if self.trained == "decoder":
                raise ValueError(
                    "trained is decoder, but a new network has no encoder to leave as it is; name a model in start_from"
                )
        _positive(self, "revive_codes_after")
        if self.network is not None:
            check_autoencoder(self.network, self.trained)
            self.check_regularizer(self.network)
        loss, side = self.loss, self.data.resolution
        if loss.perceptual_weight > 0 and side < MIN_IMAGE_SIZE:
            raise ValueError(
                f"data.resolution is {side}, and the perceptual distance needs {MIN_IMAGE_SIZE} pixels a side; set "
                "loss.perceptual_weight=0"
            )
        if loss.adversarial_weight == 0:
            return
        if loss.adversarial_start >= self.train.max_steps:
            raise ValueError(
                f"loss.adversarial_start is {loss.adversarial_start} and train.max_steps {self.train.max_steps}: the "
                "discriminator would never start; start it earlier, or set loss.adversarial_weight=0"
            )
        if side < self.discriminator.min_image_size:
            raise ValueError(
                f"data.resolution is {side}, which discriminator.levels {self.discriminator.levels} would halve to "
                "nothing; lower it"
            )
        if self.train.mixed_precision == "fp16":
            raise ValueError(
                "train.mixed_precision is fp16, whose range does not hold the gradients between autoencoder and "
                "discriminator (loss.adversarial_weight); choose bf16 or no"
            )

    @property
    def network(self) -> AutoencoderConfig | VQConfig | None:
        """The autoencoder that is described, of whichever kind; None if it is that of `start_from`."""
        return self.vq or self.autoencoder

    def check_regularizer(self, network: AutoencoderConfig | VQConfig) -> None:
        """Refuses what is set for the other kind of first stage than `network`. Raises ValueError naming the key."""
        is_kl = isinstance(network, AutoencoderConfig)
        wrong = ("codebook_weight", "commitment_weight") if is_kl else ("kl_weight",)
        kind = "a normal posterior" if is_kl else "a codebook"
        for key in wrong:
            if getattr(self.loss, key) != getattr(AutoencoderLossConfig(), key):
                raise ValueError(f"loss.{key} is set, but a first stage with {kind} has no such term; leave it out")
        if is_kl and self.revive_codes_after != type(self).revive_codes_after:
            raise ValueError(
                "revive_codes_after is set, but a first stage with a normal posterior has no codes; leave it out"
            )


def section_name(network: AutoencoderConfig | VQConfig) -> str:
    """The section of a config that describes such a network."""
    return "vq" if isinstance(network, VQConfig) else "autoencoder"


def check_autoencoder(autoencoder: AutoencoderConfig | VQConfig, trained: Literal["all", "decoder"]) -> None:
    """Refuses an autoencoder that `train/train_autoencoder.py` cannot train. Raises ValueError naming the key."""
    for key in ("use_quant_conv", "use_post_quant_conv"):
        if trained == "all" and isinstance(autoencoder, AutoencoderConfig) and not getattr(autoencoder, key):
            raise ValueError(f"autoencoder.{key} is false; the statistics of the latents are folded into it, leave it")
    for key in ("in_channels", "out_channels"):
        if getattr(autoencoder, key) != 3:
            raise ValueError(
                f"{section_name(autoencoder)}.{key} is {getattr(autoencoder, key)}; images are RGB, leave it at 3"
            )
