"""What is installed is what is here: a package that pyproject.toml forgets would be missing in the container alone."""

from __future__ import annotations

import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for top in ("models", "calibration", "service") for path in (ROOT / top).rglob("*.py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


def test_no_other_distribution_owns_the_names() -> None:
    owners = packages_distributions()
    assert all(set(owners.get(name, ["badexpert"])) == {"badexpert"} for name in ("models", "calibration", "service"))
