"""What a person gets from `pip install`: wheel and source archive, in an environment that has nothing else."""
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def uv(*args, **kw) -> str:
    "uv from PATH, from the environment, or pip's place of it."
    tool = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None: pytest.fail("uv is needed to build an empty environment; `make setup` installs it")
    return run([tool, *map(str, args)], **kw)


def run(command, **kw) -> str:
    out = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **kw)
    assert out.returncode == 0, f"{command}: {out.stdout[-2000:]}{out.stderr[-2000:]}"
    return out.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "Wheel and sdist, made from a copy of what git would hand over."
    source, out = tmp_path_factory.mktemp("package") / "source", tmp_path_factory.mktemp("dist")
    keep = ("craft_nb", "pyproject.toml", "settings.ini", "README.md", "LICENSE")
    source.mkdir()
    for name in keep:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    uv("build", "-q", "--out-dir", out, source)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def alone(archives, tmp_path_factory):
    "An environment with the wheel and what it depends on, without extras."
    place = tmp_path_factory.mktemp("alone")
    uv("venv", "-q", "--python", sys.executable, place / "venv")
    uv("pip", "install", "-q", "--python", place / "venv/bin/python", archives[0])
    return place


def clean_environment() -> dict:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_archives_hold_the_package_and_nothing_else(archives):
    wheel, sdist = archives
    modules = {f"craft_nb/{p.name}" for p in (ROOT / "craft_nb").glob("*.py")}
    with zipfile.ZipFile(wheel) as z: inside = {n for n in z.namelist() if ".dist-info/" not in n}
    assert inside == modules
    with tarfile.open(sdist) as t: assert modules <= {n.partition("/")[2] for n in t.getnames()}


def test_import_without_extras(alone):
    found = run([alone / "venv/bin/python", "-c",
                 "import craft_nb, sys; print(craft_nb.__version__, 'lerobot' in sys.modules)"],
                cwd=alone, env=clean_environment())
    assert re.fullmatch(r"\d+\.\d+\.\d+ False\n", found)


def test_the_readmes_example_runs_without_extras(alone):
    text = (ROOT / "README.md").read_text()
    text = text[text.index("## In a few lines") : text.index("## Results")]
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    said = run([alone / "venv/bin/python", "-c", code], cwd=alone, env=clean_environment())
    error = {line.split()[0]: float(line.split()[2]) for line in said.splitlines()}
    assert error["craft"] < error["plain"] / 100, said


def test_commands_without_extras_say_what_to_install(alone):
    assert "usage: craft-demo" in run([alone / "venv/bin/craft-demo", "--help"], cwd=alone, env=clean_environment())
    out = subprocess.run([alone / "venv/bin/craft-train", "--craft.enabled=false", "--policy.path=x",
                          "--dataset.repo_id=y"], cwd=alone,
                         env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert out.returncode == 1 and "craft_nb[lerobot]" in out.stderr and "Traceback" not in out.stderr, out.stderr
