"""The documentation site is laid out whole, its links lead somewhere; the container runs what the README says.

`make docs` builds it (strict: its generator looks at links and anchors again); no container is built here.
"""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAY_OUT = runpy.run_path(str(ROOT / "docs" / "site" / "lay_out.py"))


def targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    LAY_OUT["lay_out"](folder)
    return folder


def flat(navigation):
    for entry in navigation:
        yield from (name for names in entry.values() for name in names) if isinstance(entry, dict) else [entry]


def test_every_page_has_its_place_once(laid_out):
    named = list(flat(yaml.safe_load((laid_out / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = {str(path.relative_to(laid_out / "pages")) for path in (laid_out / "pages").rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == there
    in_docs = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    assert in_docs <= there


def test_every_link_leads_to_a_page_or_a_file(laid_out):
    for page in (laid_out / "pages").rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)", text):
            assert (page.parent / link).exists(), f"{page.relative_to(laid_out)}: {link}"


def test_every_package_has_a_page():
    inside = [path for path in (ROOT / "gkd").iterdir() if not path.name.startswith("_")]
    rooms = {f"gkd.{path.stem}" for path in inside if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(LAY_OUT["packages"]()) == rooms


def test_the_generator_is_no_part_of_the_installation():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = [
        *project["dependencies"],
        *(name for names in project["optional-dependencies"].values() for name in names),
    ]
    wanted = re.findall(r"^\w[\w-]+", (ROOT / "docs/site/requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(wanted) >= 3
    assert not set(wanted) & {re.match(r"[\w-]+", name)[0] for name in installed}
    assert "docs" in targets()


def test_the_container_runs_the_readmes_commands():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    made = re.findall(r"^RUN make ([\w-]+)$", text, flags=re.MULTILINE)
    assert made == ["install", "fetch"]
    command = re.search(r'^CMD \["make", "([\w-]+)"\]$', text, flags=re.MULTILINE)[1]
    assert {*made, command} <= targets()
    assert f"    make {command} " in (ROOT / "README.md").read_text(encoding="utf-8")
    python = re.search(r"^FROM python:(3\.\d+)-slim$", text, flags=re.MULTILINE)[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv*", ".cache"} <= set(ignored)  # nothing of this machine gets in
