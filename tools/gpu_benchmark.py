"""Times networks, pictures and training steps of ldm and of diffusers on one device, with the same random weights.

    python -m tools.gpu_benchmark figures.jsonl --seconds 120            # eager
    python -m tools.gpu_benchmark figures.jsonl --seconds 120 --compiled
    python -m tools.gpu_benchmark figures.jsonl --seconds 60 --rehearse  # tiny sizes, on a CPU

All variants of a case take turns in one process; a figure is a median with its range. Each case is written as a line of
JSON as soon as it is measured, and cases come in the order of their worth: what the time does not allow is left out and
named. `tools/gpu.py` runs this in its parts `benchmark` and `compile`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL as DiffusersAutoencoder
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm import models
from ldm.codecs import LatentCodec
from ldm.diffusion import NoiseSchedule, ScheduleConfig, diffusion_loss, drop_conditioning
from ldm.models import sample_posterior
from ldm.pipelines import Pipeline
from ldm.text import load_text_encoder_folders
from ldm.training.noise import step_noise
from ldm.training.trainable import adamw, make_ema

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PICTURE_STEPS = 25
# Dense peaks of tensor cores in FLOP/s by the vendor's data sheets: (bf16 and fp16, TF32). The first name that fits.
PEAKS = {
    "H100 PCIe": (756e12, 378e12), "H100 NVL": (835e12, 417e12), "H100": (989e12, 494e12), "H200": (989e12, 494e12),
    "A100": (312e12, 156e12), "L40S": (362e12, 183e12), "RTX 4090": (165e12, 82e12), "RTX 3090": (71e12, 36e12),
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A model: a UNet of diffusers' keys, the autoencoder beside it, the side of its latents."""

    name: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    side: int
    tokens: int
    batch: int  # of a training step


def levels(name: str, count: int) -> tuple[str, ...]:
    return (name,) * count


STABLE_DIFFUSION = Size(
    "Stable Diffusion 1.5",
    {"cross_attention_dim": 768, "sample_size": 64},
    {
        "block_out_channels": (128, 256, 512, 512), "down_block_types": levels("DownEncoderBlock2D", 4),
        "up_block_types": levels("UpDecoderBlock2D", 4), "layers_per_block": 2, "latent_channels": 4,
        "sample_size": 512,
    },
    side=64,
    tokens=77,
    batch=8,
)  # fmt: skip
BUILT_IN = Size(
    "scenes-64",
    {
        "block_out_channels": (64, 128, 160), "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 384,
        "mid_block_type": "UNetMidBlock2D", "sample_size": 16,
    },
    {
        "block_out_channels": (24, 48, 96), "down_block_types": levels("DownEncoderBlock2D", 3),
        "up_block_types": levels("UpDecoderBlock2D", 3), "layers_per_block": 1, "latent_channels": 4,
        "norm_num_groups": 12, "sample_size": 64,
    },
    side=16,
    tokens=48,
    batch=256,
)  # fmt: skip
TINY = Size(
    "tiny",
    {
        "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 16, "sample_size": 8,
    },
    {
        "block_out_channels": (8, 8), "down_block_types": levels("DownEncoderBlock2D", 2),
        "up_block_types": levels("UpDecoderBlock2D", 2), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
    },
    side=8,
    tokens=12,
    batch=2,
)  # fmt: skip


@dataclass
class Bench:
    """Where figures go, and how long there is.

    Attributes:
        rounds: how often each variant of a case is timed, after `warmup` times that do not count.
    """

    device: torch.device
    file: Path
    deadline: float
    rounds: int
    warmup: int

    def group(self, cases: Callable[..., None], size: Size, *arguments: Any) -> None:
        """Some cases of one kind; where making their networks fails, the next group goes on."""
        name = f"{size.name}: {cases.__name__}"
        if time.monotonic() > self.deadline:
            self.write({"name": name, "skipped": "no time was left"})
            return
        try:
            cases(self, size, *arguments)
        except Exception as error:  # whatever it is: the figures of the other groups are worth having
            self.write({"name": name, "failed": in_one_line(error)})
        self.release()

    def release(self) -> None:
        """Gives back the memory of networks that nothing refers to any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def case(self, name: str, variants: dict[str, Callable[[], object]], **facts: Any) -> None:
        """Times the variants in turns and writes one line; a case that fails or comes too late is named."""
        record: dict[str, Any] = {"name": name, **facts}
        started = time.monotonic()
        if started > self.deadline:
            self.write(record | {"skipped": "no time was left"})
            return
        try:
            record |= self.measure(variants)
        except Exception as error:  # whatever it is: the other cases are worth having
            record["failed"] = in_one_line(error)
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if "flops" in facts and "ours" in record.get("milliseconds", {}):
            peak = self.peak(facts["precision"])
            seconds = record["milliseconds"]["ours"]["median"] / 1000
            record["model_flop_utilization"] = facts["flops"] / seconds / peak if peak else None
        self.write(record)

    def measure(self, variants: dict[str, Callable[[], object]]) -> dict[str, Any]:
        times: dict[str, list[float]] = {name: [] for name in variants}
        memory: dict[str, int] = {}
        held = 0
        for round in range(-self.warmup, self.rounds):
            for name, call in variants.items():
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                milliseconds = self.timed(call)
                if round >= 0:
                    times[name].append(milliseconds)
                    if self.device.type == "cuda":
                        memory[name] = torch.cuda.max_memory_allocated() - held
            if round >= 0 and time.monotonic() > self.deadline:
                break
        figures = {
            name: {"median": statistics.median(taken), "min": min(taken), "max": max(taken), "repeats": len(taken)}
            for name, taken in times.items()
        }
        ratios = {
            f"ours_per_{name}": statistics.median(a / b for a, b in zip(times["ours"], taken, strict=True))
            for name, taken in times.items()
            if name != "ours" and "ours" in times
        }
        # Both sides' weights and moments are held all the time, so what a call adds to them is compared.
        return {"milliseconds": figures, "ratios": ratios, "peak_bytes_above_weights": memory}

    def timed(self, call: Callable[[], object]) -> float:
        """Milliseconds: of CUDA's own clock where there is one."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - started)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    def compile(self, call: Any) -> Any:
        """torch.compile for each shape anew, since code for any batch is slower and takes longer to make; a rehearsal
        traces and generates no code, which takes a CPU minutes.
        """
        return torch.compile(call, backend="inductor" if self.device.type == "cuda" else "aot_eager", dynamic=False)

    def peak(self, precision: str) -> float | None:
        if self.device.type != "cuda":
            return None
        card = torch.cuda.get_device_name(self.device)
        return next((peak[precision == "fp32"] for name, peak in PEAKS.items() if name in card), None)

    def write(self, record: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(record["name"], record.get("ratios") or record.get("skipped") or record.get("failed"), flush=True)


def unets(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[models.UNet, UNet2DConditionModel]:
    """The network of ours and that of diffusers, with the same random tensors in both."""
    with torch.device(device):
        theirs = UNet2DConditionModel(**size.unet).to(dtype).eval()
    with torch.device("meta"):
        ours = models.UNet(models.UNetConfig(**size.unet))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval().requires_grad_(True), theirs


def autoencoders(
    size: Size, device: torch.device, dtype: torch.dtype
) -> tuple[models.AutoencoderKL, DiffusersAutoencoder]:
    with torch.device(device):
        theirs = DiffusersAutoencoder(**size.vae).to(dtype).eval()
    with torch.device("meta"):
        ours = models.AutoencoderKL(models.AutoencoderConfig(**size.vae))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval(), theirs


def unet_inputs(size: Size, batch: int, side: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x_t = torch.randn(batch, 4, side, side, device=device, dtype=dtype)
    text = torch.randn(batch, size.tokens, size.unet["cross_attention_dim"], device=device, dtype=dtype)
    return x_t, torch.full((batch,), 500, device=device), text


def in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'without a message'}"


def flops_of(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return int(counter.get_total_flops())


def unet_steps(bench: Bench, size: Size, batches: tuple[int, ...], compiled: bool = False) -> None:
    variants = ["bf16"] if compiled else ["bf16", "fp16", "fp32"]
    for precision in variants:
        ours, theirs = unets(size, bench.device, DTYPES[precision])
        layouts = [True] if compiled else [False, True] if precision == "bf16" else [False]
        for channels_last in layouts:
            if channels_last:
                ours.to(memory_format=torch.channels_last)
                theirs.to(memory_format=torch.channels_last)
            a, b = (bench.compile(n) if compiled else n for n in (ours, theirs))
            for batch in batches:
                x_t, t, text = unet_inputs(size, batch, size.side, bench.device, DTYPES[precision])
                if channels_last:
                    x_t = x_t.to(memory_format=torch.channels_last)
                calls = {
                    "ours": no_grad(lambda a=a, i=(x_t, t, text): a(*i)),
                    "diffusers": no_grad(lambda b=b, i=(x_t, t, text): b(*i).sample),
                }
                bench.case(
                    f"{size.name}: UNet step",
                    calls,
                    batch=batch,
                    precision=precision,
                    channels_last=channels_last,
                    compiled=compiled,
                    flops=flops_of(lambda n=ours, i=(x_t, t, text): n(*i)),
                )


def no_grad(call: Callable[[], object]) -> Callable[[], object]:
    def without() -> object:
        with torch.no_grad():
            return call()

    return without


def byte_tokenizer(size: Size) -> transformers.CLIPTokenizer:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = size.tokens
    return tokenizer


def write_text_folders(folder: Path, size: Size) -> None:
    """A small random CLIP whose states have the width that the UNet takes, and a tokenizer of single bytes."""
    tokenizer = byte_tokenizer(size)
    width = size.unet["cross_attention_dim"]
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=size.tokens, bos_token_id=512, eos_token_id=513,
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=max(1, width // 64),
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")


@contextlib.contextmanager
def text_folders(size: Size) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        write_text_folders(Path(name), size)
        yield Path(name)


def pictures(
    bench: Bench, size: Size, batches: tuple[int, ...], precisions: tuple[str, ...], compiled: bool = False
) -> None:
    """Pictures of 25 steps with guidance, decoded and turned into PIL images; both draw with DDIM."""
    kind = {"num_inference_steps": PICTURE_STEPS, "guidance_scale": 7.5}
    for precision in precisions:
        dtype = DTYPES[precision]
        unet, their_unet = unets(size, bench.device, dtype)
        vae, their_vae = autoencoders(size, bench.device, dtype)
        with text_folders(size) as folder:
            text = load_text_encoder_folders(folder / "text_encoder", folder / "tokenizer").to(bench.device, dtype)
            their_text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True).to(
                bench.device, dtype
            )
            tokenizer = byte_tokenizer(size)
        ours = Pipeline(unet=unet, codec=LatentCodec(vae), text_encoder=text, schedule=ScheduleConfig())
        theirs = StableDiffusionPipeline(
            unet=their_unet, vae=their_vae, text_encoder=their_text, tokenizer=tokenizer, safety_checker=None,
            scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        theirs.set_progress_bar_config(disable=True)
        if compiled:
            for pipeline in (ours, theirs):
                pipeline.unet.to(memory_format=torch.channels_last)
            ours.unet.forward = bench.compile(ours.unet.forward)  # type: ignore[method-assign]
            theirs.unet.forward = bench.compile(theirs.unet.forward)
        for batch in batches:
            prompts = ["a corgi"] * batch
            calls = {
                "ours": lambda o=ours, p=prompts: o(p, seed=0, **kind),
                "diffusers": lambda t=theirs, p=prompts, h=size.vae["sample_size"]: t(p, height=h, width=h, **kind),
            }
            facts = {"batch": batch, "precision": precision, "steps": PICTURE_STEPS, "compiled": compiled}
            bench.case(f"{size.name}: picture", calls, **facts)


def decoding(bench: Bench, size: Size) -> None:
    for precision in ("bf16", "fp32"):
        ours, theirs = autoencoders(size, bench.device, DTYPES[precision])
        latents = torch.randn(1, 4, size.side, size.side, device=bench.device, dtype=DTYPES[precision])
        calls = {
            "ours": no_grad(lambda o=ours, x=latents: o.decode(x)),
            "diffusers": no_grad(lambda t=theirs, x=latents: t.decode(x).sample),
        }
        bench.case(f"{size.name}: decoding", calls, batch=1, precision=precision)


def training_steps(bench: Bench, size: Size, side: int) -> None:
    """A step in bf16: ours from encoded data; theirs as `train_text_to_image.py` makes it, encoders included, and
    without them.
    """
    device, batch = bench.device, size.batch
    factor = size.vae["sample_size"] // size.side
    unet, their_unet = unets(size, device, torch.float32)
    # Each trains its own weights.
    unet.load_state_dict({name: value.clone() for name, value in unet.state_dict().items()}, assign=True)
    vae = autoencoders(size, device, torch.bfloat16)[1].requires_grad_(False)
    with text_folders(size) as folder:
        text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True).to(
            device, torch.bfloat16
        )
    schedule, scheduler = NoiseSchedule.from_config(ScheduleConfig()), DDPMScheduler(beta_schedule="scaled_linear")
    latents, _, states = unet_inputs(size, batch, side, device, torch.float32)
    moments = torch.randn(batch, 8, side, side, device=device)
    pixels = torch.randn(batch, 3, side * factor, side * factor, device=device)
    tokens = torch.randint(500, (batch, size.tokens), device=device)
    unet.train()
    their_unet.train()
    optimizer = adamw([{"params": list(unet.parameters())}], lr=1e-4, weight_decay=0.01)
    their_optimizer = torch.optim.AdamW(their_unet.parameters(), lr=1e-4, weight_decay=0.01)
    ema, their_ema = make_ema(unet, 0.9999), EMAModel(their_unet.parameters())
    autocast = torch.autocast(device.type, torch.bfloat16)

    ids, shape, step = [f"{i}.png" for i in range(batch)], (4, side, side), itertools.count()

    def ours() -> None:
        # As a run does: from the cached posterior's moments, with noise that is drawn on the CPU, a sample at a time.
        draws = step_noise(
            0, [0] * batch, ids, next(step), shape=shape, num_train_timesteps=1000, caption_dropout=0.1, device=device
        )
        x_0 = sample_posterior(moments, draws.posterior)
        condition = drop_conditioning(states, states[:1], draws.dropped)
        with autocast:
            loss = diffusion_loss(unet, schedule, x_0, condition, timesteps=draws.timesteps, noise=draws.noise).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update_parameters(unet)

    def theirs(encode: bool) -> None:
        with torch.no_grad():
            x_0, condition = latents, states
            if encode:
                x_0 = vae.encode(pixels.to(torch.bfloat16)).latent_dist.sample() * vae.config.scaling_factor
                condition = text(tokens)[0]
        noise = torch.randn_like(x_0)
        timesteps = torch.randint(0, 1000, (batch,), device=device)
        noisy = scheduler.add_noise(x_0.float(), noise.float(), timesteps).to(torch.bfloat16)
        with autocast:
            prediction = their_unet(noisy, timesteps, condition, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise.float()).backward()
        nn.utils.clip_grad_norm_(their_unet.parameters(), 1.0)
        their_optimizer.step()
        their_optimizer.zero_grad()
        their_ema.step(their_unet.parameters())

    with autocast:
        forward = flops_of(lambda: unet(latents, torch.full((batch,), 500, device=device), states))
    calls = {"ours": ours, "diffusers": lambda: theirs(True), "diffusers_encoded": lambda: theirs(False)}
    bench.case(f"{size.name}: training step", calls, batch=batch, latents=side, precision="bf16", flops=3 * forward)


def start(file: Path, deadline: float, rehearse: bool) -> Bench:
    """Settings that all figures share: quiet libraries, a seed, TF32.

    Raises:
        ValueError: without a CUDA device, unless it is a rehearsal.
    """
    if not rehearse and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; --rehearse runs tiny sizes on the CPU")
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device("cpu" if rehearse else "cuda")
    return Bench(device, file, deadline, rounds=2 if rehearse else 7, warmup=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a line of JSON for each case is added to this file")
    parser.add_argument("--seconds", type=float, default=150, help="no case begins after so many")
    parser.add_argument("--compiled", action="store_true", help="torch.compile on both sides, bf16, channels_last")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    arguments = parser.parse_args()
    try:
        bench = start(arguments.file, time.monotonic() + arguments.seconds, arguments.rehearse)
    except ValueError as error:
        parser.error(str(error))
    # A picture is 50 calls of a network: one to warm up, and fewer of them.
    few = replace(bench, rounds=1 if arguments.rehearse else 3, warmup=1)
    large, small = (TINY, TINY) if arguments.rehearse else (STABLE_DIFFUSION, BUILT_IN)
    batches, halves = (1, 2) if arguments.rehearse else (1, 8), ("bf16",)
    if arguments.compiled:
        # Each network and batch takes a card about a minute to compile: the larger batch only once the smaller is done.
        for batch in batches:
            bench.group(unet_steps, large, (batch,), True)
            few.group(pictures, large, (batch,), halves, True)
        few.group(pictures, small, batches, halves, True)
        return
    bench.group(unet_steps, large, batches)
    few.group(pictures, large, batches, halves)
    bench.group(training_steps, large, large.side // 2)
    bench.group(training_steps, large, large.side)
    bench.group(decoding, large)
    bench.group(training_steps, small, small.side)
    bench.group(unet_steps, small, batches)
    few.group(pictures, small, batches, ("bf16", "fp16", "fp32"))
    few.group(pictures, large, batches, ("fp16", "fp32"))


if __name__ == "__main__":
    main()
