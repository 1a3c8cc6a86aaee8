"""What messages say has to be installed is what pyproject.toml says, and never an extra of a name that is another's."""

import re
from pathlib import Path

import tomllib

from ldm.requirements import OPTIONAL, pip_install

ROOT = Path(__file__).resolve().parent.parent


def declared() -> list[str]:
    """All requirements of pyproject.toml, those of the extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]


def test_optional_requirements_are_those_of_the_project() -> None:
    assert set(OPTIONAL.values()) <= set(declared())
    assert pip_install("peft", "open_clip") == "pip install 'peft>=0.20' 'open-clip-torch>=3.3'"


def test_no_message_names_an_extra_of_ours() -> None:
    extra = re.compile(r"ldm\[|pip install [\"']?ldm\b")
    for path in (path for tree in ("ldm", "train", "tools", "docs") for path in (ROOT / tree).rglob("*")):
        if path.suffix in (".py", ".md", ".yaml"):
            assert not extra.search(path.read_text(encoding="utf-8")), path
    assert not extra.search((ROOT / "README.md").read_text(encoding="utf-8"))
