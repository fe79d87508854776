"""Recipes that come with the package: listed, run by name, copied; and the package's name beside another's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gkd.cli import main
from gkd.common import distribution
from gkd.common.distribution import NAME, check_alone
from gkd.recipe.capture import capture
from gkd.recipe.shipped import built_in, recipe_file

ROOT = Path(__file__).resolve().parents[2]


def test_every_recipe_has_a_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    shown = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in names}
    assert set(shown) == names
    assert all(len(line.split()) > 5 for line in shown.values()), "what each does"


def test_a_recipe_is_found_by_name_where_no_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_file("gkd_glass") == ROOT / "recipes" / "gkd_glass.py"
    assert capture("gkd_glass", ["--lmbda", "0.25"]).settings.training.lmbda == 0.25
    (tmp_path / "gkd_glass").write_text("")
    assert recipe_file("gkd_glass") == Path("gkd_glass"), "a file of one's own comes first"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["run", "gkd_glas"], "did you mean gkd_glass?"),
        (["run", "zzz/nowhere.py"], "one of those that `gkd recipes` lists"),
        (["recipes", "copy"], "needs a name"),
        (["recipes", "copy", "nothing"], "there is no recipe 'nothing'"),
        (["recipes", "copy", "gkd_qwen2", "--launch_file", "zero9"], "there are ddp, two_machines, zero1"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys, flags, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert text in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_copy_is_never_written_over_something(tmp_path, capsys):
    flags = ["recipes", "copy", "gkd_qwen2", "--launch_file", "zero2", "--to", str(tmp_path)]
    assert main(flags) == 0
    copied = tmp_path / "recipes" / "gkd_qwen2.py"
    assert copied.read_text() == (ROOT / "recipes" / "gkd_qwen2.py").read_text()
    assert (tmp_path / "deepspeed_configs" / "zero2.yaml").is_file()
    copied.write_text("mine")
    with pytest.raises(SystemExit):
        main(flags)
    assert "is there already" in capsys.readouterr().err
    assert copied.read_text() == "mine"


def other_package(folder: Path, files: str) -> None:
    made = folder / "gkd-0.1.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: gkd\nVersion: 0.1\n")
    (made / "RECORD").write_text(files)


def test_the_other_package_of_this_name_is_told(tmp_path, monkeypatch, capsys):
    check_alone()
    other_package(tmp_path, "gkd/__init__.py,,\ngkd-0.1.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["recipes"])
    assert ended.value.code == 2
    assert "another program under the same import name: pip uninstall gkd" in capsys.readouterr().err


def test_a_link_to_a_clone_under_the_old_name_is_no_conflict(tmp_path, monkeypatch):
    other_package(tmp_path, "__editable__.gkd-0.1.0.pth,,\ngkd-0.1.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_alone()


def test_what_the_old_name_has_left_in_a_clone_is_no_conflict(tmp_path, monkeypatch):
    other_package(tmp_path, "gkd/__init__.py,,\ngkd-0.1.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(distribution, "_CLONE", tmp_path.resolve())
    with pytest.raises(ValueError, match="another program"):
        check_alone()
    (tmp_path / "pyproject.toml").write_text("")
    check_alone()


def test_a_wheel_brings_recipes_and_launch_files(tmp_path):
    source = tmp_path / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("gkd", "recipes", "deepspeed_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(NAME.replace("-", "_"))
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)

    def gkd(*flags: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        run = [sys.executable, "-c", "import sys; from gkd.cli import main; sys.exit(main())", *flags]
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert gkd("--version").split() == ["gkd", "0.1.0"]
    assert all(name in gkd("recipes") for name in built_in())
    wrote = gkd("recipes", "copy", "kd_minimind", "--launch_file", "ddp")
    assert "recipes/kd_minimind.py" in wrote
    assert (tmp_path / "deepspeed_configs" / "ddp.yaml").is_file()


def test_what_is_to_be_installed_is_ours():
    pages = [path for pattern in ("*.md", "*.py", "*.toml") for path in ROOT.rglob(pattern)]
    own = [p for p in pages if not {".venv", ".cache", ".venv-vllm", "build"} & set(p.relative_to(ROOT).parts)]
    lines = [line for page in own for line in page.read_text(encoding="utf-8").splitlines() if "pip install" in line]
    assert len(lines) > 10
    for line in lines:
        asked = re.split(r"[`#]| in ", line.split("pip install", 1)[1])[0]
        assert not re.search(r"(?<![\w-])gkd(?![\w-])", asked), line
