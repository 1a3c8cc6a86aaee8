"""`ldm evaluate MODEL --axes`: how a model of scenes composes, as a table, JSON and a sheet of images."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from ldm.evaluation.composition import AxesReport, AxisAccuracy, AxisResult
    from ldm.evaluation.stats import Interval
    from ldm.progress import Progress
    from ldm.training.run_info import RunInfo

SHEET_PROMPTS = 3  # of each axis


def evaluate_axes(
    model: str,
    run: RunInfo | None,
    folder: Path,
    *,
    prompts: int | None,
    seed: int,
    steps: int | None,
    guidance: float | None,
    device: str | None,
    as_json: bool,
    progress: Progress,
) -> None:
    """Prints a table, or with `as_json` all numbers; writes axes.json and axes.png.

    Raises:
        ValueError: for a model whose data is unknown or is not scenes.
    """
    from ldm import disk
    from ldm.data.scenes.source import TIERS
    from ldm.evaluation.composition import evaluate_composition
    from ldm.evaluation.images import SampleCache
    from ldm.evaluation.scene_classifier import load_scene_classifier
    from ldm.evaluation.sweep import model_digest
    from ldm.pipelines import save_png
    from ldm.training.run_info import open_model

    if run is None:
        raise ValueError(
            f"{model} is not in a run folder, so its data is unknown; --axes is for models of scenes "
            "(data.path: scenes)"
        )
    data = run.config.data
    if data.path != "scenes":
        raise ValueError(
            f"{model} was trained on {data.path}, and --axes is for models of scenes (data.path: scenes); leave it out"
        )
    classifier = load_scene_classifier()
    pipeline, opened = open_model(model, run, device)
    digest = model_digest(pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    found = evaluate_composition(
        pipeline,
        classifier,
        tier=TIERS[data.things],
        scenes_seen=scenes_seen(run),
        max_prompts=prompts,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        cache=SampleCache(folder / "pictures", digest),
        progress=progress,
    )
    content = {"model": opened, "model_digest": digest, **found.to_dict()}
    text = json.dumps(content, indent=2, allow_nan=False)
    disk.write_text(folder / "axes.json", text + "\n")
    settings = {key: value for key, value in content.items() if key not in ("axes", "nearest")}
    save_png(sheet(found), folder / "axes.png", {"settings": settings})
    if as_json:
        print(text)
        return
    print("\n".join(lines(found)))
    print(f"\nnumbers: {folder / 'axes.json'}\nimages: {folder / 'axes.png'}")


def scenes_seen(run: RunInfo) -> int:
    """An upper bound for the numbers, from 0 on, of the training scenes of a run and of those that it continued."""
    from ldm.training.run_info import scenes_after

    return run.scenes or scenes_after(run.config, run.config.train.max_steps) or 0


def lines(found: AxesReport) -> list[str]:
    """The table, with notes."""
    settings = found.settings
    table = [
        f"{settings['things']} things, {settings['pictures_of_a_prompt']} images per prompt; "
        f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}, seed {settings['seed']}",
        "",
        f"{'axis':<17}{'right':<8}{'prompts':>8}  {'model':<22}{'real scenes':<13}model relative to real scenes",
    ]
    for part in found.parts:
        for row, accuracy in enumerate(part.accuracies):
            name, prompts = (part.axis, str(len(part.prompts))) if row == 0 else ("", "")
            ratio = "-" if accuracy.ratio is None else _percent(accuracy.ratio)
            real = f"{accuracy.real.mean:.0%}{'' if _is_reliable(accuracy) else ' *'}"
            model = f"{_percent(accuracy.generated):<22}"
            table.append(f"{name:<17}{accuracy.what:<8}{prompts:>8}  {model}{real:<13}{ratio}")
    if not all(_is_reliable(accuracy) for part in found.parts for accuracy in part.accuracies):
        from ldm.evaluation.composition import MIN_REAL_ACCURACY

        table += ["", f"* the classifier is right on fewer than {MIN_REAL_ACCURACY:.0%} of real scenes: unreliable"]
    if found.nearest is not None:
        near = found.nearest
        table += [
            "",
            f"combinations compared with {near.seen[0]:,} of {near.seen[1]:,} training scenes of the run: "
            f"median distance {near.distance:.2f}, of real held-out scenes {near.real_distance:.2f}",
            f"nearer than the nearest 5% of these: {_percent(near.nearer)}; possible copies: "
            f"{near.copying.flagged_fraction.fraction:.1%}, of unseen scenes {near.copying.expected:.1%}",
        ]
    return table


def _is_reliable(accuracy: AxisAccuracy) -> bool:
    from ldm.evaluation.composition import MIN_REAL_ACCURACY

    return accuracy.real.mean >= MIN_REAL_ACCURACY


def _percent(value: Interval) -> str:
    return f"{value.mean:.1%} ({value.low:.0%} to {value.high:.0%})"


def sheet(found: AxesReport) -> Image.Image:
    """For the first prompts of each axis: generated images, then real scenes."""
    from ldm.pipelines import contact_sheet

    rows = [row for part in found.parts for row in _rows(part)]
    return contact_sheet([images for images, _ in rows], [caption for _, caption in rows])


def _rows(part: AxisResult) -> list[tuple[list[Image.Image], str]]:
    from ldm.data import to_signed
    from ldm.evaluation.composition import IMAGES_PER_PROMPT, prompt_rows
    from ldm.pipelines import to_pil

    rows = []
    what = list(part.correct)[-1]
    first = part.prompts[:SHEET_PROMPTS]
    for prompt, own in zip(first, prompt_rows(len(first)), strict=True):
        images = [*to_pil(to_signed(part.images[own])), *to_pil(to_signed(part.real[own]))]
        right = int(part.correct[what][own].sum())
        rows.append((images, f"{part.axis}: {prompt.caption} ({what} in {right} of {IMAGES_PER_PROMPT} | real scenes)"))
    return rows
