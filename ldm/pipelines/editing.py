"""Between pictures, back from a picture, and several from one: what a model can do beside drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion import NoiseSchedule, State, conditioned, ddim_inversion, slerp
from ldm.pipelines.arguments import image_prompts, image_seeds, listed, whole
from ldm.pipelines.drawing import Drawing, PipelineOutput
from ldm.pipelines.finite import Watch
from ldm.pipelines.images import check_pictures, from_pil
from ldm.pipelines.memory import CHUNK_BYTES, said_in_one_line
from ldm.pipelines.sampling import SAMPLERS, direct, draw_noise, shown


class Editing(Drawing):
    """A model that draws, and that walks between, back to, and out from the noise of a picture."""

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
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        dynamic_threshold: float | None = None,
        sampler: str = "ddim",
    ) -> PipelineOutput:
        """A row of pictures from one seed, and from one text, to another.

        Spherical in x_T (DDIM, section 5.3 and appendix D.5) and, between two prompts, linear in the hidden
        states of the text encoder. The ends are what `__call__` draws from their prompt and seed. Every picture
        follows from its x_T alone, so the sampler has to be one that draws no noise.

        Args:
            prompt: one text, or the two of the ends.
            seeds: the two of the ends; they may be equal, where only the text is to change.
            steps: how many pictures, both ends included, at least 2.

        Returns:
            `steps` images; `seeds` are the two that were given.

        Raises:
            ValueError: naming the argument, its value and the range.
        """
        prompts = [prompt, prompt] if isinstance(prompt, str) else listed("prompt", prompt, "one text, or two")
        if len(prompts) != 2:
            raise ValueError(f"there are {len(prompts)} prompts; give one, or the two to go between")
        steps = whole("steps", steps)
        if steps < 2:
            raise ValueError(f"steps is {steps}; it must be at least 2, the two ends")
        ends = image_seeds(listed("seeds", seeds, "two, those of the ends"), 2)
        prompts, negatives = image_prompts(prompts, _one_text("negative_prompt", negative_prompt or ""), 1)
        settings = self._settings(
            num_inference_steps,
            guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            dynamic_threshold=dynamic_threshold,
            sampler=sampler,
        )
        if settings.draws or not isinstance(sampler, str):
            known = ", ".join(name for name, row in SAMPLERS.items() if not row.draws)
            raise ValueError(
                f"sampler is {shown(sampler)}; between pictures it must draw no noise: choose one of {known}"
            )
        room = self._room(steps, height, width, settings)
        start, end = (draw_noise([torch.Generator("cpu").manual_seed(s)], self._blank(1, height, width)) for s in ends)
        self._warn_of_cut(*prompts, *negatives)
        first, last = self._states(prompts)  # [L, D] each
        null = self._states(negatives[:1])  # [1, L, D]

        def final(images: range) -> Tensor:
            fractions = [i / (steps - 1) for i in images]
            latents = torch.cat([slerp(start, end, fraction) for fraction in fractions])  # [B, C, h, w]
            condition = torch.stack([torch.lerp(first, last, fraction) for fraction in fractions])  # [B, L, D]
            return self._walk(condition, null.expand(len(images), -1, -1), latents, settings, [], first=images.start)

        return PipelineOutput(self._drawn(steps, room, final), ends)

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
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        dynamic_threshold: float | None = None,
        sampler: str = "ddpm",
        sampler_options: Mapping[str, float] | None = None,
        eta: float = 0.0,
    ) -> PipelineOutput:
        """Several pictures from one x_t: their noise is shared down to timestep t, then each goes its own way.

        DDPM, section 4.3 and Figure 7: what x_t decides they have in common, coarse things first. Picture i follows
        from `shared_seed` and its own seed, whatever the others are.

        Args:
            shared_until: t, a training timestep; x at the first step of the grid at or under t is common to all.
            shared_seed: of x_T and of the noise down to t.
            seed: of the noise after t, as in `__call__`.
            count: how many pictures.
            sampler, sampler_options: one that draws noise: "ddpm", or "ddim" with eta above 0; what else it has.

        Raises:
            ValueError: naming the argument, its value and the range.
        """
        count = whole("count", count)
        if count < 1:
            raise ValueError(f"count is {count}; it must be at least 1")
        texts = _one_text("prompt", prompt), _one_text("negative_prompt", negative_prompt or "")
        prompts, negatives = image_prompts(*texts, 1)
        settings = self._settings(
            num_inference_steps,
            guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            dynamic_threshold=dynamic_threshold,
            sampler=sampler,
            sampler_options=sampler_options,
            eta=eta,
        )
        if not settings.draws:
            known = ", ".join(name for name, row in SAMPLERS.items() if row.draws)
            raise ValueError(
                f"sampler is {shown(sampler)} with eta {eta}, which draws no noise, so that all pictures would be "
                f"one; choose {known}, or ddim with eta above 0"
            )
        shared_until, shared_seed = whole("shared_until", shared_until), whole("shared_seed", shared_seed)
        grid = self._grid(settings)
        if not grid[-1].t <= shared_until <= grid[0].t:
            raise ValueError(
                f"shared_until is {shared_until}; it must be a timestep from {grid[-1].t} (the last of these "
                f"{len(grid)} steps) to {grid[0].t} (only x_T is shared)"
            )
        own = [step for step in grid if step.t <= shared_until]
        shared = grid[: len(grid) - len(own)]
        room = self._room(count, height, width, settings)
        generators = [torch.Generator("cpu").manual_seed(s) for s in image_seeds(shared_seed, 1)]
        seeds = image_seeds(seed, count)
        if shared_seed in seeds:
            raise ValueError(
                f"shared_seed is {shared_seed}, and so is the seed of picture {seeds.index(shared_seed)}, whose own "
                "noise would begin with x_T once more; take another"
            )
        self._warn_of_cut(*prompts, *negatives)
        condition, null = self._states(prompts), self._states(negatives)  # [1, L, D]
        common = draw_noise(generators, self._blank(1, height, width))  # [1, C, h, w]
        if shared:
            common = self._walk(condition, null, common, settings, generators, grid=shared)

        def final(images: range) -> Tensor:
            generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in images]
            each = (len(images), -1, -1)
            latents = common.expand(*each, -1)
            return self._walk(
                condition.expand(each), null.expand(each), latents, settings, generators, grid=own, first=images.start
            )

        return PipelineOutput(self._drawn(count, room, final), seeds)

    @torch.inference_mode()
    def invert(
        self,
        image: Image.Image | Sequence[Image.Image],
        prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """The x_T from which DDIM draws this picture: DDIM run forwards (arXiv:2010.02502, section 5.4).

        Without guidance (a scale of 1), because the way back must meet the same predictions:

            x_T = pipeline.invert(image, "a cat")
            pipeline("a cat", latents=x_T, guidance_scale=1)      # the picture again; the more steps, the closer
            pipeline("a dog", latents=x_T)                        # the picture, edited

        A latent model gives the picture again only as well as its autoencoder does.

        Args:
            image: RGB, or a list of one size; divisible by the codec's factor.
            prompt: what it shows: one text, or one an image.
            num_inference_steps: S; reconstruct with the same.

        Returns:
            x_T, [B, C, h, w], for `latents` of `__call__`.

        Raises:
            ValueError: naming the image and what is wrong with it, or the argument.
        """
        pictures = [image] if isinstance(image, Image.Image) else listed("image", image, "a picture, or a list of them")
        texts = [prompt] * len(pictures) if isinstance(prompt, str) else listed("prompt", prompt, "one text, or a list")
        if len(texts) != len(pictures):
            raise ValueError(f"there are {len(texts)} prompts for {len(pictures)} images; give one, or one an image")
        check_pictures(pictures)
        width, height = pictures[0].size
        settings = self._settings(num_inference_steps, 1.0)
        prompts, _ = image_prompts(texts, None, 1)
        self._warn_of_cut(*prompts)
        room = self._room(len(pictures), height, width, settings, texts=len({*prompts}))
        blank = self._blank(1, height, width)
        schedule = NoiseSchedule.from_config(self.schedule)
        network, prediction_type = direct(self.unet, schedule, self.schedule.prediction_type)
        condition = self._states(prompts)
        noise = []
        at_once = min(room.drawn, room.decoded)
        for first in range(0, len(pictures), at_once):
            images = from_pil(pictures[first : first + at_once])  # [B, 3, H, W]
            with said_in_one_line("the pictures", "invert smaller ones, or fewer at a time"):
                watch = Watch(first=first)
                states = ddim_inversion(
                    watch.around(conditioned(network, condition[first : first + at_once])),
                    self.codec.draw(self.codec.moments(images.to(blank))),
                    schedule,
                    self._grid(settings),
                    prediction_type=prediction_type,
                )
                noise.append(watch.last_of(states))
        return torch.cat(noise)

    @torch.inference_mode()
    def preview(self, state: State) -> list[Image.Image]:
        """x̂_0 of a step, as pictures: what the model sees in the noise so far. For `on_step` of `__call__`.

        Raises:
            ValueError: where it is not finite (`NotFinite`), or does not fit into memory.
        """
        height, width = (side * self.codec.factor for side in state.latents.shape[2:])
        at_once = max(1, CHUNK_BYTES // self.codec.bytes_to_decode(height, width))
        with said_in_one_line("the preview", "look at smaller pictures, or fewer at a time"):
            return self._pictures(state.pred_original_sample, at_once)


def _one_text(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; give one text")
    return value
