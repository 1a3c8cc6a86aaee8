"""What messages say has to be installed is what pyproject.toml says, and never an extra of a name that is another's."""

import re
import tomllib
from pathlib import Path

from ldm.environment import OPTIONAL, pip_install

ROOT = Path(__file__).resolve().parent.parent


def declared() -> list[str]:
    """All requirements of pyproject.toml, those of the extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]


def floors() -> dict[str, str]:
    """Library → the oldest version that pyproject.toml accepts; extras of ours are no libraries."""
    found = [re.match(r"([\w.-]+)(?:>=|==)([\d.]+)", line) for line in declared()]
    return {match[1]: match[2] for match in found if match}


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_requirement_has_a_floor_and_each_library_one() -> None:
    lines = [line for line in set(declared()) if not line.startswith("ldm[")]
    assert len(lines) == len(floors())


def test_the_floors_are_those_of_the_file_and_the_table_in_the_docs() -> None:
    table = re.findall(r"^\| ([\w.-]+) \| (?:exactly )?([\d.]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert dict(table) == floors() | {"Python": project["project"]["requires-python"].removeprefix(">=")}
    # torch alone is tested at one version.
    assert pinned("floors.txt") == floors() | {"torch": pinned("constraints.txt")["torch"]}


def test_what_is_tested_is_accepted_and_the_tools_know_the_oldest_python() -> None:
    tested = {name.lower().replace("_", "-"): version for name, version in pinned("constraints.txt").items()}
    for name, floor in floors().items():
        version = tested.get(name.lower().replace("_", "-"))
        assert version is None or parts(version) >= parts(floor), name
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert (tools["ruff"]["target-version"], tools["mypy"]["python_version"]) == ("py311", "3.11")


def parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_libraries_with_known_faults_are_not_accepted() -> None:
    safe = {"peft": "0.20", "pillow": "13.0", "torch": "2.10", "accelerate": "1.15", "datasets": "5.2"}
    assert {name: floors()[name] for name in safe} == safe


def test_optional_requirements_are_those_of_the_project() -> None:
    assert set(OPTIONAL.values()) <= set(declared())
    assert pip_install("peft", "open_clip") == "pip install 'peft>=0.20' 'open-clip-torch>=3.3'"


def test_no_message_names_an_extra_of_ours() -> None:
    extra = re.compile(r"ldm\[|pip install [\"']?ldm\b")
    for path in (path for tree in ("ldm", "train", "tools", "docs") for path in (ROOT / tree).rglob("*")):
        if path.suffix in (".py", ".md", ".yaml"):
            assert not extra.search(path.read_text(encoding="utf-8")), path
    assert not extra.search((ROOT / "README.md").read_text(encoding="utf-8"))
