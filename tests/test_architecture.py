"""The rooms: who may import whom, who may know TRL's private names, and how large a room gets."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "trl_rlsd"
# upper levels import lower ones; rooms on one level do not import each other
LEVELS = [
    {"cli"},
    {"lab"},
    {"doctor", "inspection"},
    {"quickstart", "train"},
    {"trainer"},
    {"publishing", "credit_log"},
    {"privileged_batch", "resumable", "hub", "report"},
    {"teacher_pass", "prompt_check", "token_credit", "run_record"},
    {"config", "teacher", "external", "collator", "losses", "checks", "rollouts", "checkpoints"},
    {"contrast", "spans", "alarms", "leakage", "context", "images", "shards"},
    {"credit", "metrics", "rewards", "data"},
    {"dotted", "files", "memory", "texts"},
]
LIBRARIES = ("trl", "transformers", "peft", "accelerate", "datasets")
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Every trl_rlsd room that a module imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name.split(".")[1] for name in names if name.startswith("trl_rlsd.")}
    return found


def test_every_room_has_a_level():
    rooms = {room(path) for path in MODULES} - {"__init__", "__main__"}
    assert rooms == set().union(*LEVELS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_strictly_downward(path):
    if room(path) in ("__init__", "__main__"):
        return
    level = next(i for i, rooms in enumerate(LEVELS) if room(path) in rooms)
    below = set().union(*LEVELS[level + 1 :])
    allowed = below | {room(path)} | {"__version__"}
    assert {
        name for name in imports(path) if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()
    } <= allowed


def private_names(path: Path) -> set[str]:
    """Names with a leading underscore that are read off something other than this package's own objects."""
    tree = ast.parse(path.read_text())
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    used |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    return {name for name in used if name.startswith("_") and not name.startswith("__")} - own


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_trls_private_names_stand_in_the_trainers_alone(path):
    if path.name in ("trainer.py", "publishing.py", "resumable.py") and path.parent == PACKAGE:
        from test_contract import PRIVATE

        assert private_names(path) <= set(PRIVATE)
    else:
        assert private_names(path) == set()


def submodule_imports(path: Path) -> set[str]:
    """What is imported from below the top level of the Hugging Face libraries, where an upgrade may move it."""
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES
        for alias in node.names
        if "." in node.module
    }


def test_what_is_imported_from_inside_the_libraries_is_listed():
    from test_contract import SUBMODULES

    assert set().union(*map(submodule_imports, MODULES)) == set(SUBMODULES)


def test_pure_rooms_need_torch_alone():
    heavy = ("trl", "transformers", "datasets", "peft")
    pure = "trl_rlsd.credit, trl_rlsd.metrics, trl_rlsd.collator"
    code = f"import sys, {pure}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "[]"


def test_rooms_stay_readable():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert len(path.read_text().splitlines()) <= 480, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)
