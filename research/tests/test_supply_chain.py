"""Lock file, bill of materials and licence page say all that hicode stands on."""

import json
from pathlib import Path

from packaging.requirements import Requirement
from research.tools import supply_chain
from research.tools.supply_chain import TEST_EXTRAS, canonical, own_requirements

from hicode.assets import ASSETS

REPOSITORY = Path(__file__).parents[2]


def names(requirements: list[str]) -> set[str]:
    return {canonical(Requirement(text).name) for text in requirements}


def test_the_lock_file_pins_what_the_project_asks_for_with_hashes_and_names_no_host():
    text = (REPOSITORY / "requirements-test.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    pinned = {}
    for line in lines:
        requirement, _, checksum = line.partition(" --hash=sha256:")
        assert len(checksum) == 64, line
        pinned[canonical(Requirement(requirement).name)] = next(iter(Requirement(requirement).specifier)).version
    needed = names(own_requirements()).union(*(names(own_requirements(e)) for e in TEST_EXTRAS)) - {"hicode"}
    assert needed <= pinned.keys(), needed - pinned.keys()
    for requirement in map(Requirement, own_requirements()):
        assert requirement.specifier.contains(pinned[canonical(requirement.name)]), requirement
    assert "://" not in text and "file:" not in text


def test_the_bill_of_materials_is_whole(tmp_path):
    supply_chain.sbom(tmp_path / "bom.json")
    bom = json.loads((tmp_path / "bom.json").read_text())
    parts = {part["name"]: part for part in bom["components"]}
    assert bom["bomFormat"] == "CycloneDX" and names(own_requirements()) <= set(map(canonical, parts))
    for name, asset in ASSETS.items():
        assert parts[name]["hashes"] == [{"alg": "SHA-256", "content": asset.package.sha256}]
    references = {part["bom-ref"] for part in bom["components"]} | {"hicode"}
    assert all({need["ref"], *need["dependsOn"]} <= references for need in bom["dependencies"])


def test_the_licence_page_names_every_part():
    page = (REPOSITORY / "docs" / "licences.md").read_text()
    assert all(f"| {name} |" in page for name in ASSETS)
    listed = {canonical(line.split("|")[1].strip()) for line in page.splitlines() if line.startswith("| ")}
    assert names(own_requirements()) <= listed
