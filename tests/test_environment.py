"""environment.yml says what pyproject.toml says: the same packages, ranges and Python."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
#: conda-forge's names where they differ from PyPI's.
CONDA_TO_PYPI = {"pytorch": "torch"}


def pyproject_requirements():
    """Names and ranges of the dependencies and of the extras ``lab`` and ``test``, with Python's own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    found: dict[str, set[SpecifierSet]] = {"python": {SpecifierSet(project["requires-python"])}}
    for requirement in map(Requirement, [*project["dependencies"], *extras["lab"], *extras["test"]]):
        assert requirement.marker is None, f"{requirement}: environment.yml cannot express a marker"
        found.setdefault(requirement.name, set()).add(requirement.specifier)
    return found


def conda_dependencies():
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]


def conda_requirements():
    found: dict[str, set[SpecifierSet]] = {}
    for line in conda_dependencies():
        if isinstance(line, str):
            name, _, versions = line.partition(" ")
            name = CONDA_TO_PYPI.get(name, name)
            assert name not in found, f"{name} is listed twice"
            found[name] = {SpecifierSet(versions.strip())}
    return found


def test_an_extra_repeats_no_package_with_another_range():
    assert {name: ranges for name, ranges in pyproject_requirements().items() if len(ranges) > 1} == {}


def test_same_packages_and_ranges():
    conda = conda_requirements()
    assert conda.pop("pip") == {SpecifierSet("")}
    assert conda == pyproject_requirements()


def test_the_package_itself_is_installed_in_place():
    assert [line for line in conda_dependencies() if not isinstance(line, str)] == [{"pip": ["-e ."]}]
