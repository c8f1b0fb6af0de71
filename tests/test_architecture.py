"""The boundaries between modules, read from their imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "twa_merge"
HEAVY = {"transformers", "accelerate", "datasets", "evaluate", "matplotlib"}


def imports(module, *, at_run_time=True):
    """Return top-level packages and `twa_merge` modules that a module imports, wherever in the file."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    if at_run_time:  # imports for annotations alone bind nothing
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            found.add(parts[1] if parts[0] == "twa_merge" and len(parts) > 1 else parts[0])
    return found


def reachable(module):
    """Return every module of the package that importing `module` brings in."""
    own = {p.stem for p in PACKAGE.glob("*.py")}
    seen, todo = set(), [module]
    while todo:
        for name in imports(todo.pop()) & own - seen:
            seen.add(name)
            todo.append(name)
    return seen


def test_the_writer_knows_nothing_of_learning():
    assert not reachable("writer") & {"basis", "model", "training", "recipe", "runner", "job", "tasks"}
    assert "accelerate" not in imports("writer")


CORE = [
    "basis",
    "blocks",
    "buffers",
    "dropout",
    "groups",
    "kernels",
    "links",
    "mixing",
    "model",
    "originals",
    "quantize",
]


@pytest.mark.parametrize("module", [*CORE, "originals", "quantize", "sharding", "storage", "tensorfile"])
def test_the_core_needs_torch_alone(module):
    assert not imports(module) & HEAVY


def test_only_the_front_ends_import_the_runner():
    users = {p.stem for p in PACKAGE.glob("*.py") if "runner" in imports(p.stem)}
    assert users <= {"commands", "demo"}


def test_matplotlib_is_drawn_with_in_one_place():
    assert {p.stem for p in PACKAGE.glob("*.py") if "matplotlib" in imports(p.stem)} == {"plots"}


def test_no_module_imports_itself_in_a_circle():
    for path in PACKAGE.glob("*.py"):
        assert path.stem not in reachable(path.stem) or path.stem == "__init__", path.stem


def test_importing_the_package_loads_no_torch():
    script = "import twa_merge, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_export_exists():
    import twa_merge

    for name in twa_merge.__all__:
        assert getattr(twa_merge, name) is not None
