"""What is installed is what runs: the wheel holds every file that is read, and needs none of the extras."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
EXTRAS = (
    "bitsandbytes", "duckdb", "gguf", "jsonschema_rs", "liger_kernel", "loky", "math_verify", "matplotlib", "openai",
    "pebble", "PIL", "playwright", "plotly", "reasoning_gym", "scipy",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel, and a source archive, of this tree."""
    folder = tmp_path_factory.mktemp("dist")
    script = (
        "import setuptools.build_meta as backend, sys\n"
        "folder = sys.argv[1]; backend.build_sdist(folder); backend.build_wheel(folder)\n"
    )
    tree = folder / "tree"  # building writes into the tree
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_the_wheel_holds_the_package_whole_and_nothing_else(built):
    wheel, source = built
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "trl_rlsd").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    with tarfile.open(source) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert expected | {"README.md", "LICENSE", "pyproject.toml"} <= inside


def test_the_installed_package_works_without_its_extras(built, tmp_path):
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    script = f"""
import sys
sys.modules |= dict.fromkeys({EXTRAS})  # None: importing one is an ImportError
import trl_rlsd, trl_rlsd.cli, trl_rlsd.train, trl_rlsd.inspection, trl_rlsd.doctor, trl_rlsd.hub
from trl_rlsd import RLSDConfig, RLSDTrainer
from trl_rlsd.report.page import CreditPictures
assert trl_rlsd.__file__.startswith({str(tmp_path)!r}), trl_rlsd.__file__
print(CreditPictures([]).html()[:15])
trl_rlsd.cli.main(["--help"])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": "site", "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("<!DOCTYPE html>")
    assert "In the order in which you are likely to want them" in done.stdout


def test_importing_the_package_imports_nothing_heavy():
    """`tests/benchmarks/import_time.py` says how long it takes."""
    script = (
        "import sys; old = set(sys.modules); import trl_rlsd; print(*{m.split('.')[0] for m in {*sys.modules} - old})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= set(sys.stdlib_module_names) | {"trl_rlsd"}


def test_versions_that_are_tested_are_versions_that_are_allowed():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )  # fmt: skip
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        if name != "trl-rlsd":
            assert requirement.specifier.contains(pins[name]), requirement
