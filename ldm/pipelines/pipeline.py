"""The text-to-image pipeline: load, generate, interpolate, vary, invert, save, and LoRAs."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import disk, hub, lora, lora_files
from ldm.codecs import Codec, LatentCodec, PixelCodec, Tile
from ldm.diffusion import NoiseSchedule, ScheduleConfig, State, Step, ddim_inversion, slerp, with_condition
from ldm.diffusion.diffusers_schedulers import scheduler_class
from ldm.diffusion.schedule import check_precision
from ldm.models import UNet, set_attention_backend
from ldm.pipelines.images import check_images, contact_sheet, from_pil, png_bytes, to_pil
from ldm.pipelines.memory import CHUNK_BYTES, ChunkSizes, chunk_sizes, explain_out_of_memory, unet_bytes
from ldm.pipelines.sampling import (
    SAMPLERS,
    FiniteCheck,
    NotFinite,
    SamplingKwargs,
    SamplingParams,
    as_epsilon_model,
    as_int,
    as_list,
    cpu_generators,
    describe_sampler,
    find_sampler,
    image_names,
    image_prompts,
    image_seeds,
    is_finite,
    remedy,
    sample,
    sample_noise,
    with_guidance,
    x0_bounds,
)
from ldm.progress import error_reason
from ldm.text import REFERENCE, CutPromptWarning, TextEncoder, load_text_encoder_folders, reference_to
from ldm.weights import check_dtype, check_weights, converted, refuse_untrusted

OnStep = Callable[[State], None]

LATENT_CLASS = "StableDiffusionPipeline"
CODEBOOK_CLASS = "CodebookDiffusionPipeline"  # latent too, but diffusers' pipelines cannot decode it
PIXEL_CLASS = "PixelDiffusionPipeline"
CLASSES = {"AutoencoderKL": LATENT_CLASS, "VQModel": CODEBOOK_CLASS, None: PIXEL_CLASS}  # by the first stage
SKIPPED = {"safety_checker", "feature_extractor", "image_encoder"}
READ = set(hub.PARTS)
DEFAULTS = ("guidance_scale", "num_inference_steps", "sampler")  # of sampling; they are stored with a model
LIBRARIES = ("diffusers", "transformers", "ldm")  # of components; any other name is a module in the folder


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL, RGB; `seeds`: the seed of each, which gives that image again, alone or in any batch."""

    images: list[Image.Image]
    seeds: list[int]

    def _repr_png_(self) -> bytes:
        """In a notebook: all images, eight a row."""
        rows = [self.images[start : start + 8] for start in range(0, len(self.images), 8)]
        return png_bytes(contact_sheet(rows, size=max(self.images[0].width, 96)))


class Pipeline:
    """A text-to-image model: UNet, codec, text encoder and schedule, with LoRAs on top.

    Calling it generates images; see also `interpolate`, `variations`, `invert` and `preview`.

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
            says, makes = unet.config.in_channels, codec.channels
            what = f"in_channels {says} but the codec makes {makes} channels"
            raise ValueError(f"unet/config.json says {what}; they are from different models")
        if unet.config.cross_attention_dim != text_encoder.hidden_size:
            says, makes = unet.config.cross_attention_dim, text_encoder.hidden_size
            what = f"cross_attention_dim {says} but the text encoder makes states of size {makes}"
            raise ValueError(f"unet/config.json says {what}; they are from different models")
        find_sampler(sampler)
        self.unet = unet
        self.codec = codec
        self.text_encoder = text_encoder
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.num_inference_steps = num_inference_steps
        self.sampler = sampler

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ) -> Pipeline:
        """Opens a pipeline folder, ours or a Stable Diffusion 1.x/2.x one of diffusers, a hub id, or "scenes-64".

        Args:
            device: where it runs; None takes `default_device`.
            dtype: of weights and computation; float32, or float16/bfloat16 on a GPU.
            attention: "sdpa", or "xformers" where that is installed, on CUDA.

        Raises:
            ValueError: naming the file that is missing, damaged or of another model.
        """
        place = usable_device(device)
        check_dtype(dtype)
        folder = hub.find_pipeline(name)
        for part in (".", *hub.PARTS):
            refuse_untrusted(folder / part)
        index = hub.read_json(folder / "model_index.json")
        index_file, name_of_class = folder / "model_index.json", index.get("_class_name")
        if name_of_class not in CLASSES.values():
            supported = f"{LATENT_CLASS} (1.x and 2.x) and the models of ldm itself"
            raise ValueError(f"{index_file} describes a {name_of_class}; supported are {supported}")
        parts = {key for key, value in index.items() if isinstance(value, list) and value and value[0] is not None}
        if unknown := parts - READ - SKIPPED:
            known = ", ".join(sorted(READ))
            raise ValueError(f"{index_file} has the component {min(unknown)}; supported are {known}")
        for part in sorted(parts & READ):
            if index[part][0] not in LIBRARIES:
                why = f"takes the {part} from {index[part][0]!r}, code that comes with the model, which is never run"
                raise ValueError(f"{index_file} {why}; components are of {', '.join(LIBRARIES)}")
        if missing := {"unet", "text_encoder", "tokenizer", "scheduler"} - parts:
            raise ValueError(f"{index_file} has no {min(missing)}; the model folder is incomplete")
        unet = hub.load_model(folder / "unet", "UNet2DConditionModel", dtype)
        assert isinstance(unet, UNet)
        codec: PixelCodec | LatentCodec
        if "codec" in index:
            codec = hub.load_pixel_codec(folder / "codec")
        else:
            codec = LatentCodec(hub.load_autoencoder(folder / "vae", dtype), source=folder / "vae")
        schedule = hub.load_schedule(folder / "scheduler", str(index["scheduler"][-1]))
        defaults = index.get("_ldm") or {}
        if not defaults:  # diffusers' StableDiffusionPipeline sets this whatever the file says
            schedule = dataclasses.replace(schedule, steps_offset=1)
        pipeline = cls(
            unet=unet,
            codec=codec,
            text_encoder=load_text_encoder_folders(folder / "text_encoder", folder / "tokenizer"),
            schedule=schedule,
            **{key: value for key, value in defaults.items() if key in DEFAULTS},
        )
        pipeline.to(place, dtype)
        set_attention_backend(pipeline.unet, attention)
        return pipeline

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        **sampling: Unpack[SamplingKwargs],
    ) -> PipelineOutput:
        """Generates images from text; more than fit into memory in chunks, with the same result up to rounding.

        Args:
            prompt: one text, or a list; images come in its order, `num_images_per_prompt` of each.
            negative_prompt: one text, or one per prompt; "" by default.
            height, width: in pixels, divisible by the codec's factor; by default the size of `latents` if given, else
                the training size.
            seed: an int (image i gets seed + i), one int per image, or None for new ones. An image depends on its seed
                alone; noise comes from `torch.Generator("cpu").manual_seed(seed)`.
            latents: x_T instead of noise from the seeds, [images, C, h, w], standard normal.
            on_step: called with the `State` of every step, of one chunk after the other; `preview` decodes one.
            sampling: see `SamplingKwargs`.

        Raises:
            ValueError: naming the argument, its value and the range; if an image does not fit into memory; and
                `NotFinite`, naming the step, for a sample that is not finite.

        Warns:
            CutPromptWarning: once, naming the words that the text encoder cuts off.
        """
        prompts, negatives = image_prompts(prompt, negative_prompt, num_images_per_prompt)
        params = self.sampling_params(**sampling)
        if on_step is not None and not callable(on_step):
            raise ValueError(f"on_step is {on_step!r}; it must be a function of a State")
        per_prompt = as_int("num_images_per_prompt", num_images_per_prompt)
        count = len(prompts) * per_prompt
        if latents is not None:
            found = ""
            if not isinstance(latents, Tensor):
                found = f"a {type(latents).__name__}"
            elif latents.is_meta or latents.is_complex():
                found = f"a tensor of {latents.dtype} on {latents.device}"
            elif not bool(latents.float().isfinite().all()):
                found = "with nan or inf in it"
            if found:
                raise ValueError(f"latents is {found}; it must be a tensor of finite numbers, standard normal noise")
            if latents.ndim == 4:
                height = latents.shape[2] * self.codec.factor if height is None else height
                width = latents.shape[3] * self.codec.factor if width is None else width
        chunks = self._chunk_sizes(count, height, width, params, texts=len({*prompts, *negatives}))
        seeds = image_seeds(seed, count)
        blank = self._blank(count, height, width)
        if latents is not None and latents.shape != blank.shape:
            raise ValueError(f"latents have shape {list(latents.shape)}; {count} images need {list(blank.shape)}")
        self._warn_of_cut(*prompts, *negatives)
        with explain_out_of_memory("the encoded prompts", "give fewer of them at a time"):
            condition, prompt_rows = self._encode_unique(prompts)
            null, negative_rows = self._encode_unique(negatives)

        def final_latents(images: range) -> Tensor:
            generators = cpu_generators(seeds[images.start : images.stop])
            given = None if latents is None else latents[images.start : images.stop].to(blank)
            return self._sample(
                condition[[prompt_rows[i // per_prompt] for i in images]],
                null[[negative_rows[i // per_prompt] for i in images]],
                sample_noise(generators, blank) if given is None else given,
                params,
                generators,
                first=images.start,
                on_step=on_step,
            )

        return PipelineOutput(self._generate(count, chunks, final_latents), seeds)

    @torch.inference_mode()
    def interpolate(
        self,
        prompt: str | Sequence[str],
        seeds: Sequence[int],
        steps: int = 8,
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        **sampling: Unpack[SamplingKwargs],
    ) -> PipelineOutput:
        """A row of images from one seed, and from one prompt, to another.

        Spherical in x_T (DDIM, section 5.3 and appendix D.5) and, between two prompts, linear in the text states. The
        ends are what `__call__` generates from their prompt and seed.

        Args:
            prompt: one text, or two for the ends.
            seeds: two, for the ends; equal if only the prompt changes.
            steps: the number of images, ends included, at least 2.
            sampling: see `SamplingKwargs`; the sampler must be deterministic and is "ddim" by default.

        Raises:
            ValueError: naming the argument, its value and the range; so do `variations` and `invert`.
        """
        prompts = [prompt, prompt] if isinstance(prompt, str) else as_list("prompt", prompt, "one text, or two")
        if len(prompts) != 2:
            raise ValueError(f"there are {len(prompts)} prompts; give one, or the two to go between")
        steps = as_int("steps", steps)
        if steps < 2:
            raise ValueError(f"steps is {steps}; it must be at least 2, the two ends")
        ends = image_seeds(as_list("seeds", seeds, "two, those of the ends"), 2)
        prompts, negatives = image_prompts(prompts, _one_text("negative_prompt", negative_prompt or ""), 1)
        sampling.setdefault("sampler", "ddim")
        params = self.sampling_params(**sampling)
        if params.eta > 0:
            raise ValueError(f"eta is {params.eta}, which adds noise; interpolation needs none: leave it out")
        if params.stochastic or not isinstance(params.sampler, str):
            known = ", ".join(name for name, row in SAMPLERS.items() if not row.stochastic)
            name = describe_sampler(params.sampler)
            raise ValueError(f"sampler is {name}; interpolation needs one without noise: choose one of {known}")
        chunks = self._chunk_sizes(steps, height, width, params)
        blank = self._blank(1, height, width)
        start, end = (sample_noise(cpu_generators([seed]), blank) for seed in ends)
        self._warn_of_cut(*prompts, *negatives)
        first, last = self._encode(prompts)  # [L, D] each
        null = self._encode(negatives[:1])  # [1, L, D]

        def final_latents(images: range) -> Tensor:
            fractions = [i / (steps - 1) for i in images]
            latents = torch.cat([slerp(start, end, fraction) for fraction in fractions])  # [B, C, h, w]
            condition = torch.stack([torch.lerp(first, last, fraction) for fraction in fractions])  # [B, L, D]
            return self._sample(condition, null.expand(len(images), -1, -1), latents, params, [], first=images.start)

        return PipelineOutput(self._generate(steps, chunks, final_latents), ends)

    @torch.inference_mode()
    def variations(
        self,
        prompt: str,
        *,
        shared_until: int,
        shared_seed: int,
        seed: int | Sequence[int] | None = None,
        count: int = 4,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        **sampling: Unpack[SamplingKwargs],
    ) -> PipelineOutput:
        """Several images that share their noise down to a timestep, and so coarse structure. DDPM, Figure 7.

        Args:
            shared_until: t, a training timestep; x at the first step of the grid at or below t is common to all.
            shared_seed: of x_T and of the noise down to t.
            seed: of the noise after t, as in `__call__`.
            count: the number of images.
            sampling: see `SamplingKwargs`; the sampler must add noise: "ddpm" by default, "ddim" with eta above 0.
        """
        count = as_int("count", count)
        if count < 1:
            raise ValueError(f"count is {count}; it must be at least 1")
        texts = _one_text("prompt", prompt), _one_text("negative_prompt", negative_prompt or "")
        prompts, negatives = image_prompts(*texts, 1)
        sampling.setdefault("sampler", "ddpm")
        params = self.sampling_params(**sampling)
        if not params.stochastic:
            known = ", ".join(name for name, row in SAMPLERS.items() if row.stochastic)
            what = f"sampler is {describe_sampler(params.sampler)} with eta {params.eta}, which adds no noise"
            raise ValueError(f"{what}, so that all images would be the same; choose {known}, or ddim with eta above 0")
        shared_until, shared_seed = as_int("shared_until", shared_until), as_int("shared_seed", shared_seed)
        grid = self._grid(params)
        if not grid[-1].t <= shared_until <= grid[0].t:
            ends = f"from {grid[-1].t} (the last of these {len(grid)} steps) to {grid[0].t} (only x_T is shared)"
            raise ValueError(f"shared_until is {shared_until}; it must be a timestep {ends}")
        own_grid = [step for step in grid if step.t <= shared_until]
        shared_grid = grid[: len(grid) - len(own_grid)]
        chunks = self._chunk_sizes(count, height, width, params)
        generators = cpu_generators(image_seeds(shared_seed, 1))
        seeds = image_seeds(seed, count)
        if shared_seed in seeds:
            own = f"the seed of image {seeds.index(shared_seed)}, whose noise would start with x_T again"
            raise ValueError(f"shared_seed is {shared_seed}, and so is {own}; choose another")
        self._warn_of_cut(*prompts, *negatives)
        condition, null = self._encode(prompts), self._encode(negatives)  # [1, L, D]
        shared = sample_noise(generators, self._blank(1, height, width))  # [1, C, h, w]
        if shared_grid:
            shared = self._sample(condition, null, shared, params, generators, grid=shared_grid)

        def final_latents(images: range) -> Tensor:
            generators = cpu_generators(seeds[images.start : images.stop])
            shape = (len(images), -1, -1)
            texts, noise = (condition.expand(shape), null.expand(shape)), shared.expand(*shape, -1)
            return self._sample(*texts, noise, params, generators, grid=own_grid, first=images.start)

        return PipelineOutput(self._generate(count, chunks, final_latents), seeds)

    @torch.inference_mode()
    def invert(
        self,
        image: Image.Image | Sequence[Image.Image],
        prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """The x_T, [B, C, h, w], from which DDIM generates an image: DDIM inversion (arXiv:2010.02502, section 5.4).

        Without guidance (scale 1), because both directions must see the same predictions:

            x_T = pipeline.invert(image, "a cat")
            pipeline("a cat", latents=x_T, guidance_scale=1)      # the image again; more steps bring it closer
            pipeline("a dog", latents=x_T)                        # the image, edited

        Args:
            image: RGB, or a list of one size; divisible by the codec's factor. A latent model reconstructs only as well
                as its autoencoder.
            prompt: its caption: one text, or one per image.
            num_inference_steps: S; reconstruct with the same.
        """
        images = [image] if isinstance(image, Image.Image) else as_list("image", image, "an image, or a list of them")
        texts = [prompt] * len(images) if isinstance(prompt, str) else as_list("prompt", prompt, "one text, or a list")
        if len(texts) != len(images):
            raise ValueError(f"there are {len(texts)} prompts for {len(images)} images; give one, or one per image")
        check_images(images)
        width, height = images[0].size
        params = self.sampling_params(num_inference_steps=num_inference_steps, guidance_scale=1.0)
        prompts, _ = image_prompts(texts, None, 1)
        self._warn_of_cut(*prompts)
        chunks = self._chunk_sizes(len(images), height, width, params, texts=len({*prompts}))
        blank = self._blank(1, height, width)
        schedule = NoiseSchedule.from_config(self.schedule)
        network, prediction_type = as_epsilon_model(self.unet, schedule, self.schedule.prediction_type)
        condition = self._encode(prompts)
        noise = []
        size = min(chunks.sampled, chunks.decoded)
        for first in range(0, len(images), size):
            pixels = from_pil(images[first : first + size])  # [B, 3, H, W]
            with explain_out_of_memory("the images", "invert smaller ones, or fewer at a time"):
                check = FiniteCheck(first=first)
                states = ddim_inversion(
                    check.wrap(with_condition(network, condition[first : first + size])),
                    self.codec.sample_latents(self.codec.moments(pixels.to(blank))),
                    schedule,
                    self._grid(params),
                    prediction_type=prediction_type,
                )
                noise.append(check.final_latents(states))
        return torch.cat(noise)

    @torch.inference_mode()
    def preview(self, state: State) -> list[Image.Image]:
        """x̂_0 of a step as images, for `on_step` of `__call__`; ValueError if not finite (`NotFinite`) or too large."""
        height, width = (size * self.codec.factor for size in state.latents.shape[2:])
        batch_size = max(1, CHUNK_BYTES // self.codec.decode_bytes(height, width))
        with explain_out_of_memory("the preview", "preview smaller images, or fewer at a time"):
            return self._decode(state.pred_original_sample, batch_size)

    def tile(self, size: Tile) -> None:
        """Sets how much of a large image the first stage computes at a time: about size² pixels (ValueError below 16²).

        The result is the same up to rounding. "auto", the default, does so if the whole image would need more than 3
        GiB; "off" never. Pixel models ignore it.
        """
        self.codec.tile(size)

    @property
    def device(self) -> torch.device:
        """Of the UNet."""
        return self.unet.conv_in.weight.device

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of training, in pixels."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) or size is None else size
        return (height or 64) * self.codec.factor, (width or 64) * self.codec.factor

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Pipeline:
        """Moves every network to `device` (and `dtype`); returns the pipeline.

        ValueError for a device that is not there or too small, and a dtype that networks cannot have.
        """
        if device is not None:
            device = usable_device(device)
        if dtype is not None:
            check_dtype(dtype)
        with explain_out_of_memory(f"the model on {device}", "take a dtype of half the size, or another device"):
            self.unet.to(device=device, dtype=dtype)
            self.codec.to(device=device, dtype=dtype)
            self.text_encoder.to(device, dtype)
        return self

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        shard_bytes: int | None = None,
        text_encoder: Literal["files", "reference"] = "files",
    ) -> None:
        """Writes the pipeline folder, atomically; a latent one opens in diffusers' StableDiffusionPipeline.

        Where the first stage has a codebook, that pipeline cannot decode; UNet and VQModel open one by one.

        Args:
            folder: where. The files of an older model are replaced once the new one is complete (`hub.atomic_folder`);
                others stay, such as README.md and .git of a clone; links are followed.
            dtype: of the stored weights of the UNet.
            shard_bytes: of weights in each file at most; None writes one file.
            text_encoder: "reference" writes the name of an encoder of a package, not its files: a small folder, which
                diffusers cannot open.

        Raises:
            ValueError: for a folder that holds other things and no model, a file, a link to nothing; a reference to an
                encoder of no package; weights that are not finite in `dtype`, or predict the posterior mean in half
                precision; and while LoRAs are loaded that are not merged.
        """
        if text_encoder not in ("files", "reference"):
            raise ValueError(f"text_encoder is {text_encoder!r}; it is 'files' or 'reference'")
        loaded = {name for part in self._adapted for name in lora.adapter_names(part) if not lora.is_merged(part)}
        if loaded:
            how = "merge_lora() to save the model with it, unload_lora() to save it without"
            raise ValueError(f"the LoRA {min(loaded)!r} is loaded; {how}")
        check_dtype(dtype)
        check_precision(self.schedule.prediction_type, str(dtype).removeprefix("torch."))
        weights = self.unet.state_dict()
        check_weights(weights, "unet")
        converted(weights, dtype, "unet")
        codec = _unwrapped(self.codec)
        if isinstance(codec, LatentCodec):
            check_weights(codec.autoencoder.state_dict(), "the autoencoder")
        reference = reference_to(self.text_encoder) if text_encoder == "reference" else None
        place = disk.writable_folder(folder)
        with hub.atomic_folder(place) as target:
            hub.write_json(target / "model_index.json", self.index())
            hub.save_model(target / "unet", self.unet, dtype, shard_bytes)
            hub.save_schedule(target / "scheduler", self.schedule, self.unet.config.learned_variance)
            if reference is None:
                self.save_frozen(target)
            else:
                (target / "text_encoder").mkdir()
                hub.write_json(target / "text_encoder" / REFERENCE, reference)
                self._save_codec(target)
        if reference is None:
            self.text_encoder.set_source(place, changed=lora.is_merged(self.text_encoder.model))

    def save_frozen(self, folder: Path) -> None:
        """Writes the parts that training of the UNet leaves alone: text encoder, tokenizer, codec."""
        self.text_encoder.save(folder, changed=lora.is_merged(self.text_encoder.model))
        self._save_codec(folder)

    def _save_codec(self, folder: Path) -> None:
        codec = _unwrapped(self.codec)
        if isinstance(codec, LatentCodec):
            if codec.source is not None and hub.has_weights(codec.source, codec.autoencoder):
                hub.copy_model(codec.source, folder / "vae")
            else:
                hub.save_model(folder / "vae", codec.autoencoder)
        elif isinstance(codec, PixelCodec):
            hub.save_pixel_codec(folder / "codec", codec)

    @property
    def _adapted(self) -> tuple[nn.Module, nn.Module]:
        """The networks that a LoRA may change."""
        return _unwrapped(self.unet), _unwrapped(self.text_encoder.model)

    @property
    def lora(self) -> dict[str, float]:
        """The LoRAs that are on, with their weights."""
        return {name: weight for part in self._adapted for name, weight in lora.adapter_weights(part).items()}

    def load_lora(self, source: str | os.PathLike[str], *, name: str = "default", weight: float = 1.0) -> None:
        """Adds a LoRA of diffusers, peft or kohya to UNet and text encoder; others that are loaded stay as they are.

        Args:
            source: a `.safetensors` file, a folder with one, or a hub id.
            name: for `set_lora`.
            weight: how much of it is added: 1 as it was trained, 0 nothing.

        Raises:
            ValueError: naming the file and what is wrong with it; the pipeline is unchanged then.
        """
        lora_files.load_adapter(self.unet, source, name, weight=weight, text_encoder=self.text_encoder.model)

    def set_lora(self, weights: Mapping[str, float]) -> None:
        """Turns on the LoRAs that are named, with these weights, and turns off the others; {} is all off."""
        loaded = [set(lora.adapter_names(part)) for part in self._adapted]
        for name in weights.keys() - set.union(*loaded):
            raise ValueError(f"there is no LoRA {name!r}; loaded: {', '.join(sorted(set.union(*loaded))) or 'none'}")
        for name, weight in weights.items():
            lora.check_weight(name, weight)  # before anything is changed
        for part, names in zip(self._adapted, loaded, strict=True):
            lora.set_adapters(part, {name: weight for name, weight in weights.items() if name in names})

    def merge_lora(self) -> None:
        """Folds the LoRAs that are on into the weights: as fast as without, and `save_pretrained` writes them."""
        adapted = [part for part in self._adapted if lora.adapter_names(part)]
        if not adapted:
            raise ValueError("no LoRA is loaded; load_lora() first")
        for part in adapted:
            lora.merge_adapters(part)

    def unmerge_lora(self) -> None:
        """Undoes `merge_lora`, exactly."""
        merged = [part for part in self._adapted if lora.is_merged(part)]
        if not merged:
            raise ValueError("no LoRA is merged; there is nothing to undo")
        for part in merged:
            lora.unmerge_adapters(part)

    def unload_lora(self) -> None:
        """Takes all LoRAs out, merged ones too: the pipeline is, bit for bit, what it was before."""
        for part in self._adapted:
            lora.remove_adapters(part)

    def index(self) -> dict[str, Any]:
        """Content of `model_index.json`."""
        codec = _unwrapped(self.codec)
        stage = codec.autoencoder.config.diffusers_class if isinstance(codec, LatentCodec) else None
        index: dict[str, Any] = {"_class_name": CLASSES[stage]}
        # Keys with an underscore are ours; diffusers leaves them alone.
        index["_ldm"] = {name: getattr(self, name) for name in DEFAULTS}
        index |= {name: list(classes) for name, classes in self.text_encoder.library_classes.items()}
        scheduler = scheduler_class(self.unet.config.learned_variance)
        index |= {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", scheduler]}
        if stage is None:
            return index | {"codec": ["ldm", "PixelCodec"]}
        index |= {"vae": ["diffusers", stage], "requires_safety_checker": False}
        return index | {name: [None, None] for name in sorted(SKIPPED)}

    def sampling_params(self, **sampling: Unpack[SamplingKwargs]) -> SamplingParams:
        """Sampling parameters with this model's defaults, checked against it as far as possible before sampling."""
        params = SamplingParams.resolve(sampling, **{name: getattr(self, name) for name in DEFAULTS})
        self._grid(params)
        x0_bounds(self.codec, params.dynamic_threshold)
        weight = self.unet.conv_in.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        check_precision(self.schedule.prediction_type, str(dtype).removeprefix("torch."))
        return params

    def _grid(self, params: SamplingParams) -> tuple[Step, ...]:
        schedule = NoiseSchedule.from_config(self.schedule)
        if not isinstance(params.sampler, str):
            return schedule.grid(params.num_inference_steps)  # only its length counts: a scheduler object has its own
        spacing, offset = self.schedule.timestep_spacing, self.schedule.steps_offset
        return schedule.grid(params.num_inference_steps, spacing, steps_offset=offset)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels; the training size where they are not given."""
        default_height, default_width = self.default_size
        height = default_height if height is None else as_int("height", height)
        return height, default_width if width is None else as_int("width", width)

    def _blank(self, images: int, height: int | None, width: int | None) -> Tensor:
        """Zeros [images, C, h, w] with the dtype and device of the UNet."""
        shape = self.codec.latent_shape(*self._size(height, width))
        weight = self.unet.conv_in.weight
        return torch.zeros((), device=weight.device, dtype=weight.dtype).expand(images, *shape)

    def _chunk_sizes(
        self, count: int, height: int | None, width: int | None, params: SamplingParams, *, texts: int = 2
    ) -> ChunkSizes:
        """How many of `count` images are computed at a time, beside `texts` encoded texts; ValueError if none fits."""
        size = self._size(height, width)
        weight, length = self.unet.conv_in.weight, self.text_encoder.max_length * self.text_encoder.hidden_size
        _, h, w = self.codec.latent_shape(*size)
        branches = 1 if params.guidance_scale == 1 else 2  # conditional and unconditional
        unet = unet_bytes(self.unet.config, h, w, weight.element_size()) + length * weight.element_size()
        return chunk_sizes(
            count,
            size,
            sample_bytes=branches * unet,
            image_bytes=self.codec.decode_bytes(*size),
            device=weight.device,
            held_bytes=texts * length * weight.element_size(),
            in_one_batch=params.classifier is not None,
        )

    def _generate(self, count: int, chunks: ChunkSizes, final_latents: Callable[[range], Tensor]) -> list[Image.Image]:
        """All images, a chunk at a time; `final_latents` gives the latents [B, C, h, w] of a range of them."""
        images: list[Image.Image] = []
        for start in range(0, count, chunks.sampled):
            chunk = range(start, min(start + chunks.sampled, count))
            what = f"{len(chunk)} images at once" if len(chunk) > 1 else "an image"
            with explain_out_of_memory(what, "choose a smaller size, or fewer images at a time"):
                images += self._decode(final_latents(chunk), chunks.decoded, first=start)
        return images

    def _decode(self, latents: Tensor, batch_size: int, *, first: int = 0) -> list[Image.Image]:
        """Images from latents [B, C, h, w]; `first` is the index of the first one in the call, for errors."""
        images: list[Image.Image] = []
        for batch in latents.split(batch_size):
            decoded = self.codec.decode(batch)
            sound = is_finite(decoded).tolist()
            if not all(sound):
                names = image_names(sound, first + len(images))
                raise NotFinite(f"{names} left the finite numbers (nan or inf) when decoded; {remedy(decoded.dtype)}")
            images += to_pil(decoded)
        return images

    def _warn_of_cut(self, *prompts: str) -> None:
        """For methods under `torch.inference_mode()`: the warning points at the line that called them."""
        message = self.text_encoder.truncation_message(prompts)
        if message:
            warnings.warn(message, CutPromptWarning, stacklevel=4)

    def _encode(self, prompts: list[str]) -> Tensor:
        """Hidden states [B, L, D]; each different prompt is encoded once."""
        states, rows = self._encode_unique(prompts)
        return states[rows]

    def _encode_unique(self, prompts: list[str]) -> tuple[Tensor, list[int]]:
        """Hidden states [U, L, D] of the different prompts, and the row of each prompt in them."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        states = self.text_encoder(list(rows)).to(self.unet.conv_in.weight.dtype)
        sound = is_finite(states).tolist()
        if not all(sound):
            text = list(rows)[sound.index(False)]
            where = f"the text encoder left the finite numbers (nan or inf) at {text!r}"
            raise NotFinite(f"{where}; {remedy(states.dtype)}")
        return states, [rows[prompt] for prompt in prompts]

    def _sample(
        self,
        condition: Tensor,
        null: Tensor,
        latents: Tensor,
        params: SamplingParams,
        generators: Sequence[torch.Generator],
        *,
        grid: Sequence[Step] | None = None,
        first: int = 0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Samples from `latents` at the first step of the grid (by default the whole one) to its end: [B, C, h, w].

        `first` is the index of the first of these images in the call, for errors.
        """
        schedule = NoiseSchedule.from_config(self.schedule)
        network, prediction_type = as_epsilon_model(self.unet, schedule, self.schedule.prediction_type)
        check = FiniteCheck(params.guidance_scale, first)
        states = sample(
            params,
            check.wrap(with_guidance(network, condition, null, schedule, prediction_type, params)),
            latents,
            schedule,
            self._grid(params) if grid is None else grid,
            generators=generators,
            clip_x0=x0_bounds(self.codec, params.dynamic_threshold),
            prediction_type=prediction_type,
            learned_variance=self.unet.config.learned_variance,
        )
        return check.final_latents(states, on_step)


def _one_text(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; give one text")
    return value


def _unwrapped(module: Any) -> Any:
    """The network inside the wrapper of `torch.compile`, if there is one."""
    return getattr(module, "_orig_mod", module)


def default_device() -> torch.device:
    """The accelerator of this machine (CUDA, Apple's MPS, XPU, NPU, …), as accelerate takes it, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type)


def usable_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, None for `default_device`; ValueError if it cannot be used."""
    if name is None:
        return default_device()
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the device "meta" gives no numbers back
        return probe.device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # the second without CUDA in torch
        raise ValueError(f"device is {str(name)!r}, which cannot be used ({error_reason(error)}); cpu can") from None
