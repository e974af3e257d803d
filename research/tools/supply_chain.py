"""What hicode stands on: a lock file for the tests, an SBOM, and the licences of all packages and pretrained parts.

    python -m research.tools.supply_chain lock -o requirements-test.txt
    python -m research.tools.supply_chain sbom -o hicode.cdx.json
    python -m research.tools.supply_chain licences -o docs/licences.md

All three read the installed environment: the packages that hicode and its extras need there, and theirs. `lock` asks
pip, as configured, for the hashes of exactly these versions (for this platform and Python). `sbom` is CycloneDX 1.6.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hicode import __version__
from hicode.assets import ASSETS
from hicode.files import atomic_path, write_json

TEST_EXTRAS, SHIPPED_EXTRAS = ("dev", "serve"), ("train", "serve", "hear", "hubert")


def canonical(name: str) -> str:
    """A package's name in one form of writing."""
    return str(canonicalize_name(name))


def closure(extras: tuple[str, ...]) -> list[metadata.Distribution]:
    """The installed packages that hicode with these extras needs, and those that they need, by name."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [("hicode", extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name == "hicode":
            texts = own_requirements(extra)
        else:
            try:
                found[name] = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                print(f"{name} is not installed: left out", file=sys.stderr)
                continue
            texts = found[name].requires or []
        for requirement in map(Requirement, texts):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonical(requirement.name), e) for e in ("", *requirement.extras)]
    return [found[name] for name in sorted(found)]


def own_requirements(extra: str = "") -> list[str]:
    """Of this clone, or of one of its extras."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"][extra] if extra else project["dependencies"]


def version_of(distribution: metadata.Distribution) -> str:
    """The public version: a local build ("+cpu") has the same sources."""
    return distribution.version.partition("+")[0]


def licence_of(distribution: metadata.Distribution) -> str:
    """As the package states it: its SPDX expression, its classifiers, or the first line of its licence field."""
    fields = distribution.metadata
    if "License-Expression" in fields:
        return fields["License-Expression"]
    classifiers = [c.split("::")[-1].strip() for c in fields.get_all("Classifier") or () if c.startswith("License ::")]
    classifiers = [c for c in classifiers if c != "OSI Approved"]
    if classifiers:
        return ", ".join(classifiers)
    lines = fields["License"].strip().splitlines() if "License" in fields else []
    return lines[0][:60] if lines else "not stated"


# ---- lock ----


def lock(out: Path) -> None:
    """Exact versions, with the hash of the file that pip, as configured, would install for each."""
    pins = {canonical(d.metadata["Name"]): d.version for d in closure(TEST_EXTRAS)}
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder) / "wanted.txt", Path(folder) / "report.json"
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
        subprocess.run([*pip, "--report", str(report), "-r", str(wanted)], check=True)
        installs = json.loads(report.read_text())["install"]
    archives = {canonical(i["metadata"]["name"]): i["download_info"]["archive_info"] for i in installs}
    text = (
        f"# Tests on {platform.system()} {platform.machine()}, Python {platform.python_version()}, with\n"
        "# an index of torch's CPU builds configured in pip:\n"
        "#   pip install --no-deps --require-hashes -r requirements-test.txt && pip install --no-deps -e .\n"
        "# Made by: python -m research.tools.supply_chain lock -o requirements-test.txt\n"
    )
    for name, version in pins.items():
        text += f"{name}=={version} --hash=sha256:{archives[name]['hashes']['sha256']}\n"
    with atomic_path(out) as temporary:
        temporary.write_text(text)


# ---- software bill of materials ----


def sbom(out: Path) -> None:
    """CycloneDX JSON: hicode, its packages with their dependencies, the pretrained parts with their hashes."""
    packages = closure(SHIPPED_EXTRAS)
    reference = {canonical(d.metadata["Name"]): _purl(d) for d in packages}
    components = [
        {
            "type": "library",
            "bom-ref": _purl(d),
            "name": d.metadata["Name"],
            "version": version_of(d),
            "purl": _purl(d),
            "licenses": [{"license": {"name": licence_of(d)}}],
        }
        for d in packages
    ]
    components += [
        {
            "type": "machine-learning-model" if "demo" not in name else "data",
            "bom-ref": f"asset:{name}",
            "name": name,
            "version": asset.package.version,
            "description": asset.what,
            "purl": f"pkg:{asset.package.registry}/{asset.package.name}@{asset.package.version}",
            "hashes": [{"alg": "SHA-256", "content": asset.package.sha256}],
            "licenses": [{"license": {"name": asset.package.licence}}],
        }
        for name, asset in ASSETS.items()
    ]
    needs = [{"ref": _purl(d), "dependsOn": _direct(d.requires or [], reference)} for d in packages]
    hicode = {"type": "application", "bom-ref": "hicode", "name": "hicode", "version": __version__}
    hicode["licenses"] = [{"license": {"id": "Apache-2.0"}}]  # pyright: ignore[reportArgumentType]
    needs.append({"ref": "hicode", "dependsOn": _direct(own_requirements(), reference)})
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {"timestamp": datetime.now(UTC).isoformat(timespec="seconds"), "component": hicode},
        "components": components,
        "dependencies": needs,
    }
    write_json(out, bom)


def _purl(distribution: metadata.Distribution) -> str:
    return f"pkg:pypi/{canonical(distribution.metadata['Name'])}@{version_of(distribution)}"


def _direct(requirements: list[str], reference: dict[str, str]) -> list[str]:
    names = {canonical(Requirement(text).name) for text in requirements}
    return sorted(reference[name] for name in names & reference.keys())


# ---- licences ----


def licences(out: Path) -> None:
    """A page with a table of packages and one of pretrained parts."""
    lines = [
        "# Licences",
        "",
        "Made by `python -m research.tools.supply_chain licences -o docs/licences.md`, from what each package states.",
        "hicode itself is Apache-2.0. Nothing here is copied into it: packages are installed, parts are fetched.",
        "",
        "| package | licence |",
        "|---|---|",
    ]
    shipped = closure(SHIPPED_EXTRAS)
    lines += [f"| {d.metadata['Name']} | {_cell(licence_of(d))} |" for d in shipped]
    names = {d.metadata["Name"] for d in shipped}
    tests = [d for d in closure(TEST_EXTRAS) if d.metadata["Name"] not in names]
    lines += ["", "For tests and research only:", "", "| package | licence |", "|---|---|"]
    lines += [f"| {d.metadata['Name']} | {_cell(licence_of(d))} |" for d in tests]
    lines += ["", "| pretrained part, sample | package | source | licence |", "|---|---|---|---|"]
    for name, asset in ASSETS.items():
        package = asset.package
        where = f"{package.registry} {package.name} {package.version}"
        lines.append(f"| {name} | {where} | {_cell(package.source)} | {_cell(package.licence)} |")
    with atomic_path(out) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/")


def main() -> None:
    """Write one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lock", "sbom", "licences"])
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    {"lock": lock, "sbom": sbom, "licences": licences}[options.what](options.out)


if __name__ == "__main__":
    main()
