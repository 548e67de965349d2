"""The hosted workflows run what a person runs: `.ci/run`, which is README's `make test`, and `make docs`."""
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def workflow(name: str) -> dict: return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
def runs(job: dict) -> list[str]: return [s["run"] for s in job["steps"] if "run" in s]


def targets() -> set[str]: return set(re.findall(r"(?m)^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text()))


def test_the_test_workflow_is_ci():
    job = workflow("test.yaml")["jobs"]["test"]
    assert runs(job) == [".ci/run"] and (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert re.search(r"(?m)^exec make --no-print-directory test\b", (ROOT / ".ci" / "run").read_text())
    assert {"test", "demo"} <= targets() and "make test" in (ROOT / "README.md").read_text()


def test_its_pythons_are_those_that_setup_takes():
    pythons = workflow("test.yaml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    low, high = re.search(r"\((\d, \d+)\) <= sys\.version_info\[:2\] <= \((\d, \d+)\)",
                          (ROOT / "tools" / "setup.sh").read_text()).groups()
    assert [pythons[0], pythons[-1]] == [v.replace(", ", ".") for v in (low, high)]


def test_the_docs_workflow_builds_the_site_that_make_docs_builds():
    job = workflow("docs.yaml")["jobs"]["docs"]
    assert runs(job) == ["make docs"] and "docs" in targets()
    assert next(s["with"]["path"] for s in job["steps"] if "upload-pages" in s.get("uses", "")) == "_docs"
