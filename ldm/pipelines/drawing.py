"""From text to pictures: the parts of a model, and the call that draws with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ldm.codecs import Codec, Tile
from ldm.diffusion import LogLikelihood, NoiseSchedule, ScheduleConfig, State, Step
from ldm.diffusion.schedule import check_precision
from ldm.models import UNet
from ldm.pipelines.arguments import image_prompts, image_seeds, number, whole
from ldm.pipelines.finite import NotFinite, Watch, finite, named, remedy
from ldm.pipelines.images import to_pil
from ldm.pipelines.memory import Room, room_for, said_in_one_line, unet_bytes
from ldm.pipelines.sampling import Settings, bounds, direct, draw_noise, find_sampler, guided, walk
from ldm.pipelines.schedulers import Scheduler
from ldm.text import CutPromptWarning, TextEncoder

OnStep = Callable[[State], None]
_FIT = "choose a smaller size, or fewer pictures at a time"


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL, RGB; `seeds`: the seed of each, which gives that image again, alone or in any batch."""

    images: list[Image.Image]
    seeds: list[int]


class Drawing:
    """The parts of a text-to-image model, and the call that draws.

    Args:
        guidance_scale, num_inference_steps, sampler: the defaults of `__call__`, stored with the model.
    """

    def __init__(
        self,
        *,
        unet: UNet,
        codec: Codec,
        text_encoder: TextEncoder,
        schedule: ScheduleConfig,
        guidance_scale: float = 7.5,
        num_inference_steps: int = 50,
        sampler: str = "ddim",
    ) -> None:
        if unet.config.in_channels != codec.channels:
            raise ValueError(
                f"unet/config.json says in_channels {unet.config.in_channels} but the codec makes {codec.channels} "
                "channels; the parts are from different models"
            )
        if unet.config.cross_attention_dim != text_encoder.hidden_size:
            raise ValueError(
                f"unet/config.json says cross_attention_dim {unet.config.cross_attention_dim} but the text encoder "
                f"makes states of size {text_encoder.hidden_size}; the parts are from different models"
            )
        find_sampler(sampler)
        self.unet = unet
        self.codec = codec
        self.text_encoder = text_encoder
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.num_inference_steps = num_inference_steps
        self.sampler = sampler

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        dynamic_threshold: float | None = None,
        classifier: LogLikelihood | None = None,
        classifier_scale: float = 1.0,
        sampler: str | Scheduler | None = None,
        sampler_options: Mapping[str, float] | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> PipelineOutput:
        """Draws images: a sampler with classifier-free guidance, then decoding.

        A call for more images than fit into memory draws them in chunks, in their order; it is cut by a fixed number
        of bytes (`ldm.pipelines.memory`), so that the images are the same up to rounding. Prompts are encoded once.

        Args:
            prompt: one text, or a list; images come in its order, `num_images_per_prompt` of each.
            negative_prompt: what to lead away from: one text, or one a prompt; "" by default.
            height, width: in pixels, divisible by the codec's factor; by default that of `latents` where they are
                given, else the size of training.
            num_inference_steps: S, 1 to the number of training timesteps.
            guidance_scale: w of ε_∅ + w (ε_c − ε_∅), finite; 1 is no guidance.
            guidance_rescale: φ, 0 to 1, against the over-exposure of large scales; 0.7 is usual
                (arXiv:2305.08891, Eq. 16), with networks of ε rather less.
            guidance_interval: (low, high), noise levels σ/α with 0 <= low < high; outside them the scale is 1 and
                the unconditional half is not computed (arXiv:2404.07724).
            dynamic_threshold: p, in (0, 1], of Imagen's thresholding of x̂_0, for models of pixels; 0.995 is usual.
            classifier: a function (x_t [B, C, h, w], t) → log p(y | x_t), [B], whose gradient guides
                (arXiv:2105.05233); x_t is what is diffused, latents where the model diffuses latents.
                Such a call is not cut into chunks, as y may differ between images.
            classifier_scale: by how much; 1 samples p(x | prompt, y).
            sampler: a name of `ldm.pipelines.SAMPLERS`, or a scheduler object of diffusers; None is the model's own.
            sampler_options: `step_size` and `num_langevin_steps` of "langevin" (0.2 and 100 calls a noise level, as in
                NCSN), `snr` and `num_corrector_steps` of "predictor-corrector" (0.01 and 1).
            eta: of DDIM: 0 (deterministic) to 1 (the variance of DDPM).
            seed: an int (image i gets seed + i), one int an image, or None for fresh ones. Image i equals what
                its seed gives alone; noise comes from `torch.Generator("cpu").manual_seed(seed)`.
            latents: x_T instead of noise from the seeds, [images, C, h, w], standard normal.
            on_step: called with the `State` of every step; `preview` makes pictures of it. A call that is cut into
                chunks goes through all steps with the first chunk, then with the next: `state.index` begins again
                at 0, and `state.latents` holds the images of that chunk alone.

        Raises:
            ValueError: naming the argument, its value and the range; for what does not fit into memory; and
                `NotFinite`, naming the step, for a sample that is not finite.

        Warns:
            CutPromptWarning: once, naming the words of all prompts that the text encoder has no room for.
        """
        prompts, negatives = image_prompts(prompt, negative_prompt, num_images_per_prompt)
        settings = self._settings(
            num_inference_steps,
            guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            dynamic_threshold=dynamic_threshold,
            classifier=classifier,
            classifier_scale=classifier_scale,
            sampler=self.sampler if sampler is None else sampler,
            sampler_options=sampler_options,
            eta=eta,
        )
        if on_step is not None and not callable(on_step):
            raise ValueError(f"on_step is {on_step!r}; it must be a function of a State")
        repeated = whole("num_images_per_prompt", num_images_per_prompt)
        count = len(prompts) * repeated
        if latents is not None:
            _check_latents(latents)
        if latents is not None and latents.ndim == 4:
            height = latents.shape[2] * self.codec.factor if height is None else height
            width = latents.shape[3] * self.codec.factor if width is None else width
        room = self._room(count, height, width, settings, texts=len({*prompts, *negatives}))
        seeds = image_seeds(seed, count)
        blank = self._blank(count, height, width)
        if latents is not None and latents.shape != blank.shape:
            raise ValueError(
                f"latents have shape {list(latents.shape)}; {count} images of this size need {list(blank.shape)}"
            )
        self._warn_of_cut(*prompts, *negatives)
        with said_in_one_line("the encoded prompts", "give fewer of them at a time"):
            condition, asked = self._encoded(prompts)
            null, avoided = self._encoded(negatives)

        def final(images: range) -> Tensor:
            generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in images]
            start = draw_noise(generators, blank) if latents is None else latents[images.start : images.stop].to(blank)
            own = [i // repeated for i in images]
            return self._walk(
                condition[[asked[i] for i in own]],
                null[[avoided[i] for i in own]],
                start,
                settings,
                generators,
                first=images.start,
                on_step=on_step,
            )

        return PipelineOutput(self._drawn(count, room, final), seeds)

    def tile(self, size: Tile) -> None:
        """Says how much of a large picture the first stage encodes or decodes at a time: about size² pixels.

        The pictures stay the same up to rounding. "auto", as a model begins, does so where a picture as a whole would
        need more than 3 GiB; "off" never. A model of pixels has nothing to decode, and does not mind.

        Raises:
            ValueError: for anything else, and a size below 16.
        """
        self.codec.tile(size)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of training, in pixels."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) or size is None else size
        return (height or 64) * self.codec.factor, (width or 64) * self.codec.factor

    def _settings(self, num_inference_steps: int | None, guidance_scale: float | None, **others: object) -> Settings:
        """The settings, with the defaults of this model, checked as far as can be before anything is computed."""
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        settings = Settings(
            num_inference_steps=whole("num_inference_steps", steps),
            guidance_scale=number("guidance_scale", scale),
            **others,  # type: ignore[arg-type]
        )
        self._grid(settings)
        bounds(self.codec, settings.dynamic_threshold)
        weight = self.unet.conv_in.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        check_precision(self.schedule.prediction_type, str(dtype).removeprefix("torch."))
        return settings

    def _grid(self, settings: Settings) -> tuple[Step, ...]:
        schedule = NoiseSchedule.from_config(self.schedule)
        if not isinstance(settings.sampler, str):
            return schedule.grid(settings.num_inference_steps)  # only counts: a scheduler object has its own
        return schedule.grid(
            settings.num_inference_steps, self.schedule.timestep_spacing, steps_offset=self.schedule.steps_offset
        )

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, those of training where they are not given."""
        default_height, default_width = self.default_size
        return (
            default_height if height is None else whole("height", height),
            default_width if width is None else whole("width", width),
        )

    def _blank(self, images: int, height: int | None, width: int | None) -> Tensor:
        """Zeros in the shape, [images, C, h, w], and with the dtype and device of what is diffused."""
        shape = self.codec.latent_shape(*self._size(height, width))
        weight = self.unet.conv_in.weight
        return torch.zeros((), device=weight.device, dtype=weight.dtype).expand(images, *shape)

    def _room(self, count: int, height: int | None, width: int | None, settings: Settings, *, texts: int = 2) -> Room:
        """How many of `count` images are computed at a time; ValueError where one is too large, or all are.

        Args:
            texts: how many are encoded.
        """
        size = self._size(height, width)
        weight, length = self.unet.conv_in.weight, self.text_encoder.max_length * self.text_encoder.hidden_size
        _, h, w = self.codec.latent_shape(*size)
        guided = 1 if settings.guidance_scale == 1 else 2  # conditions that go through the network
        each = unet_bytes(self.unet.config, h, w, weight.element_size()) + length * weight.element_size()
        return room_for(
            count,
            size,
            each=guided * each,
            decoding=self.codec.bytes_to_decode(*size),
            device=weight.device,
            beside=texts * length * weight.element_size(),
            together=settings.classifier is not None,
        )

    def _drawn(self, count: int, room: Room, final: Callable[[range], Tensor]) -> list[Image.Image]:
        """All pictures, a chunk at a time; `final` gives the latents [B, C, h, w] of some of them."""
        pictures: list[Image.Image] = []
        for start in range(0, count, room.drawn):
            chunk = range(start, min(start + room.drawn, count))
            with said_in_one_line(f"{len(chunk)} pictures at once" if len(chunk) > 1 else "a picture", _FIT):
                pictures += self._pictures(final(chunk), room.decoded, first=start)
        return pictures

    def _pictures(self, latents: Tensor, at_once: int, *, first: int = 0) -> list[Image.Image]:
        """The pictures of latents [B, C, h, w], of which the first is number `first` of the call."""
        pictures: list[Image.Image] = []
        for part in latents.split(at_once):
            decoded = self.codec.decode(part)
            sound = finite(decoded).tolist()
            if not all(sound):
                raise NotFinite(
                    f"{named(sound, first + len(pictures))} left the finite numbers (nan or inf) when decoded; "
                    f"{remedy(decoded.dtype)}"
                )
            pictures += to_pil(decoded)
        return pictures

    def _warn_of_cut(self, *prompts: str) -> None:
        """For methods under `torch.inference_mode()`: the warning points at the line that called them."""
        cut = self.text_encoder.cut(prompts)
        if cut:
            warnings.warn(cut, CutPromptWarning, stacklevel=4)

    def _states(self, prompts: list[str]) -> Tensor:
        """Hidden states [B, L, D]; each different prompt is encoded once."""
        states, rows = self._encoded(prompts)
        return states[rows]

    def _encoded(self, prompts: list[str]) -> tuple[Tensor, list[int]]:
        """Hidden states [U, L, D] of the different prompts, and the row of each prompt in them."""
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        states = self.text_encoder(list(places)).to(self.unet.conv_in.weight.dtype)
        sound = finite(states).tolist()
        if not all(sound):
            raise NotFinite(
                f"the text encoder left the finite numbers (nan or inf) at {list(places)[sound.index(False)]!r}; "
                f"{remedy(states.dtype)}"
            )
        return states, [places[prompt] for prompt in prompts]

    def _walk(
        self,
        condition: Tensor,
        null: Tensor,
        latents: Tensor,
        settings: Settings,
        generators: Sequence[torch.Generator],
        *,
        grid: Sequence[Step] | None = None,
        first: int = 0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """From `latents` at the first step of the grid (by default, of the whole one) to its end; all [B, C, h, w].

        Args:
            first: the number of the first of these images in the call, for errors.
        """
        schedule = NoiseSchedule.from_config(self.schedule)
        network, prediction_type = direct(self.unet, schedule, self.schedule.prediction_type)
        watch = Watch(settings.guidance_scale, first)
        states = walk(
            settings,
            watch.around(guided(network, condition, null, schedule, prediction_type, settings)),
            latents,
            schedule,
            self._grid(settings) if grid is None else grid,
            generators=generators,
            project=bounds(self.codec, settings.dynamic_threshold),
            prediction_type=prediction_type,
            learned_variance=self.unet.config.learned_variance,
        )
        return watch.last_of(states, on_step)


def _check_latents(latents: object) -> None:
    if not isinstance(latents, Tensor):
        found = f"a {type(latents).__name__}"
    elif latents.is_meta or latents.is_complex():
        found = f"a tensor of {latents.dtype} on {latents.device}"
    elif not bool(latents.float().isfinite().all()):
        found = "with nan or inf in it"
    else:
        return
    raise ValueError(f"latents is {found}; it must be a tensor of finite numbers, standard normal noise")
