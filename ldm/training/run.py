"""One run of a training script: its processes, its folder, its log and its checkpoints.

RUN/config.yaml         the complete config
RUN/data.json           the account of the data
RUN/plan.json           what was planned, and how long it took
RUN/report.html         all of this as one page
RUN/metrics.jsonl       a line whenever something was measured
RUN/samples/            sample grids
RUN/tensorboard/        the same for TensorBoard
RUN/checkpoints/step_00001000/   `training/` to resume from, and what the script exports
RUN/<export>/           the newest export: `pipeline/`, `lora/` or `autoencoder/`
RUN/best/               the export with the lowest held-out loss so far, and which that is
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm import checkpoint
from ldm.config import AutoencoderTrainingConfig, LDMConfig, to_yaml
from ldm.data import Account, Batch, CaptionedImages, collate, generator, micro_batches
from ldm.pipelines import save_png
from ldm.training.files import check_new, difference, hashes, locked
from ldm.training.networks import Networks
from ldm.training.optimisation import learning_rate
from ldm.training.plan import Plan, duration
from ldm.training.report import write_report
from ldm.training.resuming import check_config, checkpoints, cut_log, logged, newest_checkpoint


class Run:
    """The processes of a run, and from `start` on its folder.

    Nothing is written before `start`, so that a wrong config or data set leaves no trace.

    Args:
        resume: go on from the newest checkpoint of the folder, or start where there is none. Without it an
            older run of the same folder is moved aside, never overwritten.
        export: name of the folder with the trained model, in each checkpoint and in the run folder.

    Attributes:
        step: optimizer steps done; the position in the data follows from it.
    """

    def __init__(self, config: LDMConfig | AutoencoderTrainingConfig, *, export: str, resume: bool) -> None:
        self.config = config
        self.folder = Path(config.output_dir).expanduser()
        self.export = export
        processes = int(os.environ.get("WORLD_SIZE", 1))
        no_accelerator = not torch.accelerator.is_available()
        self.accelerator = Accelerator(
            cpu=no_accelerator and processes > 1,  # else several processes without a GPU do not find each other
            mixed_precision=config.train.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.train.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with="tensorboard",
            project_dir=self.folder,
        )
        if self.accelerator.num_processes != processes:
            raise ValueError(
                f"{processes} processes were launched but accelerate joined {self.accelerator.num_processes}; "
                "launch them with torchrun --nproc_per_node, or a single one"
            )
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            torch.set_num_threads(config.train.cpu_threads or max(1, _cores() // processes))
        self.step = 0
        self._resume = resume
        self._resumed = self._newest_checkpoint() if resume else None
        if self._resumed is not None:
            check_config(self.config, self._resumed, self.print)
        torch.manual_seed(config.seed)
        self._lock: int | None = None
        self._data: dict[str, Any] = {}
        self._account: Account | None = None
        self._losses: list[Tensor] = []
        self._gradient_norm: Tensor | None = None
        self._seen, self._since = 0, time.perf_counter()
        self._bar: tqdm[Any] | None = None
        self._plan: dict[str, Any] | None = None
        self._planned = 0.0
        self.reason: str | None = None

    def start(self, networks: Networks) -> None:
        """Opens the run folder and fills the networks from the checkpoint that is resumed.

        Raises:
            ValueError: if that checkpoint stands on other weights, or the folder is not ours; nothing is written then.
        """
        if self._resumed is not None:
            self._check_untrained(networks, self._resumed)
        if self.is_main:
            self._open_folder()
            if self._account is not None:
                checkpoint.write_json(self.folder / "data.json", self._account.to_dict())
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("tensorboard")
        if self._resumed is not None:
            self._restore(networks, self._resumed)

    # ---- processes, data and the step

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def print(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def check_data(self, images: CaptionedImages, account: Account) -> None:
        """Remembers what is trained on; refuses a batch that cannot be made, and other samples than those resumed.

        Raises:
            ValueError: before anything is written.
        """
        self.micro_batches(images, 0, 0)
        self._account = account
        digest = hashlib.sha256()
        for sample in images.samples:
            digest.update(repr((sample.id, sample.digest, sample.captions)).encode("utf-8", "surrogatepass"))
        if len(images.buckets.sizes) > 1:  # the order of batches follows from them
            digest.update(repr((images.buckets.sizes, images.buckets.assignment)).encode())
        self._data = {"samples": len(images), "sha256": digest.hexdigest()}
        if self._resumed is not None:
            stored = checkpoint.read_json(self._resumed / "training" / "state.json")["data"]
            if stored != self._data:
                raise ValueError(
                    f"{self._resumed} was trained on {stored['samples']} images and now there are {len(images)}, "
                    "or other names, pictures, captions or aspect ratios; restore the data, or start a new run in "
                    "another output_dir"
                )

    def settle(self, config: LDMConfig, reason: str | None) -> None:
        """Takes the config in which what was left open ("auto") is decided, and the reason, for the plan."""
        self.config = config
        self.reason = reason
        if self._resumed is not None:
            check_config(self.config, self._resumed, self.print)

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
        """This process's micro-batches from the present step to the last, in the order of the whole run."""
        train = self.config.train
        sampler = self.micro_batches(images, self.step, train.max_steps)
        loader = DataLoader(images, batch_sampler=sampler, collate_fn=collate, num_workers=train.num_workers)
        self._bar = tqdm(
            total=train.max_steps,
            initial=self.step,
            unit="step",
            disable=not self.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 20,
        )
        self._since = time.perf_counter()
        for number, batch in enumerate(loader):
            # Dropout inside a network is the one thing that draws from torch's own generator: keyed as well.
            slice_of_step = number % train.gradient_accumulation_steps
            draw = generator(self.config.seed, "torch", self.step, slice_of_step, self.accelerator.process_index)
            torch.manual_seed(int(draw.integers(2**63)))
            yield batch
        self._bar.close()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's loss, and the loss to what is logged next."""
        self.accelerator.backward(loss)
        self._losses.append(loss.detach())

    def optimize(self, model: nn.Module, optimizer: torch.optim.Optimizer, ids: Sequence[str]) -> None:
        """One step of the optimizer once the gradients of all its micro-batches are there; else nothing.

        Raises:
            ValueError: if the gradient is not finite, before the optimizer moves. (Under fp16 the loss
                scaler skips overflowing gradients itself, and only the loss is watched.)
        """
        train = self.config.train
        if self.accelerator.sync_gradients:
            self._gradient_norm = self.accelerator.clip_grad_norm_(model.parameters(), train.max_grad_norm)
            assert self._gradient_norm is not None
            watched = self._losses[-1] if train.mixed_precision == "fp16" else self._gradient_norm
            if not bool(watched.isfinite()):
                raise ValueError(
                    f"the loss or gradient of step {self.step} is not finite (loss {float(self._losses[-1])}, samples "
                    f"{', '.join(ids[:8])} …); the optimizer was not run; start again with a lower train.learning_rate"
                )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, self.step)
        optimizer.step()  # accelerate lets it and zero_grad pass until the gradients are synchronised
        optimizer.zero_grad(set_to_none=True)

    def advance(self) -> None:
        """Counts an optimizer step and logs every `log_every` of them."""
        self.step += 1
        self._seen += self.config.train.batch_size
        if self._bar is not None:
            self._bar.update()
        if not self.due(self.config.train.log_every):
            return
        mean = self.accelerator.reduce(torch.stack(self._losses).mean(), "mean")
        assert isinstance(mean, Tensor) and self._gradient_norm is not None
        rate = self._seen / (time.perf_counter() - self._since)
        self.log(
            {
                "loss": float(mean),
                "gradient_norm": float(self._gradient_norm),
                "learning_rate": learning_rate(self.config.train, self.step - 1),
                "samples_per_second": round(rate, 2),
            }
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {float(mean):.4f}, {rate:.0f} samples/s", refresh=False)
        self._losses, self._seen, self._since = [], 0, time.perf_counter()

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.step % every == 0 or self.step == self.config.train.max_steps

    # ---- what is written

    def announce(self, plan: Plan) -> None:
        """Prints the plan and keeps it in `plan.json`; what it took is added at the end."""
        self.print(plan.text())
        self._plan = plan.to_dict()
        checkpoint.write_json(self.folder / "plan.json", self._plan)
        self._planned = time.perf_counter()

    def log(self, values: Mapping[str, float]) -> None:
        """Appends to `metrics.jsonl` and TensorBoard."""
        if self.is_main:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        self.accelerator.log(dict(values), step=self.step)  # writes on the main process alone

    def measure(self, values: Callable[[], Mapping[str, float]]) -> None:
        """Computes figures on the main process and logs them."""
        with self._aside():
            if self.is_main:
                self.log(values())

    def keep_best(self, name: str, export: Callable[[Path], None]) -> None:
        """Exports what is trained to `RUN/best/` if the figure `name`, just measured, is the lowest of the run so far.

        What the log says decides, so that a resumed run decides as an unbroken one.
        """
        with self._aside():
            if not self.is_main:
                return
            *earlier, (step, latest) = logged(self.folder, name)
            if step != self.step or not latest < min((value for _, value in earlier), default=math.inf):
                return
            with checkpoint.atomic_folder(self.folder / "best") as folder:
                export(folder / self.export)
                checkpoint.write_json(folder / "best.json", {"step": step, name: latest})

    def save_sheet(self, draw: Callable[[], Image.Image]) -> None:
        """Draws a sample grid on the main process and writes it as PNG and to TensorBoard."""
        with self._aside():
            if self.is_main:
                sheet = draw()
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
            with TemporaryDirectory(prefix=f".{name}.", dir=self.folder) as scratch:
                fresh = Path(scratch) / name
                write(fresh)
                changed = difference(hashes(folder), hashes(fresh)) if folder.exists() else None
                if changed is not None:
                    raise ValueError(
                        f"{folder / changed} is not what the config names today; restore that part as it was, "
                        "or start a new run in another output_dir"
                    )
                if not folder.exists():
                    fresh.rename(folder)
        self.accelerator.wait_for_everyone()
        return folder

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Time that does not count as training; the other processes wait."""
        started = time.perf_counter()
        yield
        self.accelerator.wait_for_everyone()
        self._since += time.perf_counter() - started

    def save_checkpoint(self, networks: Networks, export: Callable[[Path], None]) -> None:
        """Writes a checkpoint, renews `RUN/<export>/` from it, and drops the oldest ones.

        Args:
            export: writes the trained model into the folder that it is given.
        """
        with self._aside():
            if not self.is_main:
                return
            target = self.folder / "checkpoints" / f"step_{self.step:08d}"
            with checkpoint.atomic_folder(target) as folder:
                export(folder / self.export)
                self._write_training_state(folder / "training", networks)
                checkpoint.write_json(folder / "manifest.json", {"files": hashes(folder)})
            self._renew_export(target)
            write_report(self.folder)
            for old in checkpoints(self.folder)[: -self.config.train.keep_checkpoints]:
                shutil.rmtree(old)

    def _renew_export(self, newest: Path) -> None:
        with checkpoint.atomic_folder(self.folder / self.export) as folder:
            checkpoint.link_tree(newest / self.export, folder)

    def _check_untrained(self, networks: Networks, resumed: Path) -> None:
        state = checkpoint.read_json(resumed / "training" / "state.json")
        if state.get("untrained_sha256") != networks.untrained_digest:
            raise ValueError(
                f"{resumed} was trained on other weights than those of the model in start_from today; restore that "
                "model, or start a new run in another output_dir"
            )

    def _restore(self, networks: Networks, resumed: Path) -> None:
        folder = resumed / "training"
        state = checkpoint.read_json(folder / "state.json")
        networks.restore(folder, state["ema_updates"])
        if self.accelerator.scaler is not None and state["grad_scaler"]:
            self.accelerator.scaler.load_state_dict(state["grad_scaler"])
        self.step = state["step"]
        if self.is_main and not (self.folder / self.export).exists():
            self._renew_export(resumed)
        self.print(f"resumed {resumed}")

    def finish(self) -> None:
        """Says how long it took beside what was planned, and writes the last report."""
        if self.is_main and self._plan is not None:
            took = time.perf_counter() - self._planned
            checkpoint.write_json(self.folder / "plan.json", self._plan | {"took_seconds": took})
            self.print(f"took {duration(took)}, planned were {duration(self._plan['expected_seconds'])}")
        if self.is_main:
            self.print(f"report: {write_report(self.folder)}")
        self.accelerator.end_training()
        if self._lock is not None:
            os.close(self._lock)

    def _write_training_state(self, folder: Path, networks: Networks) -> None:
        folder.mkdir()
        networks.save(folder)
        scaler = self.accelerator.scaler
        packages = ("torch", "numpy", "accelerate", "transformers", "safetensors")
        checkpoint.write_json(
            folder / "state.json",
            {
                "step": self.step,
                "data": self._data,
                "processes": self.accelerator.num_processes,
                "untrained_sha256": networks.untrained_digest,
                "ema_updates": int(networks.ema.n_averaged),
                "grad_scaler": scaler.state_dict() if scaler is not None else None,
                "config": yaml.safe_load(to_yaml(self.config)),
                "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            },
        )

    def _newest_checkpoint(self) -> Path | None:
        newest, damaged = newest_checkpoint(self.folder, self.print)
        self.accelerator.wait_for_everyone()
        if self.is_main:
            for folder in damaged:
                folder.rename(folder.with_name(f"damaged.{folder.name}"))
        return newest

    def _open_folder(self) -> None:
        check_new(self.folder)
        if self._resumed is None and self.folder.exists() and any(self.folder.iterdir()):
            os.close(locked(self.folder))
            aside = next(
                path for n in range(1, 10**6) if not (path := self.folder.with_name(f"{self.folder.name}.{n}")).exists()
            )
            self.folder.rename(aside)
            self.print(f"{self.folder} held an earlier run, which is now {aside}")
        if self._resumed is None and self._resume:
            self.print(f"{self.folder} has no checkpoint to resume; starting at step 0")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.folder)
        (self.folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        if self._resumed is not None:
            cut_log(self.folder, int(self._resumed.name.removeprefix("step_")))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
