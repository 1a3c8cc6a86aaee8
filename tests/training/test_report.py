"""The page of a run: what it shows, what it says about the curves, and that nothing in the folder can break it."""

import base64
import io
import itertools
import json
import math
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

from ldm.report import charts, html
from ldm.report.charts import Line
from ldm.training import report as metrics
from ldm.training.report import write_report

XHTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"


def write_metrics(folder, entries):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def a_run(folder, steps=400, max_steps=400):
    """A run of which every part is there: the held-out loss is lowest at half of its steps."""
    for part in ("samples", "best", "pipeline", "checkpoints/step_00000400"):
        (folder / part).mkdir(parents=True)
    draw = random.Random(0)
    entries = []
    for step in range(4, steps + 1, 4):
        loss = (0.1 + math.exp(-step / 20) - step / 8000) * math.exp(draw.gauss(0, 0.02))
        entries.append({"step": step, "loss": loss, "gradient_norm": 2.0, "learning_rate": 1e-4})
        entries[-1]["samples_per_second"] = 32.0
        if step % 40 == 0:
            held_out = 0.1 + abs(step - steps // 2) / 4000
            entries.append({"step": step, "held_out_loss": held_out, "held_out_loss_t000_249": 3 * held_out})
            entries[-1]["held_out_loss_t250_499"] = held_out
    write_metrics(folder, entries)
    config = {"train": {"max_steps": max_steps, "batch_size": 16}, "sample": {"prompts": ["a dog's <b>", "red"]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for step in (200, 400):
        Image.new("RGB", (30, 20), (step // 2, 0, 0)).save(folder / "samples" / f"step_{step:08d}.png")
    (folder / "best" / "best.json").write_text('{"step": 200, "held_out_loss": 0.1}')
    (folder / "pipeline" / "model_index.json").write_text("{}")
    (folder / "plan.json").write_text('{"expected_seconds": 7200, "reasons": ["few images"]}')
    account = {"total": 10, "skipped": [{"path": "a.png", "reason": "truncated"}], "needs_attention": ["1 was skipped"]}
    (folder / "data.json").write_text(json.dumps(account))
    return folder


def parsed(folder):
    """The page as a tree: it is well-formed XML, which holds only if everything in it is escaped."""
    return ElementTree.fromstring(write_report(folder).read_bytes())


def text_of(tree):
    return "".join(tree.find(f"{XHTML}body").itertext())


def pictures(tree):
    """(caption, picture) of each sheet on the page."""
    for figure in tree.iter(f"{XHTML}figure"):
        for image in figure.iter(f"{XHTML}img"):
            media, content = image.attrib["src"].split(";base64,")
            picture = Image.open(io.BytesIO(base64.b64decode(content)))
            assert media == f"data:{picture.get_format_mimetype()}"
            yield "".join(figure.find(f"{XHTML}figcaption").itertext()), picture


def test_a_page_shows_all_that_a_run_has_written(tmp_path):
    folder = a_run(tmp_path / "my_run")
    tree = parsed(folder)
    assert tree.find(f"{XHTML}head/{XHTML}title").text == "my_run"
    tiles = {
        tile[0].text: "".join(tile[1].itertext())
        for tile in tree.iter(f"{XHTML}div")
        if tile.find(f"{XHTML}dt") is not None
    }
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [entry["loss"] for entry in entries if "loss" in entry][-1]
    assert tiles["Training loss"] == f"{last:.4g}step 400"
    assert tiles["Held-out loss"] == "0.15step 400"
    assert tiles["Best held-out loss"] == "0.1step 200, saved in best/"
    assert tiles["Samples per second"].startswith("32")
    assert (
        tiles["Time in steps"].startswith("3 min") and "2 h 00 min" in tiles["Time in steps"]
    )  # 400 · 16 / 32 = 200 s
    text = text_of(tree)
    assert "Finished: all 400 steps." in text
    assert "The best step was 200." in text
    labels = [svg.attrib["aria-label"] for svg in tree.iter(f"{SVG}svg")]
    assert [label.split(";")[0] for label in labels] == [
        *("Loss", "Held-out loss by band of noise", "Learning rate", "Gradient norm before clipping"),
        "Samples per second",
    ]
    assert {"t 0–249", "t 250–499", "best held-out: step 200"} <= {t.text for t in tree.iter(f"{SVG}text")}
    assert [(caption, picture.getpixel((0, 0))[0]) for caption, picture in pictures(tree)] == [
        ("step 400", 200),
        ("step 200", 100),
    ]
    for shown in ("1 was skipped", "a.png", "truncated", "few images", "7,200 (2 h 00 min)", "step_00000400"):
        assert shown in text
    assert (folder / "config.yaml").read_text() in text
    assert f"ldm generate 'what to draw' --model {folder / 'pipeline'}" not in text
    assert f"""ldm generate 'a dog'"'"'s <b>' --model {folder / "pipeline"}""" in text


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    text = text_of(parsed(a_run(tmp_path / "run", max_steps=1600)))
    assert "Step 400 of 1,600 (25 %): unfinished" in text
    assert re.search(r"Remaining10 min", text)  # 1200 · 16 / 32 = 600 s


def test_every_part_may_be_missing(tmp_path):
    assert "no measurements" in text_of(parsed(tmp_path))
    whole = a_run(tmp_path / "whole")
    for part in sorted(whole.iterdir()):
        folder = tmp_path / f"without_{part.name}"
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / part.name) if part.is_dir() else (folder / part.name).unlink()
        assert "my_run" not in text_of(parsed(folder))
    with pytest.raises(ValueError, match=r"nowhere is no folder"):
        write_report(tmp_path / "nowhere")


HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "]]></style></svg><script>",
    "&lt;b&gt; &amp;amp;",
    "\x00\x1b[31m\x07\x7f\x85 \u202egnp.exe\u2066 \ufffe\uffff",
    "\ud800 lone \udfff",
    "{braces} %s {0}",
    "قطة صغيرة على السرير",
    "a woman with a hat " * 5000,
)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_from_outside_leaves_its_place(tmp_path, hostile):
    """Captions, prompts, file names, keys, metric names and the folder's own name; the tree has no new element."""
    plain, attacked = a_run(tmp_path / "plain"), a_run(tmp_path / re.sub(r"[/\x00\ud800-\udfff]", "_", hostile)[:80])
    for folder, text in ((plain, "harmless"), (attacked, hostile)):
        account = {
            text: text,
            "skipped": [{"path": text, text: text}],
            "needs_attention": [text],
            "d": {text: [[text]]},
        }
        (folder / "data.json").write_text(json.dumps(account))
        (folder / "plan.json").write_text(json.dumps({text: {text: {text: {text: {text: text}}}}}))
        prompts = {"train": {"max_steps": text}, "sample": {"prompts": [text]}}
        (folder / "config.yaml").write_text(yaml.safe_dump(prompts) + f"# {text}\n", "utf-8", "surrogatepass")
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": step, text: step, "note": text}) + "\n" for step in (1, 2, 3))
            file.write(json.dumps({"step": 4, text: math.nan}) + "\n")
    trees = [parsed(plain), parsed(attacked)]
    elements = [[element.tag for element in tree.iter()] for tree in trees]
    if "config.yaml is no YAML" in text_of(trees[1]):  # raw control characters: a note, and no prompts
        assert set(elements[1]) <= set(elements[0])
    else:
        assert elements[1] == elements[0]
    for element in trees[1].iter():
        assert not any(name.startswith("on") or name == "href" for name in element.attrib)
        assert element.attrib.get("src", "data:").startswith("data:")
    visible = html.shortened(html.visible(hostile))
    assert text_of(trees[1]).count(visible) >= 5
    assert (attacked / "report.html").stat().st_size < 400_000


def test_the_last_verdict_of_training_and_that_of_the_run_folder_are_shown(tmp_path):
    folder = a_run(tmp_path / "run")
    for step, kind in ((200, "not yet a model of this data"), (400, "learning")):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "verdict": {"kind": kind, "sentence": f"<b> {kind}: 0 %."}}) + "\n")
            file.write(json.dumps({"step": step, "verdict": [kind]}) + "\n")
    (folder / "evaluation").mkdir()
    evaluation = folder / "evaluation" / "evaluation.json"
    # As a version before this one wrote it.
    evaluation.write_text(json.dumps({"verdict": {"kind": "memorising", "sentence": "Memorising: 9 of 9."}}))
    text = text_of(parsed(folder))
    assert "Evaluation of step 400: <b> learning: 0 %." in text and "step 200: <b>" not in text
    assert "evaluation/evaluation.json: Memorising: 9 of 9." in text
    for content, said in ((None, ""), ({"kind": "fine"}, "holds no valid verdict"), (3, "holds no valid verdict")):
        evaluation.write_text(json.dumps({"verdict": content}))
        text = text_of(parsed(folder))
        assert "evaluation.json:" not in text and said in text
    evaluation.write_text("{")
    assert "evaluation.json cannot be read as JSON" in text_of(parsed(folder))


def test_invisible_characters_are_written_out_and_letters_are_not():
    assert html.escaped("a\x1b\u202e\ud800\U000e0041\n") == "a\\x1b\\u202e\\ud800\\U000e0041\n"
    assert html.escaped("می‌خواهم 👩‍🚀 ß é") == "می‌خواهم 👩‍🚀 ß é"
    assert html.escaped("<'\">&") == "&lt;&#x27;&quot;&gt;&amp;"


def test_metrics_are_read_as_far_as_they_can_be(tmp_path):
    lines = [
        '{"step": 10, "loss": 1.0, "held_out_loss": 2}',
        '{"step": 20, "loss": NaN}',
        '{"step": 30, "loss": Infinity, "gradient_norm": null}',
        '{"step": 30, "loss": 1e39}',
        '{"step": 40, "loss": 0.5, "done": true, "note": "x", "deep": [1]}',
        '{"step": 40, "loss": 0.25}',
        '{"step": "50", "loss": 1}', '{"step": -1, "loss": 1}', '{"step": true, "loss": 1}', "[1, 2]", "7",
        '{"step": 1' + "0" * 400 + ', "loss": 1}', '{"step": 45, "loss": 1' + "0" * 400 + "}",
        "[" * 100_000, "\x00\x01", '{"step": 50, "lo',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    found = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert found.values == {"loss": [(10, 1.0), (40, 0.25)], "held_out_loss": [(10, 2.0)]}
    assert found.nonfinite == {"loss": (20, 4), "gradient_norm": (30, 1)}
    assert found.damaged == 9
    assert found.last_step == 40
    text = text_of(parsed(tmp_path))
    assert "Non-finite values of loss that are left out: 4, the first at step 20." in text
    assert "left out: 9." in text


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [1.0, 1.0],
        [-1.0, 0.0, 5.0],
        [1e-45, 3e38],
        [-3e38, 3e38],
        [5e-324, 1e-323],
        [1.0, 1.0 + 1e-15],
        [1e-8] * 80,
    ],
)
@pytest.mark.parametrize("step", [0, 1, 2**53 - 1])
def test_any_finite_value_can_be_drawn(tmp_path, values, step):
    names = ("loss", "held_out_loss", "learning_rate", "gradient_norm", "held_out_psnr", "samples_per_second", "other")
    entries = [{"step": step - min(step, i), **dict.fromkeys(names, value)} for i, value in enumerate(values)]
    write_metrics(tmp_path, entries)
    tree = parsed(tmp_path)
    drawn = [line.attrib["points"] for line in tree.iter(f"{SVG}polyline")]
    assert len(drawn) >= len(names) - 1
    for points in drawn:
        for pair in points.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 640 and 0 <= y <= 320


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    folder = a_run(tmp_path / "run")
    (folder / "data.json").write_text('{"total": 1')
    (folder / "plan.json").write_bytes(b"[1]")
    (folder / "best" / "best.json").write_text("[" * 100_000)
    (folder / "config.yaml").write_text("train: [\n")
    (folder / "samples" / "step_00000300.png").write_text("no picture")
    Image.effect_noise((64, 64), 50).save(folder / "samples" / "step_00000100.png")
    cut = (folder / "samples" / "step_00000100.png").read_bytes()[:-1000]
    (folder / "samples" / "step_00000100.png").write_bytes(cut)
    tree = parsed(folder)
    text = text_of(tree)
    for named in ("data.json cannot be read", "plan.json holds list", "best.json cannot be read", "config.yaml is no"):
        assert named in text
    assert "samples/step_00000300.png cannot be read (it is no PNG)" in text
    assert "samples/step_00000100.png cannot be read (" in text
    assert str(tmp_path) not in text.replace(f"--model {folder}", "").replace(f"--resume {folder}", "")
    assert [caption for caption, _ in pictures(tree)] == ["step 400", "step 200"]
    (folder / "best" / "best.json").write_text('{"step": true, "held_out_loss": "low"}')
    (folder / "data.json").write_text(json.dumps({"a": 10**400, "b": math.nan, "c": [[[[[]]]]], "d": [None, {"e": 1}]}))
    assert "1000000000000" in text_of(parsed(folder))


def test_sheets_are_spread_over_time_and_fit_the_page(tmp_path):
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    for step in range(50, 2001, 50):
        shade = (noise // 8 + step // 10).astype(np.uint8)
        Image.fromarray(shade[: 900 if step == 2000 else 9, :]).save(tmp_path / "samples" / f"step_{step:08d}.png")
    shutil.copy(tmp_path / "samples" / "step_00000050.png", tmp_path / "samples" / "step_x.png")
    tree = parsed(tmp_path)
    shown = list(pictures(tree))
    steps = [int(re.match(r"step ([\d,]+)", caption)[1].replace(",", "")) for caption, _ in shown]
    assert len(steps) == 12 and steps[0] == 2000 and steps[-1] == 50
    gaps = [a - b for a, b in itertools.pairwise(steps)]
    assert set(gaps) <= {150, 200}
    caption, newest = shown[0]
    assert re.fullmatch(r"step 2,000, shown at (\d+) × \1 of 900 × 900 pixels", caption)
    assert newest.format == "JPEG" and 300 < newest.width < 900
    pixels = np.asarray(newest.convert("RGB"), dtype=float)
    assert abs(pixels.mean() - (noise // 8 + 200).astype(np.uint8).mean()) < 3
    assert "28 sheets, of step 100, 150, " in text_of(tree)
    assert (tmp_path / "report.html").stat().st_size < 8_000_000


def test_a_sheet_that_is_too_large_becomes_jpeg_before_it_shrinks(tmp_path):
    gradient = np.add.outer(np.arange(200), np.arange(300))
    picture = np.random.default_rng(0).integers(0, 6, (200, 300)) + gradient // 3
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "a.png")
    original = (tmp_path / "a.png").read_bytes()
    assert html.encoded(tmp_path / "a.png", len(original)) == (original, "image/png", (300, 200), (300, 200))
    content, media, shown, full = html.encoded(tmp_path / "a.png", len(original) - 1)
    assert (media, shown, full) == ("image/jpeg", (300, 200), (300, 200)) and len(content) < len(original)
    content, media, shown, full = html.encoded(tmp_path / "a.png", 3000)
    assert len(content) <= 3000 and 64 < shown[0] < 300 and full == (300, 200)


def trend_of(shape, noise=0.0, count=20, seed=0):
    draw = random.Random(seed)
    return metrics.find_trend(
        [(10 * i, shape(i / count) * math.exp(draw.gauss(0, noise))) for i in range(1, count + 1)]
    )


def test_the_course_of_a_curve():
    falling = trend_of(lambda u: 1 / u, noise=0.01)
    assert (falling.kind, falling.since) == ("falling", 140)
    assert falling.change == pytest.approx(-0.35, abs=0.05)
    rising = trend_of(lambda u: 1 + abs(u - 0.5), noise=0.005)
    assert (rising.kind, rising.best) == ("rising", 100)
    assert rising.change == pytest.approx(0.45, abs=0.03)  # the mean of the last three above the lowest
    assert trend_of(lambda u: 1 + math.exp(-20 * u), noise=0.002).kind == "flat"
    assert trend_of(lambda u: 1 + 0.005 * u).kind == "flat"  # clear, but not worth saying
    assert metrics.find_trend([(1, 1.0)] * 4) is None
    assert metrics.find_trend([(i, float(i)) for i in range(9)]) is None  # not positive


@pytest.mark.parametrize("count", [8, 20, 100])
def test_scatter_alone_is_not_called_a_course(count):
    kinds = [trend_of(lambda u: 1.0, noise=0.03, count=count, seed=seed).kind for seed in range(200)]
    assert kinds.count("flat") >= 180


def held_out(values, losses=()):
    figures = {"held_out_loss": [(100 * (i + 1), value) for i, value in enumerate(values)]}
    return metrics.Metrics(figures | {"loss": [(10 * (i + 1), value) for i, value in enumerate(losses)]})


def test_the_sentence_says_what_the_figures_say():
    vee = [1.5, 1.2, 1.0, 1.1, 1.2, 1.3, 1.4]
    down = [1 / (1 + i / 70) for i in range(70)]
    assert "rising since step 300, by 30.0 %, while the training loss fell by 29.8 %" in metrics.describe_trend(
        held_out(vee, down)
    )
    up = [1 + max(0, i - 30) / 70 for i in range(70)]
    assert "the training loss rose by" in metrics.describe_trend(held_out(vee, up))
    assert "hardly changes. The best step was 300" in metrics.describe_trend(held_out(vee, [1.0] * 70))
    assert "too few values" in metrics.describe_trend(held_out(vee))
    assert "still falling, by 16.7 % since step 500" in metrics.describe_trend(held_out([2 - i / 8 for i in range(7)]))
    assert "hardly changes since step 500 (0.0 %)" in metrics.describe_trend(held_out([1.0] * 7))
    assert metrics.describe_trend(held_out([1.0])).startswith("Held-out loss was measured 1 time, too few")
    noisy = [1.0, 1.3, 0.9, 1.2, 0.95, 1.25, 0.93, 1.1, 0.98]
    assert "shows no trend" in metrics.describe_trend(held_out(noisy))
    assert "no held-out images" in metrics.describe_trend(metrics.Metrics({"loss": [(1, 1.0)]}))


def test_psnr_is_better_when_it_is_higher():
    def sentence(values):
        return metrics.describe_trend(
            metrics.Metrics({"held_out_psnr": [(i + 1, value) for i, value in enumerate(values)]})
        )

    assert "Held-out PSNR is still rising" in sentence([20.0, 21, 22, 23, 24, 25])
    assert "has been falling since step 3, by 2.0" in sentence([20.0, 22, 24, 23, 22, 22, 22])
    assert "hardly changes" in sentence([20.0, 22, 24, 24, 24, 24, 24])
    assert "hardly changes" in sentence([1e30] * 6)


def test_thinning_keeps_every_extreme():
    draw = random.Random(0)
    points = [(step, draw.random()) for step in range(2 + 249 * 40)]
    points[5432] = (5432, 9.0)
    points[77] = (77, -9.0)
    kept = charts.thinned(points)
    assert len(kept) <= charts.MAX_POINTS
    assert {(5432, 9.0), (77, -9.0), points[0], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    for start in range(1, len(points) - 1, 40):
        part = [value for _, value in points[start : start + 40]]
        drawn = [value for step, value in kept if start <= step < start + 40]
        assert sorted(drawn) == [min(part), max(part)]


def test_smoothing_survives_a_spike():
    points = [(i, 1e30 if i == 5000 else 0.1) for i in range(10_000)]
    smoothed = charts.smooth(points)
    assert len(smoothed) <= 1001 and smoothed[-1][0] == 9999
    assert smoothed[-1][1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (charts.Axis(0.06, 1.0, True), [0.1, 0.2, 0.5, 1.0]),
        (charts.Axis(0.07, 0.98, True), [0.07, 0.1, 0.2, 0.3, 0.5, 0.7]),
        (charts.Axis(0.052, 0.098, True), [0.06, 0.07, 0.08, 0.09]),
        (charts.Axis(0.00002, 40.0, True), [1e-4, 1e-3, 0.01, 0.1, 1, 10]),
        (charts.Axis(0.0, 0.0004, False), [0, 1e-4, 2e-4, 3e-4, 4e-4]),
        (charts.Axis(29.1, 29.8, False), [29.2, 29.4, 29.6, 29.8]),
    ],
)
def test_ticks_are_round(axis, ticks):
    assert axis.ticks() == pytest.approx(ticks)


def test_names_in_a_legend_are_escaped_and_wrap():
    names = ['<b>&"', *(f"a rather long name {i}" for i in range(5))]
    tree = ElementTree.fromstring(charts.line_chart([Line(name, [(0, 1.0), (9, 2.0)]) for name in names], title="<'>"))
    legend = [element for element in tree.iter(f"{SVG}text") if element.text in names]
    assert [element.text for element in legend] == names and tree.attrib["aria-label"] == "<'>"
    plot = min(float(line.attrib["y1"]) for line in tree.iter(f"{SVG}line") if line.attrib["class"] == "grid")
    assert len({element.attrib["y"] for element in legend}) == 3
    assert max(float(element.attrib["y"]) for element in legend) < plot
    assert all(float(element.attrib["x"]) + 7 * len(element.text) <= 640 for element in legend)


def test_ticks_stand_where_their_values_are():
    tree = ElementTree.fromstring(charts.line_chart([Line("a", [(0, 0.01), (1000, 1.0)])], title="t", logarithmic=True))
    labels = {e.text: float(e.attrib["y"]) for e in tree.iter(f"{SVG}text") if e.attrib.get("text-anchor") == "end"}
    assert labels["0.01"] - labels["0.1"] == pytest.approx(labels["0.1"] - labels["1"], abs=0.2)
    assert labels["1"] == pytest.approx(20 + 5) and labels["0.01"] == pytest.approx(280 + 5)


def luminance(colour):
    """WCAG 2, relative luminance of #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [html.LIGHT, html.DARK])
def test_lines_and_text_can_be_told_from_the_page(palette):
    def contrast(colour):
        light, dark = sorted((luminance(colour), luminance(palette.background)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert min(map(contrast, palette.lines)) >= 4.5 and contrast(palette.ink) >= 7
    assert len(set(charts.DASHES)) == len(palette.lines)  # lines differ in more than their colour


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    page = write_report(tmp_path)
    before = page.read_bytes()
    write_metrics(tmp_path, [{"step": 1, "loss": 1.0}])

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.disk.os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path)
    assert page.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_a_long_account_is_shortened_and_says_so(tmp_path):
    account = {
        "skipped": [{"path": f"{i}.png", "reason": "no caption"} for i in range(5000)],
        **{f"list {i}": [f"name {i} {j}" for j in range(300)] for i in range(300)},
    }
    (tmp_path / "data.json").write_text(json.dumps(account))
    tree = parsed(tmp_path)
    text = text_of(tree)
    assert "200 of 5,000" in text and "… and 4,800 more in data.json." in text
    assert "199.png" in text and "200.png" not in text
    assert (tmp_path / "report.html").stat().st_size < 300_000
