"""The shape of the package: imports go down the layers, and importing it is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "hicode"

# From the bottom up; a module imports from its own layer or those below. A name with a dot is one module of a folder,
# one without the whole folder.
# fmt: off
LAYERS = [
    ["errors", "audio", "geometry", "motion", "camera", "gaussians", "config", "files", "assets", "runtime", "progress",
     "threads", "provenance", "sweep"],
    ["media"],
    ["trust"],
    ["render"],
    ["tracking"],
    ["speech"],
    ["preparation"],
    ["avatar"],
    ["perceptual"],
    ["training"],
    ["session"],
    ["evaluation"],
    ["serve", "integrations"],
    ["arguments", "demo", "learn", "doctor", "commands", "cli", "__main__"],
]
# fmt: on
# The landmark network's training loss and the like may look one layer up lazily; each exception says why.
EXCEPTIONS: dict[tuple[str, str], str] = {}
MODULES = sorted(SOURCE.rglob("*.py"))


def layer(module: str) -> int:
    """`module` without the leading package name."""
    for i, names in enumerate(LAYERS):
        if module.split(".")[0] in names:
            return i
    raise AssertionError(f"{module} has no place in the layout: add it to LAYERS")


def imported(file: Path) -> set[str]:
    """Every hicode module that a file imports, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file.name}: imports are absolute"
            found |= {f"hicode.{a.name}" for a in node.names} if node.module == "hicode" else {node.module}
    return {name.removeprefix("hicode.") for name in found if name.startswith("hicode.")} - {"__version__"}


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_go_down_the_layout(file):
    name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    if name == "__init__":
        return  # it names modules, and imports none of them until asked
    for other in imported(file):
        if (name.split(".")[0], other.split(".")[0]) in EXCEPTIONS:
            continue
        assert layer(other) <= layer(name), f"{name} imports {other}, which lies above it"


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


HEAVY = {
    "torch", "numba", "onnxruntime", "av", "cv2", "scipy", "transformers", "gsplat", "tensorboard", "rich", "ray",
    "matplotlib",
}  # fmt: skip


def test_importing_hicode_loads_no_heavy_backend():
    assert not loaded_by("import hicode") & HEAVY


def test_the_command_line_starts_without_a_heavy_backend():
    quietly = "import io, contextlib, hicode.cli\nwith contextlib.redirect_stdout(io.StringIO()):"
    code = f"{quietly}\n    assert hicode.cli.main(['--help']) == 0"
    assert not loaded_by(code) & (HEAVY - {"rich"})


def test_the_core_types_load_torch_and_nothing_heavier():
    assert not loaded_by("import hicode.motion, hicode.camera, hicode.gaussians, hicode.files") & (HEAVY - {"torch"})


def test_the_cuda_rasteriser_and_hubert_are_imported_only_when_chosen():
    assert not loaded_by("import hicode.render, hicode.speech.encoders") & {"gsplat", "transformers"}


def test_every_public_name_exists():
    import hicode

    for name in hicode.__all__:
        module = SOURCE / Path(*hicode._HOME.get(name, "hicode").split(".")[1:])
        if module.with_suffix(".py").exists() or (module / "__init__.py").exists() or name == "__version__":
            assert getattr(hicode, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = hicode.nonsense


def test_the_module_is_the_command():
    said = subprocess.run([sys.executable, "-m", "hicode", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("hicode ")
