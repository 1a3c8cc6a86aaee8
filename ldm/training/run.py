"""One run of a training script: its steps, its folder, its log and its checkpoints.

RUN/config.yaml         the complete config
RUN/started.json        the folder that its relative paths are read from
RUN/data.json           the report on the data; fingerprints.json has a hash of each sample
RUN/plan.json           what was planned, and how long it took
RUN/report.html         all of this as one page
RUN/metrics.jsonl       a line for each measurement
RUN/nonfinite.jsonl     a line for each skipped step, with its samples
RUN/samples/            sample grids
RUN/tensorboard/        the same for TensorBoard
RUN/checkpoints/step_00001000/   `training/` to resume from, and what the script exports
RUN/<export>/           the newest export: `pipeline/`, `lora/` or `autoencoder/`
RUN/best/               the export with the lowest held-out loss so far
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm import disk, hub
from ldm.config import AutoencoderTrainingConfig, DiffusionTrainConfig, LDMConfig, to_yaml
from ldm.data import Batch, CaptionedImages, collate, generator, ignore_signals, micro_batches
from ldm.pipelines import NotFinite, Pipeline, save_png
from ldm.progress import format_duration, plural
from ldm.training import checkpoints, threads
from ldm.training.checkpoints import TrainingState, resume_command
from ldm.training.distributed import (
    Processes,
    StepLosses,
    Stopped,
    gather_in_order,
    interruption,
    log_skipped_step,
    sum_over_processes,
    sync_step,
)
from ldm.training.resume import (
    EVALUATION_PREFIX,
    VERDICT,
    check_compatible,
    data_differences,
    data_fingerprint,
    describe_environment,
    find_differences,
    logged_values,
    sample_fingerprints,
    truncate_log,
)
from ldm.training.run_folder import open_folder
from ldm.training.threads import Threads, measure_threads, timed_call
from ldm.training.trainable import learning_rate

THREADS_SECONDS = 0.2  # of one call while the number of threads is chosen; a part of a step if that is slow


@dataclass(frozen=True)
class TrainingData:
    """The images of a run."""

    train: CaptionedImages
    held_out: CaptionedImages | None
    report: dict[str, Any]  # on all samples, as data.json holds it
    space_reason: str | None = None  # why `space: auto` became what it is

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint stores to recognize the data."""
        return {"samples": len(self.train), "sha256": data_fingerprint(self.train, self.held_out)}


class StepTimer(Protocol):
    """Compares the first steps with the plan: `ldm.training.estimate.Pace`."""

    def exclude(self, seconds: float) -> None: ...

    def step(self) -> str | None: ...


class Run:
    """One run of a resolved config on data, and from `start` on its folder. Raises ValueError if the data does not fill
    a batch, no checkpoint is intact, or one differs in a key that is not in `accept`.

    Here, and nowhere else, the checkpoint to resume is found and verified, and config, environment and data are
    compared with it. Nothing is written before `start`, so that a wrong config or model leaves no trace.

    Args:
        resume: continue from the newest checkpoint, or start if there is none. Otherwise an older run in the same
            folder is moved aside, never overwritten.
        accept: keys of config and environment (and "data") that may differ from the resumed run.
        on_checkpoint: called with the run folder after each checkpoint and at the end; may return a page that it wrote.

    Attributes:
        export: name of the folder with the trained model, in each checkpoint and in the run folder.
        step: number of steps done; the position in the data follows from it.
        stopping: whether the run ends after this step, because a process received a signal.
        threads: of a process that computes on the CPU, else None. `choose_threads` decides an undecided number.
    """

    def __init__(
        self,
        config: LDMConfig | AutoencoderTrainingConfig,
        data: TrainingData,
        processes: Processes,
        *,
        resume: bool = False,
        accept: Sequence[str] = (),
        on_checkpoint: Callable[[Path], Path | None] = lambda folder: None,
    ) -> None:
        self.config, self.data = config, data
        self.folder = Path(config.output_dir).expanduser()
        self.export = config.export if isinstance(config, LDMConfig) else "autoencoder"
        self.accelerator, self.device, self.print = processes.accelerator, processes.device, processes.print
        self.stopping = False
        self.micro_batches(0, 0)
        self._resume, self._on_checkpoint = resume, on_checkpoint
        self._resumed, self._damaged = (
            checkpoints.find_checkpoint(self.accelerator, self.folder, self.print) if resume else (None, [])
        )
        self.step = 0 if self._resumed is None else checkpoints.checkpoint_step(self._resumed)
        stored = {} if self._resumed is None else hub.read_json(self._resumed / "training" / "state.json")
        self._stored: dict[str, Any] = stored
        self.threads: Threads | None = None
        world = self.accelerator.num_processes
        if processes.threads is not None:
            before = stored.get("environment", {})
            resumed = before.get("threads") if before.get("processes") == world else None
            resolved = threads.resolve_threads(processes.threads, config.train.cpu_threads, resumed)
            self.threads = threads.agree_on_threads(resolved, self.accelerator)
            # Half of the cores until it is measured: all may be slow beside another program, one for a large model.
            torch.set_num_threads(self.threads.number or max(1, self.threads.max_number // 2))
        self._environment = describe_environment(self.device, world)
        if self._resumed is not None:
            found = find_differences(config, self._environment, stored, self.print)
            found |= data_differences(self.folder, stored["data"], data.identity, data.train, data.held_out)
            check_compatible(found, accept, self._resumed, self.print)
            if self.step > config.train.max_steps:
                raise ValueError(
                    f"{self._resumed} is beyond train.max_steps {config.train.max_steps}; raise that to {self.step} or "
                    "more, or start a new run in another output_dir"
                )
        self._unlock: Callable[[], None] = lambda: None
        self._micro_losses: list[StepLosses] = []  # of the present step
        self._losses: list[float] = []  # of the steps since the last log line
        self._figures: dict[str, list[float]] = {}  # other values of these steps
        self._gradient_norm = 0.0
        self._skipped = {"in_all": 0, "in_a_row": 0}
        self._samples_seen, self._since = 0, time.perf_counter()
        self._first_step, self._logs_truncated = self.step, False
        self._saved_step = -1 if self._resumed is None else self.step
        self._saved_at, self._save_now = time.monotonic(), False
        self._progress: tqdm[Any] | None = None
        self._plan: dict[str, Any] | None = None
        self._planned_at = 0.0
        self._pace: StepTimer | None = None

    def start(self, state: TrainingState) -> None:
        """Open the run folder and load the resumed checkpoint into `state`. Raises ValueError if that checkpoint
        depends on other frozen weights, or the folder is not a run's. Nothing is written then.
        """
        if self._resumed is not None and self._stored.get("untrained_sha256") != state.frozen_hash:
            raise ValueError(
                f"{self._resumed} was trained on other weights than those of the model in start_from today; restore "
                "that model, or start a new run in another output_dir"
            )
        if self.is_main:
            self._unlock = open_folder(
                self.folder, self.config, self.step, resume=self._resume, damaged=self._damaged, log=self.print
            )
            hub.write_json(self.folder / "data.json", self.data.report)
            fingerprints = sample_fingerprints(self.data.train, self.data.held_out)
            hub.write_json(self.folder / "fingerprints.json", fingerprints)
        self.accelerator.wait_for_everyone()
        # TensorBoard hides what was logged after this step, which is truncated from the log as well.
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})
        if self._resumed is None:
            return
        stored = self._stored
        state.restore(self._resumed / "training", stored["ema_updates"], stored.get("adversarial_weight"))
        if self.accelerator.scaler is not None and stored["grad_scaler"]:
            self.accelerator.scaler.load_state_dict(stored["grad_scaler"])
        self._losses, self._figures = stored.get("losses", []), stored.get("figures", {})
        self._gradient_norm = stored.get("gradient_norm", 0.0)
        self._skipped = stored.get("skipped", self._skipped)
        if self.is_main:  # a process that was killed after its checkpoint left an older export, or none
            self._publish(self._resumed)
        self.print(f"resumed {self._resumed}")

    # ---- processes, data and the step

    @property
    def is_resumed(self) -> bool:
        return self._resumed is not None

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def choose_threads(self, state: TrainingState, training_pass: Callable[[int], Callable[[], object]]) -> None:
        """Measure the best number of CPU threads if it is undecided: once, before anything is encoded.

        Args:
            training_pass: `training_pass(n)()` runs forward and backward on n images, as a step does.
        """
        if self.threads is None or self.threads.number is not None:
            return
        train = self.config.train

        def seconds(call: Callable[[], object]) -> float:
            measured = timed_call(call, self.accelerator)
            state.discard_gradients()
            return measured

        single = training_pass(1)
        seconds(single)
        micro_batch = train.batch_size // train.gradient_accumulation_steps // self.accelerator.num_processes
        count = max(1, min(micro_batch, int(THREADS_SECONDS / seconds(single))))
        several = training_pass(count)
        what = f"{plural(count, 'image')} forward and back"
        self.threads = measure_threads(self.threads, lambda: seconds(several), what)
        assert self.threads.number is not None
        torch.set_num_threads(self.threads.number)
        self._environment["threads"] = self.threads.number

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[list[tuple[int, int]]]:
        """(epoch, index) of this process's samples; ValueError if the images do not make batches that split evenly."""
        return micro_batches(
            self.data.train.order(self.config.train.batch_size),
            first_step=first_step,
            last_step=last_step,
            accumulation=self.config.train.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches from the present step to the last; fewer if the run is stopping."""
        if self.stopping:
            return
        interruption.may_abort = False
        train, images = self.config.train, self.data.train
        sampler = self.micro_batches(self.step, train.max_steps)
        if self.is_resumed:
            epoch = min(epoch for epoch, _ in images.order(train.batch_size).batch(self.step))
            images.reload_epochs = (epoch, epoch + 1)  # each image comes once in the rest of the one, or in the other
        loader = DataLoader(
            images,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=train.num_workers,
            worker_init_fn=ignore_signals,
        )
        self._progress = tqdm(
            total=train.max_steps,
            initial=self.step,
            unit="step",
            disable=not self.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 20,
        )
        self._since, self._saved_at = time.perf_counter(), time.monotonic()
        for number, batch in enumerate(loader):
            # Only dropout inside a network uses torch's own generator, which is keyed as well.
            micro = number % train.gradient_accumulation_steps
            rng = generator(self.config.seed, "torch", self.step, micro, self.accelerator.process_index)
            torch.manual_seed(int(rng.integers(2**63)))
            yield batch
            if self.stopping and micro + 1 == train.gradient_accumulation_steps:
                break
        self._progress.close()

    def backward(self, losses: StepLosses) -> None:
        """Add the gradients of a micro-batch."""
        losses.backward(self.accelerator)
        self._micro_losses.append(losses.detach())

    def optimize(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, discriminator: nn.Module | None = None
    ) -> bool:
        """Clip the gradients and step the optimizer after the last micro-batch of a step. Raises ValueError after
        `train.max_nonfinite_steps` skipped steps in a row.

        If a loss or gradient is not finite in any process, all skip the step and log its samples. The same reduction
        tells all processes whether one received a signal.

        Args:
            discriminator: a second network of the optimizer, whose gradient is clipped separately.

        Returns:
            Whether the weights were updated.
        """
        if not self.accelerator.sync_gradients:
            return False
        train, micro_losses = self.config.train, self._micro_losses
        norm = self.accelerator.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        assert norm is not None
        extra = {}
        if discriminator is not None and any(p.grad is not None for p in discriminator.parameters()):
            clipped = self.accelerator.clip_grad_norm_(discriminator.parameters(), train.max_grad_norm)
            assert clipped is not None
            extra["gradient_norm_discriminator"] = clipped
        minutes = train.checkpoint_minutes
        save = self.is_main and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        stop = interruption.requested is not None
        result = sync_step(self.accelerator, micro_losses, norm, extra=extra, stop=stop, save=save)
        self._micro_losses = []
        self.stopping |= result.stop
        self._save_now = result.save
        if result.is_finite:
            self._losses.append(result.loss)
            for name, value in result.figures.items():
                self._figures.setdefault(name, []).append(value)
            if math.isfinite(result.gradient_norm):  # not if a loss scaler has reached its limit
                self._gradient_norm = result.gradient_norm
            self._skipped["in_a_row"] = 0
        else:
            self._skipped = {key: count + 1 for key, count in self._skipped.items()}
            losses, log = gather_in_order(self.accelerator, micro_losses), self.folder / "nonfinite.jsonl"
            if self.is_main:
                self._truncate_logs()
                positions = self.data.train.order(train.batch_size).batch(self.step)
                step, images = self.step + 1, self.data.train
                self.print(log_skipped_step(log, step, result, images, positions, losses.tolist()))
            if self._skipped["in_a_row"] >= train.max_nonfinite_steps:
                raise ValueError(
                    f"the loss or gradient was not finite in {self._skipped['in_a_row']} steps in a row; {log} lists "
                    f"their samples; {checkpoints.describe_newest(self.folder)}; leave these samples out, or resume "
                    f"with a lower learning rate: {resume_command(self.folder)} --set "
                    f"train.learning_rate={train.learning_rate / 2:g} --accept train.learning_rate (if the weights of "
                    "that checkpoint are already bad, move it away first, and the one before is used)"
                )
        if result.is_finite or self.accelerator.scaler is not None:  # a loss scaler skips steps by itself
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, self.step)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return result.is_finite and not self.accelerator.optimizer_step_was_skipped

    def advance(self, codebook: checkpoints.CodebookTracker | None = None) -> None:
        """Count a step. Every `log_every` steps, log means since the last line."""
        train = self.config.train
        self.step += 1
        self._samples_seen += train.batch_size
        if self._progress is not None:
            self._progress.update()
        warning = self._pace and self._pace.step()
        if warning:
            self.print(warning)
        if not self._is_multiple(train.log_every):
            return
        rate = self._samples_seen / (time.perf_counter() - self._since)
        values = {"learning_rate": learning_rate(train, self.step - 1), "samples_per_second": round(rate, 2)}
        if self._losses:
            loss = math.fsum(self._losses) / len(self._losses)
            figures = {name: math.fsum(series) / len(series) for name, series in self._figures.items()}
            values = {"loss": loss, **figures, "gradient_norm": self._gradient_norm} | values
            if self._progress is not None:
                self._progress.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} samples/s", refresh=False)
        if codebook is not None:
            values = codebook.figures() | values
        if self._skipped["in_all"]:
            values["skipped_steps"] = self._skipped["in_all"]
        self.log(values)
        self._samples_seen, self._since = 0, time.perf_counter()
        if self.step % train.log_every == 0:  # not at the last step alone: a prolonged run continues its means
            self._losses, self._figures = [], {}
            if codebook is not None:
                codebook.reset_counts()

    def is_due(self, every: int | None) -> bool:
        """Whether an event of every `every` steps (None: never), and of the last, is due. Not while the run stops:
        resuming makes up for it.
        """
        return every is not None and self._is_multiple(every) and not self.stopping

    def _is_multiple(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.max_steps

    # ---- what is written

    def log_plan(self, text: str, content: dict[str, Any], pace: StepTimer) -> None:
        """Print a plan and write `plan.json`; the time taken is added at the end."""
        self.print(text)
        self._plan, self._pace = content, pace
        self._truncate_logs()
        hub.write_json(self.folder / "plan.json", self._plan)
        self._planned_at = time.perf_counter()

    def log(self, values: Mapping[str, float]) -> None:
        """Append to `metrics.jsonl` and TensorBoard."""
        self.log_json(values)
        self.accelerator.log(dict(values), step=self.step)  # only on the main process

    def log_json(self, content: Mapping[str, Any]) -> None:
        """Append to `metrics.jsonl` alone; values need not be numbers."""
        if self.is_main:
            self._truncate_logs()
            disk.append_line(self.folder / "metrics.jsonl", json.dumps({"step": self.step, **content}))

    def _truncate_logs(self) -> None:
        """Before the first line of this session, drop what an earlier one logged after the resumed step."""
        if self._resume and not self._logs_truncated:
            train = self.config.train
            repeated: list[str] = []
            if self.step == self._first_step:
                repeated += ["held_out"] if self.is_due(train.validate_every) else []
                is_due = isinstance(train, DiffusionTrainConfig) and self.is_due(train.evaluate_every)
                repeated += [EVALUATION_PREFIX, VERDICT] if is_due else []
            truncate_log(self.folder / "metrics.jsonl", self._first_step, repeated=repeated)
            truncate_log(self.folder / "nonfinite.jsonl", self._first_step, repeated=())
        self._logs_truncated = True

    def measure(self, values: Callable[[], Mapping[str, float]]) -> None:
        """Compute values on the main process and log them."""
        with self._on_main_process():
            if self.is_main:
                try:
                    self.log(values())
                except NotFinite as error:  # the weights are finite, and later results may be
                    self.print(f"step {self.step} was not measured: {error}")

    def save_best(self, name: str, export: Callable[[Path], None]) -> None:
        """Export to `RUN/best/` if the value `name`, just measured, is the lowest in the log, which a resumed run has
        too.
        """
        if self.stopping:  # the measurement may be incomplete
            return
        with self._on_main_process():
            if not self.is_main:
                return
            *earlier, (step, latest) = logged_values(self.folder, name)
            if step != self.step or not latest < min((value for _, value in earlier), default=math.inf):
                return
            with hub.atomic_folder(self.folder / "best", "best") as folder:
                export(folder / self.export)
                files = checkpoints.file_hashes(folder)
                hub.write_json(folder / "best.json", {"step": step, name: latest, "files": files})

    def save_samples(self, make_grid: Callable[[], Image.Image]) -> None:
        """Make a sample grid on the main process and write it as PNG and to TensorBoard."""
        with self._on_main_process():
            if self.is_main:
                try:
                    grid = make_grid()
                except NotFinite as error:
                    self.print(f"step {self.step} has no sample grid: {error}")
                    return
                save_png(grid, self.folder / "samples" / f"step_{self.step:08d}.png")
                writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
                writer.add_image("samples", np.asarray(grid), self.step, dataformats="HWC")

    @contextmanager
    def _on_main_process(self, may_abort: bool = True) -> Iterator[None]:
        """Work of the main process, not counted as training time. The others wait and learn whether it failed or
        received a signal.
        """
        started, error = time.perf_counter(), None
        try:
            with interruption.abortable(may_abort and self.is_main):
                yield
        except Stopped:
            pass
        except Exception as caught:
            error = caught
        failed, stop = sum_over_processes(
            self.accelerator, [int(error is not None), int(interruption.requested is not None)]
        )
        if error is not None:
            raise error
        if failed:
            raise ValueError("the main process of this run has failed; its own message says why")
        self.stopping |= stop > 0
        seconds = time.perf_counter() - started
        self._since += seconds
        if self._pace is not None:
            self._pace.exclude(seconds)

    def save_if_due(self, state: TrainingState, export: Callable[[Path], None]) -> None:
        """Write a checkpoint every so many steps and minutes, at the end, and before the run stops; `export` writes
        the trained model into a folder.
        """
        is_due = self._is_multiple(self.config.train.checkpoint_every) or self._save_now or self.stopping
        if not is_due or self._saved_step == self.step:
            return
        with self._on_main_process(may_abort=False):
            if self.is_main:
                scaler = self.accelerator.scaler
                content = {
                    "step": self.step,
                    "data": self.data.identity,
                    "processes": self.accelerator.num_processes,
                    "untrained_sha256": state.frozen_hash,
                    "ema_updates": int(state.ema.n_averaged),
                    "grad_scaler": scaler.state_dict() if scaler is not None else None,
                    "losses": self._losses,
                    "figures": self._figures,
                    "adversarial_weight": state.adversary and state.adversary.weight,
                    "gradient_norm": self._gradient_norm,
                    "skipped": self._skipped,
                    "environment": self._environment,
                    "config": yaml.safe_load(to_yaml(self.config)),
                }

                def fill(folder: Path) -> None:
                    export(folder / self.export)
                    (folder / "training").mkdir()
                    state.save(folder / "training")
                    hub.write_json(folder / "training" / "state.json", content)

                for log in self.folder.glob("*.jsonl"):  # never older than the checkpoint
                    disk.sync(log)
                target = checkpoints.checkpoint_folder(self.folder, self.step)
                checkpoints.write_checkpoint(target, fill)
                self._publish(target)
                self._on_checkpoint(self.folder)
        self._saved_step, self._saved_at, self._save_now = self.step, time.monotonic(), False

    def _publish(self, newest: Path) -> None:
        """Link the export of the newest checkpoint into the run folder, and remove old checkpoints."""
        with hub.atomic_folder(self.folder / self.export, self.export) as folder:
            hub.link_tree(newest / self.export, folder)
        checkpoints.prune_checkpoints(self.folder, self.config.train.keep_checkpoints, self.config.train.keep_every)

    def _publish_best(self) -> None:
        """Link the best export into the run folder, if there is one and it is not of the last step."""
        path = self.folder / "best" / "best.json"
        if not path.is_file():
            return
        best = json.loads(path.read_text(encoding="utf-8"))
        if best["step"] == self.step:
            return
        with hub.atomic_folder(self.folder / self.export, self.export) as folder:
            hub.link_tree(path.parent / self.export, folder)
        last = logged_values(self.folder, "held_out_loss")[-1][1]
        why = f"{self.export}/ holds step {best['step']}, whose held-out loss is lowest: {best['held_out_loss']:.4f}"
        if best["step"] == 0:
            why += ", before fine-tuning; more images, or a lower train.learning_rate, may help"
        self.print(f"{why} ({last:.4f} at step {self.step})")

    def finish(self, state: TrainingState, export: Callable[[Path], None]) -> None:
        """End the run: save, log the time taken, write the report. Raises Stopped if a signal stopped it; it is saved
        first.
        """
        self.save_if_due(state, export)
        train = self.config.train
        is_best = isinstance(train, DiffusionTrainConfig) and train.final_weights == "best"
        if self.is_main and is_best and not self.stopping:
            self._publish_best()
        if self.is_main and self._plan is not None and not self.stopping:
            seconds = time.perf_counter() - self._planned_at
            hub.write_json(self.folder / "plan.json", self._plan | {"took_seconds": seconds})
            self.print(
                f"took {format_duration(seconds)}, planned were {format_duration(self._plan['expected_seconds'])}"
            )
        if self.is_main and (page := self._on_checkpoint(self.folder)) is not None:
            self.print(f"report: {page}")
        self.accelerator.end_training()
        self._unlock()
        if self.stopping:
            raise Stopped(
                f"step {self.step} of {self.config.train.max_steps} is saved; continue with "
                f"{resume_command(self.folder)}"
            )


class SampleEvaluator(Protocol):
    """Evaluates `samples` generated images of a pipeline: `ldm.training.evaluator.Evaluator`."""

    samples: int

    def __call__(self, pipeline: Pipeline) -> Mapping[str, float]:
        """Values to log."""

    def seconds(self, size: tuple[int, int]) -> float:
        """Seconds of all but generation, for images of this (height, width)."""


@dataclass(frozen=True)
class Hooks:
    """What a launcher plugs into training; the loops know these types alone, and run without any of them."""

    # (the config with "auto" resolved by the training images, the reason or None); before there is a run.
    resolve: Callable[[LDMConfig, CaptionedImages, torch.device], tuple[LDMConfig, str | None]] | None = None
    # Measures what the parts of a run cost, and logs its plan, before the first step; called with parts of the loop.
    estimate: Callable[..., None] | None = None
    # Makes the evaluator of generated images, before the model is made.
    evaluate: Callable[[Run], SampleEvaluator] | None = None
    on_checkpoint: Callable[[Path], Path | None] = lambda folder: None  # as in `Run`
