"""Results as text, one list of lines each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ldm.data import to_signed
from ldm.data.report import DatasetReport, quoted
from ldm.evaluation.autoencoder import ACTIONS, MAX_MEAN, STD_RANGE, Advice, AutoencoderReport
from ldm.evaluation.composition import IMAGES_PER_PROMPT, MIN_REAL_ACCURACY, AxesReport, AxisAccuracy, prompt_rows
from ldm.evaluation.evaluate import Evaluation
from ldm.evaluation.fidelity import Fidelity, Metric
from ldm.evaluation.memorization import Copying, LossGap
from ldm.evaluation.prompt_alignment import CLIPSCORE_W, ClipScore, Retrieval
from ldm.evaluation.stats import Interval
from ldm.evaluation.sweep import RECALL_K, Cell, Sweep, paired_difference, pareto_front
from ldm.models.similarity import WINDOW
from ldm.pipelines import contact_sheet, to_pil
from ldm.progress import plural, printable

INDENT = "  "
SHEET_PROMPTS = 3  # of each axis
SHOWN_ENTRIES, LABEL_WIDTH = 10, 12  # of the lists of a data report


# ---- evaluations


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """The settings, the verdict, and each metric."""
    lines = [describe_settings(evaluation), "", "Verdict", INDENT + evaluation.verdict.sentence]
    if evaluation.copying is not None:
        lines.append(INDENT + describe_closer(evaluation.copying))
    if evaluation.gap is not None:
        lines += [INDENT + line for line in gap_lines(evaluation.gap)]
    if evaluation.fidelity is not None:
        lines += ["", "Fidelity to real images (in brackets: 95 % intervals)"]
        lines += [INDENT + line for line in fidelity_lines(evaluation.fidelity)]
    lines += ["", "Prompt alignment"]
    for side in evaluation.retrieval:
        lines += [f"{INDENT}{side} captions", *(2 * INDENT + line for line in alignment_lines(evaluation, side))]
    if evaluation.left_out:
        lines += ["", *evaluation.left_out]
    return lines


def describe_settings(evaluation: Evaluation) -> str:
    """Number of images, and how they were generated."""
    settings = evaluation.settings
    counts = " and ".join(f"{count:,} for {side} captions" for side, count in settings["samples"].items())
    width, height = settings["size"]
    return (
        f"{sum(settings['samples'].values()):,} images of {width}x{height} pixels ({counts}): "
        f"{settings['num_inference_steps']} steps of {settings['sampler']}, guidance {settings['guidance_scale']:g}, "
        f"seed {settings['seed']}"
    )


def alignment_lines(evaluation: Evaluation, side: str) -> list[str]:
    """Prompt alignment of the images for one side's captions."""
    lines = retrieval_lines(evaluation.retrieval[side], evaluation.settings["features"])
    if (accuracy := evaluation.digit_accuracy.get(side)) is not None:
        lines.append(
            f"classified as the prompted digit {100 * accuracy.mean:5.1f} %  ({100 * accuracy.low:.1f} to "
            f"{100 * accuracy.high:.1f}; by chance 10 %)"
        )
    if (score := evaluation.clip_scores.get(side)) is not None:
        lines.append(clip_line(score))
    return lines


def describe_closer(copying: Copying) -> str:
    """How often images are closer to a training image than that is to the others."""
    held_out = ""
    if copying.held_out_closer is not None:
        real = copying.held_out_closer
        held_out = f"; of {real.total} held-out images {100 * real.fraction:.1f} %"
    closer = copying.closer
    return (
        f"closer to a training image than that is to any other: {100 * closer.fraction:.1f} % of {closer.total} images "
        f"for training captions ({100 * closer.low:.1f} to {100 * closer.high:.1f}){held_out}"
    )


def gap_lines(gap: LossGap) -> list[str]:
    """The loss of both sides, one line per band of noise."""
    lines = [
        f"loss by noise (t), {gap.training_images} training and {gap.held_out_images} held-out images, {gap.draws} "
        "evaluations each:",
        f"{INDENT}{'t':>9}  {'training':>9}  {'held-out':>9}  {'gap':>9}",
    ]
    for band in gap.bands:
        half_width = "" if math.isnan(band.interval) else f" ± {band.interval:.4f}"
        span = f"{band.first}-{band.last}"
        lines.append(f"{INDENT}{span:>9}  {band.training:9.4f}  {band.held_out:9.4f}  {band.gap:+9.4f}{half_width}")
    return lines


def metric_line(metric: Metric) -> str:
    measured = f"{metric.samples:,} {metric.images}"
    if metric.yardstick:
        measured += f" over {metric.yardstick:,} held-out"
    measured += f" against {metric.reference_samples:,} training images, {metric.features}"
    return f"{metric.name:<17} {metric.value:9.4g}  ({metric.low:.4g} to {metric.high:.4g})  {measured}"


def fidelity_lines(fidelity: Fidelity) -> list[str]:
    """One line per metric, then one for each that is left out."""
    return [*map(metric_line, fidelity.metrics()), *fidelity.left_out]


def retrieval_lines(found: Retrieval, label: str) -> list[str]:
    """As text; `label` names the features."""
    head = f"retrieval: the rank of the caption's own image among all {found.gallery}, by the cosine of {label}; "
    head += f"{len(found.ranks)} captions, 95 % intervals"
    table = [
        f"  among the {k:2d} nearest  {100 * recall.mean:5.1f} %  ({100 * recall.low:.1f} to "
        f"{100 * recall.high:.1f}; by chance {100 * found.chance[k]:.2g} %)"
        for k, recall in found.within.items()
    ]
    low, high = found.median.low, found.median.high
    middle = f"  median rank {found.median.mean:11g}    ({low:g} to {high:g}; by chance {found.median_by_chance})"
    return [head, *table, middle]


def clip_line(score: ClipScore) -> str:
    found = score.hundred
    return (
        f"CLIP score {found.mean:.2f} ({found.low:.2f} to {found.high:.2f}, 95 %): 100 x cosine, {score.model}, "
        f"{score.pictures} images; with the captions of others {score.others:.2f}; as CLIPScore (w = "
        f"{CLIPSCORE_W}) {score.score:.3f}"
    )


# ---- sweeps


def sweep_lines(sweep: Sweep) -> list[str]:
    """As text."""
    front = {cell.setting for cell in pareto_front(sweep.cells)}
    lines = [
        f"sweep: {sweep.captions} captions of {sweep.images} held-out images, the same noise in all cells (seed "
        f"{sweep.seed}); KID to these images and the caption's own image among all {sweep.gallery}, {sweep.features}",
        f"  weights  guidance  steps  evaluations  KID ± standard error  own image among {RECALL_K}  typical rank",
    ]
    for cell in sorted(sweep.cells, key=lambda cell: (cell.evaluations, cell.kid)):
        weights, scale, steps = cell.setting
        row = f"  {weights:7s}  {scale:8g}  {steps:5d}  {cell.evaluations:11g}  "
        row += f"{cell.kid:9.5f} ± {cell.kid_error:.5f}  {100 * cell.near:18.1f} %  {cell.typical_rank:12.1f}"
        lines.append(row + ("  *" if cell.setting in front else ""))
    lines.append("  * no cell is as cheap and better")
    mine = sweep.chosen
    if not mine.decided:
        lines.append("chosen: nothing. These captions do not distinguish the cells: use more")
    else:
        why = "no other is within one standard error of it, in KID and then in rank"
        if mine.equal > 1:
            why = f"the cheapest of {mine.equal} within one standard error of the best, in KID and then in rank"
        stored = "" if sweep.stored is None else f"; stored as the defaults of {sweep.stored}"
        evaluations = f"{mine.cell.evaluations:g} evaluations per image"
        lines.append(f"chosen: {_setting(mine.cell)} ({evaluations}): {why}{stored}")
    for name, other in list(sweep.choices.items())[1:]:
        kid, error = paired_difference(other.cell, mine.cell, "kid")
        difference = f"KID {kid:+.5f} ± {error:.5f} relative to that"
        lines.append(f"with {name} weights: {_setting(other.cell)}, {difference}. A sweep does not change the weights")
    return lines


def _setting(cell: Cell) -> str:
    return f"guidance {cell.guidance_scale:g}, {cell.num_inference_steps} steps"


# ---- first stages


def autoencoder_lines(report: AutoencoderReport) -> list[str]:
    """As text; the advice is last."""
    n = f"{report.images:,} images"
    lines = [_metric_text("PSNR, dB", report.psnr) + f"  {n}"]
    if report.ssim is not None:
        lines.append(f"{_metric_text('SSIM', report.ssim)}  {n}, Gaussian window of {WINDOW} pixels")
    perceptual = _metric_text("perceptual", report.perceptual)
    lines.append(f"{perceptual}  {n}, EfficientNet-Lite0 maps; 1 is between different images")
    if (frechet := report.frechet) is not None:
        over = f"{frechet.samples:,} reconstructions" + (" over their originals, each" if frechet.is_ratio else "")
        value = _metric_text(frechet.name, frechet.interval)
        lines.append(f"{value}  {over} against {frechet.against}, {frechet.features}")
    for name, values in (("latent means", report.latents.mean), ("latent stds", report.latents.std)):
        lines.append(f"{name:<26} {' '.join(f'{value:.3f}' for value in values)}")
    if report.latents.kl is not None:
        lines.append(f"{'KL, nats per latent':<26} {report.latents.kl:9.4g}")
    if report.readout is not None:
        lines.append(f"{'linear probe, dB':<26} {report.readout:9.4g}  of latents and reconstruction, cross-fitted")
    far = [
        f"{channel} (mean {mean:.2f}, std {std:.2f})"
        for channel, (mean, std) in enumerate(zip(report.latents.mean, report.latents.std, strict=True))
        if abs(mean) > MAX_MEAN or not STD_RANGE[0] <= std <= STD_RANGE[1]
    ]
    if far:
        channels = ", ".join(far)
        lines.append(f"Channels of the latents not near mean 0, std 1: {channels}. See scaling_factor in config.json.")
    return [*lines, *report.left_out, advice_line(report.advice)]


def advice_line(advice: Advice) -> str:
    return f"advice: {ACTIONS[advice.action]}, because {advice.why}"


def _metric_text(name: str, interval: Interval) -> str:
    return f"{name:<26} {interval.mean:9.4g}  ({interval.low:.4g} to {interval.high:.4g})"


# ---- likelihoods


def likelihood_lines(found: Mapping[str, Any]) -> list[str]:
    """Of the dictionary of a likelihood result."""
    channels, height, width = found["shape"]
    interval, sampled = found["interval_95"], found["timesteps_interval_95"]
    around = "" if interval is None else f" ± {interval:.4f}, 95 % over images"
    around += f" (± {sampled:.4f} of it from sampled timesteps)" if sampled else ""
    return [
        f"{found['data']}, {found['split']}: {found['images']} images of {channels}x{height}x{width} values, "
        f"{found['timesteps_per_image']} timesteps each, {found['evaluations']} evaluations of the network, "
        f"{found['variance']} variance; bits per dimension:",
        f"  L_T          {found['L_T']:8.4f}   the prior at t = T",
        f"  sum of L_t   {found['sum_of_L_t']:8.4f}   t > 0",
        f"  L_0          {found['L_0']:8.4f}   the decoder",
        f"  total        {found['bits_per_dimension']:8.4f}{around}",
    ]


# ---- models of scenes


def axes_lines(found: AxesReport) -> list[str]:
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
            ratio = "-" if accuracy.ratio is None else _percent_interval(accuracy.ratio)
            real = f"{accuracy.real.mean:.0%}{'' if _is_reliable(accuracy) else ' *'}"
            model = f"{_percent_interval(accuracy.generated):<22}"
            table.append(f"{name:<17}{accuracy.what:<8}{prompts:>8}  {model}{real:<13}{ratio}")
    if not all(_is_reliable(accuracy) for part in found.parts for accuracy in part.accuracies):
        table += ["", f"* the classifier is right on fewer than {MIN_REAL_ACCURACY:.0%} of real scenes: unreliable"]
    if found.nearest is not None:
        near = found.nearest
        table += [
            "",
            f"combinations compared with {near.seen[0]:,} of {near.seen[1]:,} training scenes of the run: "
            f"median distance {near.distance:.2f}, of real held-out scenes {near.real_distance:.2f}",
            f"nearer than the nearest 5% of these: {_percent_interval(near.nearer)}; possible copies: "
            f"{near.copying.flagged_fraction.fraction:.1%}, of unseen scenes {near.copying.expected:.1%}",
        ]
    return table


def _is_reliable(accuracy: AxisAccuracy) -> bool:
    return accuracy.real.mean >= MIN_REAL_ACCURACY


def _percent_interval(value: Interval) -> str:
    return f"{value.mean:.1%} ({value.low:.0%} to {value.high:.0%})"


def axes_sheet(found: AxesReport) -> Image.Image:
    """For the first prompts of each axis: generated images, then real scenes."""
    rows, captions = [], []
    for part in found.parts:
        what, first = list(part.correct)[-1], part.prompts[:SHEET_PROMPTS]
        for prompt, own in zip(first, prompt_rows(len(first)), strict=True):
            rows.append([*to_pil(to_signed(part.images[own])), *to_pil(to_signed(part.real[own]))])
            right = f"{int(part.correct[what][own].sum())} of {IMAGES_PER_PROMPT}"
            captions.append(f"{part.axis}: {prompt.caption} ({what} in {right} | real scenes)")
    return contact_sheet(rows, captions)


# ---- data


def report_text(report: DatasetReport, *, full: bool = False) -> str:
    """The report as printable text; lists are cut at ten entries unless `full`."""
    shown = None if full else SHOWN_ENTRIES
    paragraphs: dict[str, list[str]] = {}
    sizes = report.sizes
    lines = []
    if sizes.smallest and sizes.median and sizes.largest:
        smallest, median, largest = (f"{w}x{h}" for w, h in (sizes.smallest, sizes.median, sizes.largest))
        lines.append(f"all {smallest}" if smallest == largest else f"{smallest} to {largest}, median {median}")
    if sizes.enlarged:
        lines.append(f"{plural(sizes.enlarged, 'image')} smaller than {report.resolution} pixels: enlarged")
    paragraphs["sizes"] = lines
    for label, counts in (("shapes", sizes.shapes), ("formats", report.formats), ("modes", report.modes)):
        line = ", ".join(f"{count} {printable(name)}" for name, count in counts.items())
        paragraphs[label] = [line] if line else []
    traits = report.traits.items()
    paragraphs["treated"] = [f"{count} {printable(name)}: {report.treatment[name]}" for name, count in traits]
    lines = []
    captions = report.captions
    if captions.words:
        fewest, typical, most = captions.words
        lines.append(
            f"{captions.total} on {plural(report.used, 'image')}, {captions.distinct} different, "
            f"{fewest} to {most} words, median {typical:g}"
            + (f"; {captions.templated} of them by data.caption_templates" if captions.templated else "")
        )
    if captions.missing or captions.empty:
        lines.append(f"{captions.missing} missing, {captions.empty} empty")
    if captions.repeated:
        shared = [f"{quoted(text)} on {count}" for text, count in captions.repeated[: None if shown is None else 3]]
        lines.append(f"shared by images: {', '.join(shared)}")
    if captions.too_long:
        lines.append(f"{len(captions.too_long)} too long for the text encoder:")
        lost = [f"  {printable(entry.image)} loses {quoted(entry.lost)}" for entry in captions.too_long]
        lines += _cut(lost, shown, "  ")
    elif captions.too_long is not None:
        lines.append("all fit into the text encoder")
    paragraphs["captions"] = lines
    if any(source.reason for source in report.caption_sources):
        used = [(source, "not used" if source.reason else "used") for source in report.caption_sources]
        sources = [f"{printable(source.name)}: {plural(source.images, 'image')}, {how}" for source, how in used]
        paragraphs["sources"] = _cut(sources, shown)
    alike = []
    for names in report.near_duplicates:
        more = 0 if shown is None else len(names) - shown
        alike.append(", ".join(map(printable, names[:shown])) + (f", … and {more} more" if more > 0 else ""))
    paragraphs["alike"] = _cut(alike, shown)
    copies = [f"{printable(copy.path)} = {printable(copy.of)}" for copy in report.duplicate_files]
    paragraphs["copies"] = _cut(copies, shown)
    by_reason: dict[str, list[str]] = defaultdict(list)
    for entry in report.skipped_files:
        by_reason[entry.reason].append(f"  {printable(entry.path)}")
    lines = []
    for reason, paths in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        lines += [f"{len(paths)} × {printable(reason)}", *_cut(paths, shown, "  ")]
    paragraphs["skipped"] = lines
    lines = [report.summary(), ""]
    for label, texts in paragraphs.items():
        lines += [f"{label if not number else '':<{LABEL_WIDTH}}{text}" for number, text in enumerate(texts)]
    if report.notes:
        lines += ["", "Good to know", *(f"  - {line}" for line in report.notes)]
    if report.needs_attention:
        lines += ["", "Needs attention", *(f"  - {line}" for line in report.needs_attention)]
    else:
        lines += ["", "Nothing needs attention."]
    return "\n".join(lines)


def _cut(lines: list[str], shown: int | None, indent: str = "") -> list[str]:
    if shown is None or len(lines) <= shown:
        return lines
    return [*lines[:shown], f"{indent}… and {len(lines) - shown} more (--all shows them)"]
