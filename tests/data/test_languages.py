"""Caption files with lines in several languages, captions in other scripts, and many captions of one image."""

import pytest
from PIL import Image

from ldm.data import DataConfig
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.data.report import dataset_report

LINES = "A red kangaroo.\nde.utf8=Ein rotes Känguru\npt_BR.utf8=Um canguru\nsr@latin.utf8=Kengur\n"


def folder(tmp_path, *texts):
    for i, text in enumerate(texts):
        Image.new("RGB", (16, 16), (10 * i, 200, 30)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def report(path, **data):
    config = DataConfig(path=str(path), resolution=16, **data)
    inspection = inspect(open_source(config), config)
    return [sample.captions for sample in inspection.used], dataset_report(inspection, config)


@pytest.mark.parametrize(
    ("language", "caption"),
    [
        (None, "A red kangaroo."), ("en", "A red kangaroo."), ("de", "Ein rotes Känguru"),
        ("pt_BR", "Um canguru"), ("pt-BR", "Um canguru"), ("pt", "Um canguru"), ("sr@latin", "Kengur"),
    ],
)  # fmt: skip
def test_one_language_of_several(tmp_path, language, caption):
    captions, found = report(folder(tmp_path, LINES), caption_language=language)
    assert captions == [(caption,)]
    assert found.captions.languages == {"en": 1, "de": 1, "pt_BR": 1, "sr@latin": 1}
    assert any("lines in 4 languages" in note and "data.caption_language" in note for note in found.notes)


def test_a_language_that_is_not_there_is_named(tmp_path):
    captions, found = report(folder(tmp_path, LINES, "A dog\nfr.utf8=Un chien\n"), caption_language="fr")
    assert captions == [("Un chien",)]
    assert "without a caption in fr" in found.skipped_files[0].reason
    with pytest.raises(ValueError, match="which is for folders"):
        DataConfig(path="digits", resolution=8, caption_language="de")


@pytest.mark.parametrize("text", ["de.utf8=Hund\nfr.utf8=chien\n", "de = Hund\nfr-FR=chien"])
def test_without_english_all_lines_count(tmp_path, text):
    captions, _ = report(folder(tmp_path, text))
    assert captions == [("Hund", "chien")]


@pytest.mark.parametrize(
    "text", ["a = b", "an equation: x = 5\nanother line", "no=yes", "f(x)=x\ng(x)=2", "cat = a pet\ndog = a pet"]
)
def test_a_caption_with_an_equals_sign_is_a_caption(tmp_path, text):
    captions, found = report(folder(tmp_path, text))
    assert captions == [tuple(text.split("\n"))] and not found.captions.languages


def test_a_language_without_effect_is_named(tmp_path):
    _, found = report(folder(tmp_path, "a dog"), caption_language="de")
    assert any("data.caption_language is de, but no caption file" in problem for problem in found.needs_attention)


def test_many_captions_and_other_scripts_need_attention(tmp_path):
    many = "\n".join(f"a dog, seen {i} times" for i in range(11))
    _, found = report(folder(tmp_path, many, "犬がいる", "собака", "a cat"))
    assert found.captions.many == 1 and found.captions.non_latin == 2
    problems = " ".join(found.needs_attention)
    assert "1 image has more than 10 captions" in problems and "2 of 14 captions are not in Latin letters" in problems
    (tmp_path / "few").mkdir()
    _, found = report(folder(tmp_path / "few", "a dog", "un café", "12"))
    assert not found.captions.many and not found.captions.non_latin
