"""The sdist builds the wheel, and the wheel works by itself: in an environment without the checkout, from elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--preset", "quickstart", "--epochs", "1", "--set", "data.train_images=200", "--quiet")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    pytest.importorskip("build", reason="build is not installed")
    folder = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_wheel_has_all_files_of_the_package_and_nothing_else(built: Path) -> None:
    files = [path for path in (ROOT / "irgdistill").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    expected |= {f"irgdistill/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "presets").iterdir()}
    assert {"irgdistill/presets/quickstart.yaml", "irgdistill/commands/inspect/assets/page.js"} <= expected
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_sdist_has_the_tests_and_the_documents(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile", "mkdocs.yml"} <= names
    assert {"tests/conftest.py", "docs/index.md", "benchmarks/gpu.py", "presets/quickstart.yaml"} <= names


@pytest.mark.slow
def test_the_wheel_trains_distils_and_evaluates_from_elsewhere(built: Path, tmp_path: Path) -> None:
    """Its environment takes the libraries of this one by a path, which does not bring in the editable checkout."""
    bare = tmp_path / "bare"
    venv.create(bare, symlinks=True)
    package = Path(sysconfig.get_path("purelib", "venv", {"base": str(bare), "platbase": str(bare)}))
    wheel = str(next(built.glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "--python", str(bare), "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    libraries = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (package / "libraries.pth").write_text("\n".join(libraries))
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}

    def call(*words: str) -> str:
        command = [str(bare / "bin" / words[0]), *words[1:]]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    file = Path(call("python", "-c", "import irgdistill; print(irgdistill.__file__)").strip())
    assert file.is_relative_to(package)
    call("irgdistill", "train", "--model", "cifar_resnet20", *TINY, "--output", "teacher")
    teacher = ("--teacher-checkpoint", "teacher", "--student", "cifar_resnet14_x0_5", "--skip-teacher-check")
    call("irgdistill", "distill", *teacher, *TINY, "--output", "student")
    student = json.loads(call("irgdistill", "eval", "student", "--json"))
    assert (student["data"], student["images"]) == ("digits", 898)
