"""dvc.yaml says the truth: a stage's dependencies are all of the code that can change what it computes."""

import ast
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

# What can't change a figure: how errors, progress and results are shown, how files are written and read, how a stage
# finds its parameters, whose values DVC watches.
NEUTRAL = {
    *(
        f"scaleot_core/common/{name}.py"
        for name in ("entrypoint", "errors", "files", "progress", "tensors", "validation")
    ),
    *(
        f"scaleot_core/{name}.py"
        for name in ("__init__", "artifacts", "memory", "params", "pipeline", "preflight", "settings")
    ),
    "scaleot_core/training/cost.py",
    "scaleot_core/data/rows.py",
}
RUNTIME = "scaleot_core/common/runtime.py"  # seeds and kernels, of every stage


def module_file(name: str) -> Path | None:
    """The file of one of the project's modules, by its dotted name."""
    path = ROOT / name.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


def imported(file: Path) -> set[Path]:
    """The project's own files that a file imports, anywhere in it, or may find beside it as data."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {path for name in names if name.startswith("scaleot_core") and (path := module_file(name))}
    if file.name == "tasks.py":
        found |= {file.parent / "lm_tasks"}  # which it hands to lm-eval
    return found


def closure(script: Path) -> set[str]:
    """All of the project's files that a script can come to run, from the root, packages' empty ones aside."""
    seen, todo = set[Path](), [script, ROOT / RUNTIME]
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        if file.is_file() and file.relative_to(ROOT).as_posix() not in NEUTRAL:
            todo += imported(file)
    names = {file.relative_to(ROOT).as_posix() for file in seen}
    return {name for name in names if not (name.endswith("__init__.py") and is_bare(ROOT / name))}


def is_bare(file: Path) -> bool:
    """Whether a module has nothing but its docstring."""
    return all(isinstance(node, ast.Expr) for node in ast.parse(file.read_text()).body)


def stages() -> list[tuple[str, str]]:
    """Every stage but those that always run, whose dependencies decide nothing."""
    found = []
    for name in ("dvc.yaml", "studies/dvc.yaml"):
        entries = yaml.safe_load((ROOT / name).read_text())["stages"]
        found += [(name, stage) for stage, entry in entries.items() if not entry.get("always_changed")]
    return found


def covered(name: str, by: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}/") for other in by)


@pytest.mark.parametrize(("file", "stage"), stages())
def test_all_code_that_can_change_a_figure_is_among_the_deps(file: str, stage: str) -> None:
    entry = yaml.safe_load((ROOT / file).read_text())["stages"][stage]
    words = entry["cmd"].split()
    script = next(word for word in words if word.endswith(".py") or word.startswith("studies."))
    path = ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")
    deps = {str(dep) for dep in entry["deps"]}
    missing = {name for name in closure(path) if not covered(name, NEUTRAL | deps)}
    assert not missing, f"{stage} can run {sorted(missing)}, which its deps don't list"


@pytest.mark.parametrize(("file", "stage"), stages())
def test_every_listed_file_is_there_and_can_be_run(file: str, stage: str) -> None:
    entry = yaml.safe_load((ROOT / file).read_text())["stages"][stage]
    code = [dep for dep in entry["deps"] if not dep.startswith(("artifacts", "costs"))]
    words = entry["cmd"].split()
    script = next(word for word in words if word.endswith(".py") or word.startswith("studies."))
    path = ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")
    run = closure(path)
    for dep in code:
        assert (ROOT / dep).exists(), dep
        assert dep == "embedded.lock" or any(covered(name, {dep}) for name in run), f"{stage} never runs {dep}"
