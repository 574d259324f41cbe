"""What a release must agree on: its version everywhere, what it installs, what it holds, and its first page."""

import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SdistBuilder = pytest.importorskip("hatchling.builders.sdist").SdistBuilder
WheelBuilder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder
PROJECT = WheelBuilder(str(ROOT)).metadata


def files(folder, pattern):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern)}


PACKAGE = files("rsd_loss", "*.py") | {"rsd_loss/py.typed"}


def test_one_version():
    """Unreleased changes may stand above the newest version; a tag wants that version first, with its date."""
    version, tag = PROJECT.version, os.environ.get("RELEASE_TAG")
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    headings = re.findall(r"^## \[?([^]\s]+)\]?(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next((name for name, _ in headings if name != "Unreleased"), None) == version
    if tag:
        assert tag == f"v{version}"
        assert headings[0][0] == version
        assert re.fullmatch(r" - \d{4}-\d\d-\d\d", headings[0][1])


def test_the_wheel_holds_the_package_alone_and_needs_torch_and_einops(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if ".dist-info/" not in name} == PACKAGE
        metadata = file.read(f"rsd_loss-{PROJECT.version}.dist-info/METADATA").decode()
    assert re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.MULTILINE) == ["einops", "torch"]


def test_the_sdist_holds_what_its_tests_read(tmp_path):
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    tests = files("tests", "*.py") | files("tests/data", "*") | files("benchmarks/speed", "*.py")
    tests |= {"benchmarks/__init__.py", "benchmarks/records.py"}
    metadata = {".gitignore", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert names == PACKAGE | tests | metadata


def test_the_package_index_can_show_the_readme():
    """It resolves no relative link or picture, and typesets no mathematics."""
    link, reference, html = r"\]\((?!https://)[^)]*\)", r"^\[[^]]+\]: (?!https://).*", r"(?:src|href)=.(?!https://).*"
    mathematics = r"\$\$|\$[^$\n]+\$"
    readme = (ROOT / "README.md").read_text()
    assert re.findall("|".join((link, reference, html, mathematics)), readme, re.MULTILINE) == []
