"""`ldm evaluate MODEL --axes`: how a model of scenes composes, as a table, JSON and a sheet of pictures."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from ldm.evaluation.composition import AxesReport, AxisFigure, AxisResult
    from ldm.evaluation.frechet import Interval
    from ldm.evaluation.reference import Bars
    from ldm.training.run_info import RunInfo

SHOWN = 3  # prompts of each axis on the sheet


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
    bars: Bars,
) -> None:
    """Prints a table, or with `as_json` all figures; writes axes.json and axes.png.

    Raises:
        ValueError: for a model whose data is not known, or is not scenes.
    """
    from ldm import disk
    from ldm.data.scenes.source import TIERS
    from ldm.evaluation.composition import compose
    from ldm.evaluation.judge import load_judge
    from ldm.evaluation.kept import KeptPictures
    from ldm.evaluation.sweep import model_digest
    from ldm.pipelines import save_png
    from ldm.training.run_info import open_model

    if run is None:
        raise ValueError(
            f"{model} lies in no run folder, so that its data is not known; --axes is for models of scenes "
            "(data.path: scenes)"
        )
    data = run.config.data
    if data.path != "scenes":
        raise ValueError(
            f"{model} was trained on {data.path}, and --axes is for models of scenes (data.path: scenes); leave it out"
        )
    judge = load_judge()
    pipeline, opened = open_model(model, run, device)
    digest = model_digest(pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    found = compose(
        pipeline,
        judge,
        tier=TIERS[data.things],
        seen=scenes_seen(run),
        count=prompts,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        keep=KeptPictures(folder / "pictures", digest),
        bars=bars,
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
    print(f"\nfigures: {folder / 'axes.json'}\npictures: {folder / 'axes.png'}")


def scenes_seen(run: RunInfo) -> int:
    """Numbers from 0 on that a run, and those that it went on from, had in training, at most."""
    config = run.config
    epochs = math.ceil(config.train.max_steps * config.train.batch_size / config.data.scenes)
    return config.data.first_scene + math.ceil(epochs / config.data.renew_every) * config.data.scenes


def lines(found: AxesReport) -> list[str]:
    """The table, and what has to be known of it."""
    settings = found.settings
    said = [
        f"{settings['things']} things, {settings['pictures_of_a_prompt']} pictures of each prompt; "
        f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}, seed {settings['seed']}",
        "",
        f"{'asked':<17}{'right':<8}{'prompts':>8}  {'model':<22}{'real scenes':<13}of what is read of these",
    ]
    for part in found.parts:
        for place, figure in enumerate(part.figures):
            name, prompts = (part.axis, str(len(part.prompts))) if place == 0 else ("", "")
            ratio = "-" if figure.ratio is None else _percent(figure.ratio)
            real = f"{figure.real.mean:.0%}{'' if _is_fair(figure) else ' *'}"
            said.append(f"{name:<17}{figure.what:<8}{prompts:>8}  {_percent(figure.generated):<22}{real:<13}{ratio}")
    if not all(_is_fair(figure) for part in found.parts for figure in part.figures):
        from ldm.evaluation.composition import FAIR

        said += ["", f"* the judge reads fewer than {FAIR:.0%} of real scenes right, so that this figure says little"]
    if found.nearest is not None:
        near = found.nearest
        said += [
            "",
            f"combinations beside {near.seen[0]:,} of {near.seen[1]:,} scenes that the run saw: "
            f"nearest at {near.distance:.2f}, of real held-out scenes at {near.real_distance:.2f}",
            f"nearer than all but 5% of these: {_percent(near.nearer)}; "
            f"suspected copies: {near.copying.suspects.share:.1%}, of unseen scenes {near.copying.expected:.1%}",
        ]
    return said


def _is_fair(figure: AxisFigure) -> bool:
    from ldm.evaluation.composition import FAIR

    return figure.real.mean >= FAIR


def _percent(value: Interval) -> str:
    return f"{value.mean:.1%} ({value.low:.0%} to {value.high:.0%})"


def sheet(found: AxesReport) -> Image.Image:
    """Of the first prompts of each axis: the model's pictures, then the real scenes."""
    from ldm.pipelines import contact_sheet

    rows = [row for part in found.parts for row in _rows(part)]
    return contact_sheet([pictures for pictures, _ in rows], [caption for _, caption in rows])


def _rows(part: AxisResult) -> list[tuple[list[Image.Image], str]]:
    from ldm.data import to_signed
    from ldm.evaluation.composition import EACH
    from ldm.pipelines import to_pil

    rows = []
    what = list(part.right)[-1]
    for place, prompt in enumerate(part.prompts[:SHOWN]):
        own = slice(EACH * place, EACH * (place + 1))
        pictures = [*to_pil(to_signed(part.pictures[own])), *to_pil(to_signed(part.real[own]))]
        right = int(part.right[what][own].sum())
        rows.append((pictures, f"{part.axis}: {prompt.caption} ({what} in {right} of {EACH} | real scenes)"))
    return rows
