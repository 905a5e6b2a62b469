#!/usr/bin/env python3
"""image-notices.py FILE: write the licences of all packages in this environment, as their own metadata has them.

First come the packages without a licence file, each with the licence that it declares.
"""

import re
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

LICENCE_FILE = re.compile(r"(^|/)(licen[cs]e|copying|notice|copyright|eula|third[-_]?party)[^/]*$", re.IGNORECASE)


def declared(package: Distribution) -> str:
    """Return the licence that a package declares, in one line."""
    metadata = package.metadata
    classifiers = [each for each in metadata.get_all("Classifier", []) if each.startswith("License ::")]
    named = metadata.get("License-Expression") or metadata.get("License") or "; ".join(classifiers)
    return (named or "not declared").strip().split("\n")[0]


def texts(package: Distribution) -> list[str]:
    """Return the licence files that a package installs, each after its path."""
    found = [file for file in package.files or () if LICENCE_FILE.search(str(file)) and not str(file).endswith(".py")]
    paths = [(file, Path(str(file.locate()))) for file in found]
    return [f"--- {file}\n{path.read_text(errors='replace')}" for file, path in paths if path.is_file()]


def main(out: str) -> None:
    """Write the file."""
    packages = {package.name: package for package in distributions()}
    heads = {name: f"{name} {packages[name].version}: {declared(packages[name])}" for name in packages}
    licences = {name: texts(packages[name]) for name in sorted(packages, key=str.lower)}
    without = "".join(f"  {heads[name]}\n" for name, files in licences.items() if not files)
    parts = [f"Packages that bring no licence file:\n{without}"]
    parts += ["\n".join([heads[name], *files]) for name, files in licences.items() if files]
    Path(out).write_text(f"\n{'=' * 120}\n".join(parts))


if __name__ == "__main__":
    main(sys.argv[1])
