"""One run of a training script: its steps, its folder, its log and its checkpoints.

RUN/config.yaml         the complete config
RUN/started.json        the folder that its relative paths are read from
RUN/data.json           the account of the data; fingerprints.json has a hash of each sample
RUN/plan.json           what was planned, and how long it took
RUN/report.html         all of this as one page
RUN/metrics.jsonl       a line whenever something was measured
RUN/nonfinite.jsonl     a line for each step that was skipped, with its samples
RUN/samples/            sample grids
RUN/tensorboard/        the same for TensorBoard
RUN/checkpoints/step_00001000/   `training/` to resume from, and what the script exports
RUN/<export>/           the newest export: `pipeline/`, `lora/` or `autoencoder/`
RUN/best/               the export with the lowest held-out loss so far, and which that is
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm import checkpoint, disk
from ldm.config import AutoencoderTrainingConfig, DiffusionTrainConfig, LDMConfig, to_yaml
from ldm.data import Batch, CaptionedImages, DatasetReport, collate, generator, ignore_signals, micro_batches
from ldm.pipelines import NotFinite, save_png
from ldm.training import checkpoints, nonfinite, threads
from ldm.training.codebook import Codebook
from ldm.training.distributed import join_processes, sum_over_processes
from ldm.training.environment import describe_environment
from ldm.training.files import file_hashes
from ldm.training.interruption import Stopped, interruption
from ldm.training.nonfinite import StepLosses
from ldm.training.optimizer import learning_rate
from ldm.training.pace import Pace
from ldm.training.plan import Plan, duration
from ldm.training.report import write_report
from ldm.training.report.names import PREFIX as EVALUATION
from ldm.training.report.names import VERDICT
from ldm.training.resume import (
    check_compatible,
    config_differences,
    data_differences,
    data_fingerprint,
    find_differences,
    logged_values,
    sample_fingerprints,
    stored_threads,
    truncate_log,
)
from ldm.training.run_folder import open_folder, write_once
from ldm.training.start_folder import resume_command
from ldm.training.threads import Threads
from ldm.training.training_state import TrainingState


class Run:
    """The processes of a run, and from `start` on its folder.

    Nothing is written before `start`, so that a wrong config or data set leaves no trace.

    Args:
        resume: go on from the newest checkpoint of the folder, or start where there is none. Without it an
            older run of the same folder is moved aside, never overwritten.
        accept: keys of config and environment (and "data") that may differ from those of the run that is resumed.
        export: name of the folder with the trained model, in each checkpoint and in the run folder.

    Attributes:
        step: steps done; the position in the data follows from it.
        stopping: whether the run ends after this step, since some process of it was told to.
        threads: of a process that computes on the CPU, else None; where their number is open, `set_threads` settles it
            before anything is encoded or trained.
    """

    def __init__(
        self,
        config: LDMConfig | AutoencoderTrainingConfig,
        *,
        export: str,
        resume: bool,
        accept: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.folder = Path(config.output_dir).expanduser()
        self.export = export
        allowed = threads.available_threads()  # accelerate may set another number
        self.accelerator = join_processes(config.train, self.folder)
        self.device = self.accelerator.device
        self.stopping = False
        self._resume, self._accept = resume, accept
        self._resumed, self._damaged = (
            checkpoints.find_checkpoint(self.accelerator, self.folder, self.print) if resume else (None, [])
        )
        self.step = 0 if self._resumed is None else checkpoints.checkpoint_step(self._resumed)
        self.threads: Threads | None = None
        if self.device.type == "cpu":
            processes = self.accelerator.num_processes
            begun_with = None if self._resumed is None else stored_threads(self._resumed, processes)
            decided = threads.resolve_threads(allowed, config.train.cpu_threads, begun_with)
            self.threads = threads.agree_on_threads(decided, self.accelerator)
            # Until it is measured half of the cores: all may be slow beside another program, and one for a large model.
            torch.set_num_threads(self.threads.number or max(1, self.threads.most // 2))
        self._environment = describe_environment(self.device, self.accelerator.num_processes)
        if self._resumed is not None:
            found = find_differences(config, self._environment, self._resumed, self.print)
            check_compatible(found, accept, self._resumed, self.print)
            if self.step > config.train.max_steps:
                raise ValueError(
                    f"{self._resumed} is beyond train.max_steps {config.train.max_steps}; raise that to {self.step} or "
                    "more, or start a new run in another output_dir"
                )
        torch.manual_seed(config.seed)
        self._unlock: Callable[[], None] = lambda: None
        self._images: CaptionedImages | None = None
        self._held_out: CaptionedImages | None = None
        self._data: dict[str, Any] = {}
        self._account: DatasetReport | None = None
        self._micro: list[StepLosses] = []  # of the present step
        self._losses: list[float] = []  # of the steps since the last line of the log
        self._figures: dict[str, list[float]] = {}  # what else was measured in them
        self._gradient_norm = 0.0
        self._skipped = {"in_all": 0, "in_a_row": 0}
        self._seen, self._since = 0, time.perf_counter()
        self._started_at, self._logs_are_cut = self.step, False
        self._saved = -1 if self._resumed is None else self.step
        self._saved_at, self._save_now = time.monotonic(), False
        self._bar: tqdm[Any] | None = None
        self._plan: dict[str, Any] | None = None
        self._planned = 0.0
        self._pace: Pace | None = None
        self.reason: str | None = None

    def start(self, networks: TrainingState) -> None:
        """Opens the run folder and fills the networks from the checkpoint that is resumed.

        Raises:
            ValueError: if that checkpoint stands on other weights, or the folder is not ours; nothing is written then.
        """
        if self._resumed is not None:
            self._check_untrained(networks, self._resumed)
        if self.is_main:
            self._unlock = open_folder(
                self.folder,
                self.config,
                self.step,
                resume=self._resume,
                damaged=self._damaged,
                say=self.print,
            )
            if self._account is not None and self._images is not None:
                checkpoint.write_json(self.folder / "data.json", self._account.to_dict())
                prints = sample_fingerprints(self._images, self._held_out)
                checkpoint.write_json(self.folder / "fingerprints.json", prints)
        self.accelerator.wait_for_everyone()
        # What TensorBoard was told after this step is hidden, as it is cut from the log.
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})
        if self._resumed is not None:
            self._restore(networks, self._resumed)

    # ---- processes, data and the step

    @property
    def is_resumed(self) -> bool:
        """Whether a checkpoint is gone on from."""
        return self._resumed is not None

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def print(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def check_data(self, images: CaptionedImages, held_out: CaptionedImages | None, account: DatasetReport) -> None:
        """Remembers what is trained on and held out; refuses a batch that cannot be made, and other samples than those
        resumed.

        Raises:
            ValueError: before anything is written.
        """
        self.micro_batches(images, 0, 0)
        self._images, self._held_out, self._account = images, held_out, account
        self._data = {"samples": len(images), "sha256": data_fingerprint(images, held_out)}
        if self._resumed is not None:
            stored = checkpoint.read_json(self._resumed / "training" / "state.json")["data"]
            found = data_differences(self.folder, stored, self._data, images, held_out)
            check_compatible(found, self._accept, self._resumed, self.print)

    def set_threads(self, measured: Threads) -> None:
        """Takes the number of threads with which all that follows is computed, in this session and those after it."""
        assert measured.number is not None
        self.threads = measured
        torch.set_num_threads(measured.number)
        self._environment["threads"] = measured.number

    def settle(self, config: LDMConfig, reason: str | None) -> None:
        """Takes the config in which what was left open ("auto") is decided, and the reason, for the plan."""
        self.config = config
        self.reason = reason
        if self._resumed is not None:
            stored = checkpoint.read_json(self._resumed / "training" / "state.json")["config"]
            found = config_differences(stored, config, str(self._resumed))
            check_compatible(found, self._accept, self._resumed, lambda _: None)

    def micro_batches(
        self, images: CaptionedImages, first_step: int, last_step: int
    ) -> Iterator[list[tuple[int, int]]]:
        """What this process reads of the images; ValueError if they do not make a batch, or it does not split."""
        return micro_batches(
            images.order(self.config.train.batch_size),
            first_step=first_step,
            last_step=last_step,
            accumulation=self.config.train.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def batches(self, images: CaptionedImages) -> Iterator[Batch]:
        """This process's micro-batches from the present step to the last, in the order of the whole run.

        They end early, after a whole step, when the run is told to stop.
        """
        if self.stopping:
            return
        interruption.may_break_off = False
        train = self.config.train
        sampler = self.micro_batches(images, self.step, train.max_steps)
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
        self._bar = tqdm(
            total=train.max_steps,
            initial=self.step,
            unit="step",
            disable=not self.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 20,
        )
        self._since, self._saved_at = time.perf_counter(), time.monotonic()
        for number, batch in enumerate(loader):
            # Dropout inside a network is the one thing that draws from torch's own generator: keyed as well.
            slice_of_step = number % train.gradient_accumulation_steps
            draw = generator(self.config.seed, "torch", self.step, slice_of_step, self.accelerator.process_index)
            torch.manual_seed(int(draw.integers(2**63)))
            yield batch
            if self.stopping and slice_of_step + 1 == train.gradient_accumulation_steps:
                break
        self._bar.close()

    def backward(self, losses: StepLosses) -> None:
        """Adds the gradients of a micro-batch's losses."""
        losses.backward(self.accelerator)
        self._micro.append(losses.detached())

    def optimize(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, discriminator: nn.Module | None = None
    ) -> bool:
        """One step of the optimizer once the gradients of all its micro-batches are there.

        Args:
            discriminator: a second network that the optimizer moves, whose gradient is clipped by itself.

        A loss or gradient that is not finite in any process is seen here by all: the optimizer is not run, and the
        samples are named. The processes also learn here, in the same message, whether one of them was told to stop.

        Returns:
            Whether the weights have moved.

        Raises:
            ValueError: after `train.max_nonfinite_steps` such steps in a row.
        """
        if not self.accelerator.sync_gradients:
            return False
        train, micro = self.config.train, self._micro
        norm = self.accelerator.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        assert norm is not None and self._images is not None
        beside = {}
        if discriminator is not None and any(p.grad is not None for p in discriminator.parameters()):
            clipped = self.accelerator.clip_grad_norm_(discriminator.parameters(), train.max_grad_norm)
            assert clipped is not None
            beside["gradient_norm_discriminator"] = clipped
        minutes = train.checkpoint_minutes
        is_time = self.is_main and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        stop = interruption.requested is not None
        met = nonfinite.sync_step(self.accelerator, micro, norm, beside=beside, stop=stop, save=is_time)
        self._micro = []
        self.stopping |= met.stop
        self._save_now = met.save
        if met.is_finite:
            self._losses.append(met.loss)
            for name, value in met.figures.items():
                self._figures.setdefault(name, []).append(value)
            if math.isfinite(met.gradient_norm):  # not where a loss scaler has found its limit
                self._gradient_norm = met.gradient_norm
            self._skipped["in_a_row"] = 0
        else:
            self._skip(met, micro)
        if met.is_finite or self.accelerator.scaler is not None:  # a loss scaler skips by itself, and learns from it
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, self.step)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return met.is_finite and not self.accelerator.optimizer_step_was_skipped

    def _skip(self, met: nonfinite.StepResult, micro: Sequence[StepLosses]) -> None:
        """Counts and names a step that is not made."""
        self._skipped = {key: count + 1 for key, count in self._skipped.items()}
        assert self._images is not None
        losses = nonfinite.gather_in_order(self.accelerator, micro)
        log = self.folder / "nonfinite.jsonl"
        if self.is_main:
            self._truncate_logs()
            positions = self._images.order(self.config.train.batch_size).batch(self.step)
            samples = nonfinite.nonfinite_samples(self._images, positions, losses.tolist())
            self.print(nonfinite.log_skipped_step(log, self.step + 1, met, samples))
        if self._skipped["in_a_row"] >= self.config.train.max_nonfinite_steps:
            raise ValueError(
                f"the loss or gradient was not finite in {self._skipped['in_a_row']} steps in a row, whose samples are "
                f"in {log}; {checkpoints.describe_newest(self.folder)}; leave these samples out, or go on from there "
                f"with a lower learning rate: {resume_command(self.folder)} --set "
                f"train.learning_rate={self.config.train.learning_rate / 2:g} --accept train.learning_rate (where its "
                "weights are spoilt already, move it away first, and the one before is used)"
            )

    def advance(self, codebook: Codebook | None = None) -> None:
        """Counts a step and logs every `log_every` of them, and the use of a codebook since the last line."""
        train = self.config.train
        self.step += 1
        self._seen += train.batch_size
        if self._bar is not None:
            self._bar.update()
        slow = self._pace and self._pace.step()
        if slow:
            self.print(slow)
        if not self._is_multiple(train.log_every):
            return
        rate = self._seen / (time.perf_counter() - self._since)
        values = {"learning_rate": learning_rate(train, self.step - 1), "samples_per_second": round(rate, 2)}
        if self._losses:
            loss = math.fsum(self._losses) / len(self._losses)
            figures = {name: math.fsum(seen) / len(seen) for name, seen in self._figures.items()}
            values = {"loss": loss, **figures, "gradient_norm": self._gradient_norm} | values
            if self._bar is not None:
                self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} samples/s", refresh=False)
        if codebook is not None:
            values = codebook.figures() | values
        if self._skipped["in_all"]:
            values["skipped_steps"] = self._skipped["in_all"]
        self.log(values)
        self._seen, self._since = 0, time.perf_counter()
        if self.step % train.log_every == 0:  # not at the end alone: a run that is prolonged goes on with them
            self._losses, self._figures = [], {}
            if codebook is not None:
                codebook.start_over()

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now; never once the run stops:
        what is left out is made up for when it is resumed. None never happens.
        """
        return every is not None and self._is_multiple(every) and not self.stopping

    def _is_multiple(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.max_steps

    # ---- what is written

    def announce(self, plan: Plan) -> None:
        """Prints the plan and keeps it in `plan.json`; what it took is added at the end."""
        self.print(plan.text())
        self._plan = plan.to_dict()
        self._truncate_logs()
        checkpoint.write_json(self.folder / "plan.json", self._plan)
        self._planned = time.perf_counter()
        self._pace = Pace(plan, None if self.threads is None else self.threads.number)

    def log(self, values: Mapping[str, float]) -> None:
        """Appends to `metrics.jsonl` and TensorBoard."""
        self.note(values)
        self.accelerator.log(dict(values), step=self.step)  # writes on the main process alone

    def note(self, content: Mapping[str, Any]) -> None:
        """Appends to `metrics.jsonl` alone what need not be numbers."""
        if self.is_main:
            self._truncate_logs()
            disk.append_line(self.folder / "metrics.jsonl", json.dumps({"step": self.step, **content}))

    def _truncate_logs(self) -> None:
        """Drops, before the first line of this session, what an earlier one wrote after the step it goes on from."""
        if self._resume and not self._logs_are_cut:
            train = self.config.train
            again: list[str] = []
            if self.step == self._started_at:
                again += ["held_out"] if self.due(train.validate_every) else []
                is_due = isinstance(train, DiffusionTrainConfig) and self.due(train.evaluate_every)
                again += [EVALUATION, VERDICT] if is_due else []
            truncate_log(self.folder / "metrics.jsonl", self._started_at, again=again)
            truncate_log(self.folder / "nonfinite.jsonl", self._started_at, again=())
        self._logs_are_cut = True

    def measure(self, values: Callable[[], Mapping[str, float]]) -> None:
        """Computes figures on the main process and logs them."""
        with self._on_main_process():
            if self.is_main:
                try:
                    self.log(values())
                except NotFinite as error:  # the weights are finite, and what follows may be
                    self.print(f"step {self.step} was not measured: {error}")

    def save_best(self, name: str, export: Callable[[Path], None]) -> None:
        """Exports what is trained to `RUN/best/` if the figure `name`, just measured, is the lowest of the run so far.

        What the log says decides, so that a resumed run decides as an unbroken one.
        """
        if self.stopping:  # it was not measured to the end
            return
        with self._on_main_process():
            if not self.is_main:
                return
            *earlier, (step, latest) = logged_values(self.folder, name)
            if step != self.step or not latest < min((value for _, value in earlier), default=math.inf):
                return
            with checkpoint.atomic_folder(self.folder / "best", "best") as folder:
                export(folder / self.export)
                checkpoint.write_json(folder / "best.json", {"step": step, name: latest, "files": file_hashes(folder)})

    def save_samples(self, draw: Callable[[], Image.Image]) -> None:
        """Draws a sample grid on the main process and writes it as PNG and to TensorBoard."""
        with self._on_main_process():
            if self.is_main:
                try:
                    sheet = draw()
                except NotFinite as error:
                    self.print(f"step {self.step} has no sample grid: {error}")
                    return
                save_png(sheet, self.folder / "samples" / f"step_{self.step:08d}.png")
                writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
                writer.add_image("samples", np.asarray(sheet), self.step, dataformats="HWC")

    def write_once(self, name: str, write: Callable[[Path], None]) -> Path:
        """A folder of the run that is written by its first session and kept.

        Raises:
            ValueError: if a later session would write something else: what the run stands on has changed.
        """
        folder = self.folder / name
        if self.is_main:
            write_once(folder, write)
        self.accelerator.wait_for_everyone()
        return folder

    @contextmanager
    def _on_main_process(self, may_break_off: bool = True) -> Iterator[None]:
        """What the main process does alone, in time that does not count as training. The others wait, and learn
        whether it has failed, or the run is to stop.
        """
        started, error = time.perf_counter(), None
        try:
            with interruption.breaking_off(may_break_off and self.is_main):
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
        took = time.perf_counter() - started
        self._since += took
        if self._pace is not None:
            self._pace.leave_out(took)

    def save_if_due(self, networks: TrainingState, export: Callable[[Path], None]) -> None:
        """Writes a checkpoint every so many steps and minutes, at the end, and before the run stops.

        Args:
            export: writes the trained model into the folder that it is given.
        """
        due = self._is_multiple(self.config.train.checkpoint_every) or self._save_now or self.stopping
        if not due or self._saved == self.step:
            return
        with self._on_main_process(may_break_off=False):
            if self.is_main:
                self._save(networks, export)
        self._saved, self._saved_at, self._save_now = self.step, time.monotonic(), False

    def _save(self, networks: TrainingState, export: Callable[[Path], None]) -> None:
        def fill(folder: Path) -> None:
            export(folder / self.export)
            self._write_training_state(folder / "training", networks)

        target, train = checkpoints.checkpoint_folder(self.folder, self.step), self.config.train
        for log in self.folder.glob("*.jsonl"):  # never older than the checkpoint
            disk.sync(log)
        checkpoints.write_checkpoint(target, fill)
        self._renew_export(target)
        checkpoints.prune_checkpoints(self.folder, train.keep_checkpoints, train.keep_every)
        write_report(self.folder)

    def _renew_export(self, newest: Path) -> None:
        with checkpoint.atomic_folder(self.folder / self.export, self.export) as folder:
            checkpoint.link_tree(newest / self.export, folder)

    def finish(self, networks: TrainingState, export: Callable[[Path], None]) -> None:
        """Ends the run: says how long it took beside what was planned, and writes the last report.

        Raises:
            Stopped: if it was told to stop; where it has come is saved first.
        """
        self.save_if_due(networks, export)
        if self.is_main and self._plan is not None and not self.stopping:
            took = time.perf_counter() - self._planned
            checkpoint.write_json(self.folder / "plan.json", self._plan | {"took_seconds": took})
            self.print(f"took {duration(took)}, planned were {duration(self._plan['expected_seconds'])}")
        if self.is_main:
            self.print(f"report: {write_report(self.folder)}")
        self.accelerator.end_training()
        self._unlock()
        if self.stopping:
            raise Stopped(
                f"step {self.step} of {self.config.train.max_steps} is saved; go on with {resume_command(self.folder)}"
            )

    # ---- what is resumed

    def _check_untrained(self, networks: TrainingState, resumed: Path) -> None:
        state = checkpoint.read_json(resumed / "training" / "state.json")
        if state.get("untrained_sha256") != networks.frozen_hash:
            raise ValueError(
                f"{resumed} was trained on other weights than those of the model in start_from today; restore that "
                "model, or start a new run in another output_dir"
            )

    def _restore(self, networks: TrainingState, resumed: Path) -> None:
        folder = resumed / "training"
        state = checkpoint.read_json(folder / "state.json")
        networks.restore(folder, state["ema_updates"], state.get("adversarial_weight"))
        if self.accelerator.scaler is not None and state["grad_scaler"]:
            self.accelerator.scaler.load_state_dict(state["grad_scaler"])
        assert state["step"] == self.step, (state["step"], self.step)
        self._losses, self._figures = state.get("losses", []), state.get("figures", {})
        self._gradient_norm = state.get("gradient_norm", 0.0)
        self._skipped = state.get("skipped", self._skipped)
        if self.is_main:  # a process that was killed after its checkpoint has left an older one there, or none
            self._renew_export(resumed)
            checkpoints.prune_checkpoints(self.folder, self.config.train.keep_checkpoints, self.config.train.keep_every)
        self.print(f"resumed {resumed}")

    def _write_training_state(self, folder: Path, networks: TrainingState) -> None:
        folder.mkdir()
        networks.save(folder)
        scaler = self.accelerator.scaler
        checkpoint.write_json(
            folder / "state.json",
            {
                "step": self.step,
                "data": self._data,
                "processes": self.accelerator.num_processes,
                "untrained_sha256": networks.frozen_hash,
                "ema_updates": int(networks.ema.n_averaged),
                "grad_scaler": scaler.state_dict() if scaler is not None else None,
                "losses": self._losses,
                "figures": self._figures,
                "adversarial_weight": networks.adversary and networks.adversary.weight,
                "gradient_norm": self._gradient_norm,
                "skipped": self._skipped,
                "environment": self._environment,
                "config": yaml.safe_load(to_yaml(self.config)),
            },
        )
