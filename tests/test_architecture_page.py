"""docs/architecture.md and the other pages name files and definitions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def links(page: Path) -> list[tuple[str, Path]]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return [(name, page.parent / target) for name, target, _ in LINK.findall(text) if not re.match(r"[a-z]+:", target)]


def definitions(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    assert [str(path) for _, path in links(page) if not path.exists()] == []


def test_linked_definitions_exist() -> None:
    found = [(name, path) for name, path in links(ROOT / "docs" / "architecture.md") if path.suffix == ".py"]
    named = [(name, path) for name, path in found if name != path.name]
    assert len(found) > 20 and len(named) > 10
    assert [f"{name} in {path}" for name, path in named if name not in definitions(path)] == []


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
