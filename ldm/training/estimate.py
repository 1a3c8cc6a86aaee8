"""What a run will cost, measured before its first step, and the plan that says so."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldm.config import AutoencoderTrainingConfig, DiffusionTrainConfig, LDMConfig
from ldm.data import Batch, CaptionedImages, collate
from ldm.models import FirstStage, PerceptualDistance
from ldm.pipelines import NotFinite
from ldm.progress import format_duration
from ldm.training import autoencoder_setup, setup
from ldm.training.autoencoder_setup import AdversarialLoss
from ldm.training.checkpoints import TrainingState
from ldm.training.distributed import StepLosses
from ldm.training.report import MAX_SHEETS, MAX_SHEETS_BYTES, write_report
from ldm.training.run import Run, SampleEvaluator
from ldm.training.setup import FrozenComponents
from ldm.training.threads import timed_call
from ldm.training.trainable import adamw, weight_precision

LossesOf = Callable[[nn.Module, Batch], StepLosses]
MEASURED_RUNS = Path(__file__).parents[1] / "assets" / "measured_runs.json"
MIN_SECONDS = 1.0
MAX_REPEATS = 30
TRIAL_SECONDS, TRIAL_REPEATS = 2.0, 3
PACE_STEPS, MAX_SLOWDOWN = 20, 2.0
WRITTEN_BYTES = 2**24
# Only some parameters are timed in an optimizer: timing must not need more memory than training.
TIMED_PARAMETERS = 2**24


@dataclass(frozen=True)
class Costs:
    """Measured costs of the parts of a run: seconds, and bytes on disk, each."""

    step: float
    validation: float  # with writing the best export
    grid: float
    checkpoint: float
    memory: int  # bytes at the peak
    checkpoint_bytes: int
    grid_bytes: int
    once_bytes: int  # of all that is written once
    evaluation: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a run will do; sizes in bytes, times in seconds. Stored as plan.json."""

    data: str
    space: str
    network: str
    parameters: int
    trained_parameters: int
    batch: str
    epochs: float
    seconds_per_step: float
    expected_seconds: float
    memory_bytes: int
    fixed_bytes: int
    memory_of: int
    disk_bytes: int
    quality: str
    evaluation_seconds: float = 0.0
    threads: str = ""

    def text(self) -> str:
        """A few aligned lines."""
        time = (
            f"about {format_duration(self.expected_seconds)}; {self.seconds_per_step:.3g} s a step, measured just now "
            "(validation, sample grids and checkpoints are included)"
        )
        if self.evaluation_seconds:
            fraction = self.evaluation_seconds / self.expected_seconds
            time += f"; evaluations of generated images take {100 * fraction:.2g} % of it"
        memory = (
            f"about {format_bytes(self.memory_bytes)} at the peak, of {format_bytes(self.memory_of)}; "
            f"weights, gradients, optimizer and EMA alone are {format_bytes(self.fixed_bytes)}"
        )
        rows = {
            "data": self.data,
            "space": self.space,
            "network": self.network,
            "batch": self.batch,
            "time": time,
            **({"threads": self.threads} if self.threads else {}),
            "memory": memory,
            "disk": f"about {format_bytes(self.disk_bytes)} in the run folder",
            "expect": self.quality,
        }
        return "\n".join(["plan"] + [f"  {name:<8} {value}" for name, value in rows.items()])


def make_plan(run: Run, state: TrainingState, space: str, costs: Costs) -> Plan:
    """Add up the costs of the steps from the present to the last; `space` describes what is trained."""
    config, train, images, model = run.config, run.config.train, run.data.train, state.model
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    extra = sum(p.numel() for p in state.adversary.discriminator.parameters()) if state.adversary else 0
    shape = f"{config.data.resolution}x{config.data.resolution} pixels"
    if config.data.bucketed:
        shape = f"about {shape}, in buckets of one aspect ratio"
    epoch = len(images) / train.batch_size
    evaluate_every = train.evaluate_every if isinstance(train, DiffusionTrainConfig) else None
    seconds = (train.max_steps - run.step) * costs.step
    for every, cost in (
        (train.validate_every, costs.validation),
        (train.sample_every, costs.grid),
        (train.checkpoint_every, costs.checkpoint),
        (evaluate_every, costs.evaluation),
    ):
        seconds += count_due(run.step, train.max_steps, every) * cost
    kept = min(train.keep_checkpoints, count_due(0, train.max_steps, train.checkpoint_every))
    grid_bytes = count_due(0, train.max_steps, train.sample_every) * costs.grid_bytes
    # A grid is a file, a TensorBoard event, and a part of the report, whose base64 adds a third.
    in_report = min(grid_bytes, MAX_SHEETS_BYTES, MAX_SHEETS * costs.grid_bytes)
    return Plan(
        data=f"{len(images)} images to train on, {len(run.data.held_out or ())} held out, {shape}",
        space=space,
        network=f"{format_millions(parameters)} parameters"
        + (f", {format_millions(trained)} of them trainable" if trained < parameters else "")
        + (f"; with a discriminator of {format_millions(extra)}" if extra else ""),
        parameters=parameters,
        trained_parameters=trained,
        batch=f"{train.batch_size} images; {epoch:.3g} steps per epoch; {train.max_steps} steps are "
        f"{train.max_steps / epoch:.3g} epochs or {train.max_steps * train.batch_size} samples",
        epochs=train.max_steps / epoch,
        seconds_per_step=costs.step,
        expected_seconds=seconds,
        memory_bytes=costs.memory,
        fixed_bytes=fixed_bytes(model) + 16 * extra,  # a discriminator has no EMA
        memory_of=_total_memory(run.device),
        disk_bytes=kept * costs.checkpoint_bytes + costs.once_bytes + 2 * grid_bytes + in_report * 4 // 3,
        quality=expected_result(config, images),
        evaluation_seconds=count_due(run.step, train.max_steps, evaluate_every) * costs.evaluation,
        threads=str(run.threads or ""),
    )


def fixed_bytes(model: nn.Module) -> int:
    """Bytes of the weights, plus gradient, two moments and EMA of the trainable ones in float32."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_due(first: int, last: int, every: int | None) -> int:
    """How often an event is due in steps `first` + 1 … `last`: every so many steps and at the last; None is never."""
    if every is None:
        return 0
    return last // every - first // every + (last % every != 0 and first < last)


def expected_result(config: LDMConfig | AutoencoderTrainingConfig, images: CaptionedImages) -> str:
    """What the nearest measured run of this kind, image size and space gave, by images and samples seen (as ratios)."""
    space = None
    if isinstance(config, AutoencoderTrainingConfig):
        kind = "first stage" if config.start_from is None else "first stage from another"
        kind += " with a codebook" if config.vq is not None else ""
    else:
        kind = "new" if config.start_from is None else "fine-tuning"
        space = config.space if kind == "new" else None  # that of the model
    samples, side = config.train.max_steps * config.train.batch_size, config.data.resolution

    def distance(run: dict[str, Any]) -> float:
        return abs(math.log(run["images"] / len(images))) + abs(math.log(run["samples"] / samples))

    runs = [
        run
        for run in json.loads(MEASURED_RUNS.read_text(encoding="utf-8"))
        if run["kind"] == kind and run["resolution"] == side and space in (None, run["space"])
    ]
    if not runs:
        return f"we have measured no run of this kind ({kind}{', ' + space if space else ''}) on {side} pixels"
    nearest = min(runs, key=distance)
    factor = nearest["samples"] / samples
    less = f"; this run sees {factor:.2g} times fewer samples: expect less" if factor > 1.5 else ""
    return (
        f"on other images, {nearest['name']} ({nearest['images']} {nearest['data']}, {side} pixels, "
        f"{nearest['samples']} samples) gave: {nearest['result']}{less}"
    )


def format_bytes(count: float) -> str:
    """ "12 MB", "3.4 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def format_millions(count: int) -> str:
    """ "0.65 M", "11.5 M", "860 M"."""
    return f"{count / 1e6:.3g} M"


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def seconds_per_call(action: Callable[[], object], network: nn.Module, device: torch.device) -> float:
    """Median of a few calls, without the first unless it is the only one, for choices before there is a run."""
    times: list[float] = []
    while len(times) < 1 + TRIAL_REPEATS and sum(times) < TRIAL_SECONDS:
        started = time.perf_counter()
        action()
        _synchronize(device)
        times.append(time.perf_counter() - started)
        network.zero_grad(set_to_none=True)
    return statistics.median(times[1:] or times)


@dataclass(frozen=True)
class Workload:
    """The parts of a run, for an estimate of its cost."""

    task: str  # what is trained, in words
    network: nn.Module  # as the loop calls it
    phases: Sequence[tuple[int, TrainingState, LossesOf]]  # number, state and losses of the remaining steps, in order
    validate: Callable[[nn.Module, Batch], object]
    validated: int  # images per validation; 0 without held-out images
    grid: Callable[[int], Image.Image]  # makes a sample grid with a number of sampling steps
    export_bytes: int  # of an export without its frozen components
    grid_steps: int = 1
    grid_samples: int = 1
    frozen: Path | None = None  # folder of these components, if an export has any
    exported: int = 0  # images that `encode` is called with for each export
    encode: Callable[[nn.Module, Batch], object] = lambda network, batch: None
    evaluator: SampleEvaluator | None = None  # of generated images of `sample_size`
    sample_size: tuple[int, int] = (0, 0)
    keeps_best: bool = False


def diffusion_workload(
    run: Run,
    state: TrainingState,
    network: nn.Module,
    losses_of: LossesOf,
    *,
    frozen: FrozenComponents,
    evaluator: SampleEvaluator | None,
) -> Workload:
    """The parts of a run of `train_ldm`."""
    config, held_out = run.config, run.data.held_out
    assert isinstance(config, LDMConfig)
    count = min(len(held_out), config.train.validation_samples) if held_out else 0
    lora = config.export == "lora"
    exported = state.trainable_parameters if lora else sum(p.numel() for p in state.model.parameters())

    def grid(steps: int) -> Image.Image:
        sample = dataclasses.replace(config.sample, num_inference_steps=steps)
        return setup.sample_grid(frozen.pipeline(state.ema.module), sample)

    task = f"{config.space}, as the config says" + (f", of {config.first_stage}" if config.first_stage else "")
    if config.start_from is not None:
        task = f"that of {config.start_from}, {config.finetune.method} fine-tuning"
    return Workload(
        task=run.data.space_reason or task,
        network=network,
        phases=[(config.train.max_steps - run.step, state, losses_of)],
        validate=losses_of,
        validated=count * setup.repeats_per_image(count, config.train.validation_samples) if count else 0,
        keeps_best=True,
        grid=grid,
        grid_steps=config.sample.num_inference_steps,
        grid_samples=len(config.sample.prompts) * config.sample.images_per_prompt,
        export_bytes=4 * exported,
        frozen=None if lora else frozen.folder,
        evaluator=evaluator,
        sample_size=frozen.pipeline(state.ema.module).default_size if evaluator else (0, 0),
    )


def autoencoder_workload(
    run: Run,
    state: TrainingState,
    network: nn.Module,
    losses_of: Callable[[nn.Module, Batch, AdversarialLoss | None], StepLosses],
    *,
    perceptual: PerceptualDistance | None,
    adversary: AdversarialLoss | None,
) -> Workload:
    """The parts of a run of `train_autoencoder`."""
    config, images, held_out = run.config, run.data.train, run.data.held_out
    assert isinstance(config, AutoencoderTrainingConfig)

    def validate(module: nn.Module, batch: Batch) -> None:
        autoencoder_setup.reconstruction_metrics(module, autoencoder_setup.pixels(batch, run.device), perceptual)

    def encode(module: nn.Module, batch: Batch) -> None:
        assert isinstance(module, FirstStage)
        module.encode(autoencoder_setup.pixels(batch, run.device))

    remaining = config.train.max_steps - run.step
    alone = min(max(0, config.loss.adversarial_start - run.step), remaining) if adversary else remaining
    start = f", from {config.start_from}" if config.start_from else ""
    codes = f", quantized to {config.vq.num_vq_embeddings} codes" if config.vq else ""
    task = f"a first stage: images to latents and back{codes}{start}"
    if config.trained == "decoder":
        task = f"the decoder of a first stage{start}; its latents do not change"
    return Workload(
        task=task,
        network=network,
        phases=[
            (alone, dataclasses.replace(state, adversary=None), lambda net, batch: losses_of(net, batch, None)),
            (remaining - alone, state, lambda net, batch: losses_of(net, batch, adversary)),
        ],
        validate=validate,
        validated=min(len(held_out), config.train.validation_samples) if held_out else 0,
        grid=lambda steps: autoencoder_setup.reconstruction_grid(state.ema.module, held_out or images, run.device),
        export_bytes=4 * sum(p.numel() for p in state.model.parameters()),
        exported=len(images) if config.trained == "all" else 0,  # the statistics of the latents cover all images
        encode=encode,
    )


def estimate_run(run: Run, state: TrainingState, network: nn.Module, losses_of: Any, **parts: Any) -> None:
    """Measure what the parts of a run cost on this machine, and log its plan. Changes no state. Raises ValueError if
    the run cannot fit into memory, or its folder takes no files.

    Args:
        network: as the loop calls it: `state.model`, or what accelerate wrapped around it.
        parts: of `diffusion_workload` or `autoencoder_workload`.
    """
    describe = diffusion_workload if isinstance(run.config, LDMConfig) else autoencoder_workload
    work = describe(run, state, network, losses_of, **parts)
    needed, total = fixed_bytes(state.model), _total_memory(run.device)
    if isinstance(run.config, LDMConfig) and needed > total > 0:
        raise ValueError(
            f"weights, gradients, optimizer and EMA need {format_bytes(needed)} of {format_bytes(total)}; choose "
            "finetune.method=lora (with train.mixed_precision=bf16 half of it again), or a smaller unet"
        )
    phases = [phase for phase in work.phases if phase[0] > 0] or [(1, *work.phases[0][1:])]
    steps = sum(count for count, _, _ in phases)
    step = sum(count * step_seconds(run, work.network, present, losses) for count, present, losses in phases) / steps
    if run.is_main:
        plan = make_plan(run, state, work.task, measure_costs(run, state, work, step))
        run.log_plan(plan.text(), asdict(plan), Pace(plan, None if run.threads is None else run.threads.number))
    run.accelerator.wait_for_everyone()


def measure_costs(run: Run, state: TrainingState, work: Workload, step: float) -> Costs:
    """Costs of the parts of a run with `step` seconds per step."""
    # Weights of frozen components are hard links; small files are copied into each export.
    files = [] if work.frozen is None else [path for path in work.frozen.rglob("*") if path.is_file()]
    linked = sum(path.stat().st_size for path in files)
    copied = sum(path.stat().st_size for path in files if path.suffix != ".safetensors")
    # Trainable weights, two moments of AdamW, and the EMA, which a discriminator has not.
    averaged = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    written = 12 * state.trainable_parameters + 4 * averaged + work.export_bytes
    grid_bytes = 0

    def draw_grid(count: int) -> None:
        nonlocal grid_bytes
        file = io.BytesIO()
        with suppress(NotFinite):  # logged when a grid is due; a plan must not stop the run
            work.grid(count).save(file, format="PNG")
        grid_bytes = len(file.getvalue())

    network = state.ema.module
    best = work.keeps_best and work.validated > 0
    validation = evaluation_seconds(run, network, work.validate) * work.validated if work.validated else 0.0
    validation += write_seconds(run.folder, work.export_bytes, 0) if best else 0.0
    # All files of a checkpoint are hashed, and the report is written.
    checkpoint = write_seconds(run.folder, written, written + linked) + timed_call(lambda: write_report(run.folder))
    checkpoint += evaluation_seconds(run, network, work.encode) * work.exported if work.exported else 0.0
    grid = grid_seconds(draw_grid, work.grid_steps)
    evaluation = 0.0
    if work.evaluator is not None:
        evaluation = grid / work.grid_samples * work.evaluator.samples + work.evaluator.seconds(work.sample_size)
    exports = 2 if best else 1  # the newest, which shares its weights with a checkpoint, and the best
    return Costs(
        step=step,
        validation=validation,
        grid=grid,
        checkpoint=checkpoint,
        memory=peak_memory(run, state),
        checkpoint_bytes=written + copied,
        grid_bytes=grid_bytes,
        once_bytes=linked + (exports - 1) * work.export_bytes + exports * copied,
        evaluation=evaluation,
    )


def step_seconds(run: Run, model: nn.Module, state: TrainingState, losses_of: LossesOf) -> float:
    """Seconds of an optimizer step: loading, forward, backward, AdamW and EMA. Changes no state.

    Args:
        model: the network as the script calls it: `state.model`, or what accelerate wrapped around it.
    """
    train = run.config.train
    load = _micro_batch_loader(run)
    batch, loading = load(), _mean_seconds(run, load)
    try:
        learning = _mean_seconds(run, lambda: losses_of(model, batch).backward(run.accelerator))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a micro-batch of {len(batch.ids)} images does not fit into the memory of {run.device} "
            f"({str(error).splitlines()[0]}); raise train.gradient_accumulation_steps, or set "
            "train.gradient_checkpointing=true"
        ) from error
    # AdamW and EMA take time in proportion to the parameters.
    trainable, scratch = state.trainable, list[nn.Parameter]()
    for parameter in trainable:
        if not scratch or sum(p.numel() for p in scratch) + parameter.numel() <= TIMED_PARAMETERS:
            scratch.append(nn.Parameter(torch.zeros_like(parameter)))
            scratch[-1].grad = torch.zeros_like(parameter)
    averages = [torch.zeros_like(parameter) for parameter in scratch]
    optimizer = adamw([{"params": scratch}])

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        torch._foreach_lerp_(averages, [parameter.data for parameter in scratch], 0.1)

    def clip_and_traverse() -> None:
        nn.utils.clip_grad_norm_(trainable, 1.0)
        for module in (state.model, state.ema.module):  # traversing the modules takes time in small networks
            list(module.parameters())
            list(module.buffers())

    fraction = sum(p.numel() for p in scratch) / state.trainable_parameters
    updating = _mean_seconds(run, update) / fraction + _mean_seconds(run, clip_and_traverse)
    state.discard_gradients()
    # Worker processes load in parallel.
    micro = max(learning, loading / train.num_workers) if train.num_workers else learning + loading
    return micro * train.gradient_accumulation_steps + updating


@torch.no_grad()
def evaluation_seconds(run: Run, network: nn.Module, evaluate: Callable[[nn.Module, Batch], object]) -> float:
    """Seconds per image of one evaluation of a network on a batch, without gradients."""
    batch = _micro_batch_loader(run)()
    with weight_precision(network):
        return _mean_seconds(run, lambda: evaluate(network, batch), collective=False) / len(batch.ids)


def grid_seconds(draw: Callable[[int], object], steps: int) -> float:
    """Seconds of a sample grid, `draw(steps)`, extrapolated from grids of fewer sampling steps."""
    shortest = timed_call(lambda: draw(1))
    if shortest < MIN_SECONDS:  # without the overhead of a first call
        shortest = timed_call(lambda: draw(1))
    if steps == 1:
        return shortest
    few = min(steps, 1 + max(1, int(MIN_SECONDS / shortest)))
    return shortest + (steps - 1) * max(0.0, timed_call(lambda: draw(few)) - shortest) / (few - 1)


def write_seconds(folder: Path, written: int, hashed: int) -> float:
    """Seconds to write and sync `written` bytes in a folder and to hash `hashed` bytes, measured on 16 MB."""
    block = os.urandom(WRITTEN_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:

            def write() -> None:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())

            writing = timed_call(write)
    except OSError as error:  # its own message names no folder
        reason = f"cannot write {format_bytes(WRITTEN_BYTES)}: {error.strerror}"
        raise OSError(error.errno, reason, str(folder)) from None
    hashing = timed_call(lambda: hashlib.sha256(block).hexdigest())
    return (writing * written + hashing * hashed) / WRITTEN_BYTES


def peak_memory(run: Run, state: TrainingState) -> int:
    """Estimated peak bytes of this process on the GPU, else in main memory: the peak so far, and the two moments of
    AdamW if they do not exist yet.
    """
    moments = 0 if state.optimizer.state else 8 * state.trainable_parameters
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device) + moments
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + moments


def _micro_batch_loader(run: Run) -> Callable[[], Batch]:
    """Loads this process's first micro-batch of the present step. The order of all images is found once, before."""
    positions = next(iter(run.micro_batches(run.step, run.step + 1)))
    return lambda: collate([run.data.train[position] for position in positions])


def _mean_seconds(run: Run, action: Callable[[], object], collective: bool = True) -> float:
    """Mean seconds of a call. Processes repeat a `collective` call equally often, at most once per remaining step."""
    alone = run.accelerator.num_processes == 1 or not collective
    max_repeats = max(1, min(MAX_REPEATS if alone else 3, run.config.train.max_steps - run.step))
    action()
    times: list[float] = []
    # A single call may coincide with the load of another program, so a slow one is repeated too.
    while not times or (
        len(times) < max_repeats and (not alone or sum(times) < MIN_SECONDS * (1 if len(times) >= 3 else 10))
    ):
        _synchronize(run.device)
        started = time.perf_counter()
        action()
        _synchronize(run.device)
        times.append(time.perf_counter() - started)
    return sum(times) / len(times)  # not the median: a run is a sum of fast and slow calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Pace:
    """Compares the first steps of a run with its plan; `threads` are of a run on the CPU, `clock` gives seconds."""

    def __init__(self, plan: Plan, threads: int | None, clock: Callable[[], float] | None = None) -> None:
        self._plan, self._threads, self._clock = plan, threads, clock or time.perf_counter
        self._steps, self._start = 0, 0.0

    def exclude(self, seconds: float) -> None:
        """Exclude time that was not part of a step."""
        self._start += seconds

    def step(self) -> str | None:
        """Count a step. After 20 steps, returns a warning if they took more than twice the planned time.

        The first step is not timed: worker processes start in it.
        """
        self._steps += 1
        if self._steps == 1:
            self._start = self._clock()
        if self._steps != PACE_STEPS:
            return None
        seconds = (self._clock() - self._start) / (PACE_STEPS - 1)
        slow = seconds > MAX_SLOWDOWN * self._plan.seconds_per_step
        return slow_step_message(self._plan, seconds, self._threads) if slow else None


def slow_step_message(plan: Plan, seconds: float, threads: int | None) -> str:
    """One line: how long steps take, the new expected time, and what to do about it."""
    per_step, before = plan.seconds_per_step, plan.expected_seconds
    line = (
        f"slower than planned: a step takes {seconds:.2g} s instead of {per_step:.2g} s, and the run "
        f"about {format_duration(before * seconds / per_step)} instead of {format_duration(before)}; other "
        f"programs may be using {'the GPU' if threads is None else 'the cores'}: end them"
    )
    if threads is not None and threads > 1:
        line += (
            f", or stop this run (Ctrl-C saves it) and resume with fewer threads than its {threads}: "
            "OMP_NUM_THREADS=1, --resume, --accept threads"
        )
    return f"{line}; or lower train.max_steps, or train.batch_size in a new run"
