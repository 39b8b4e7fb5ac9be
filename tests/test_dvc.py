"""dvc.yaml says the truth: a stage's dependencies are all of the code that can change what it computes."""

import ast
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

VALUES = ("params", "settings")  # whose values DVC watches
# What can't change a figure: how errors, progress and results are shown, how files are written and read, where freed
# memory goes, and how a stage finds its parameters.
NEUTRAL = {
    *(
        f"scaleot_core/common/{name}.py"
        for name in ("allocator", "entrypoint", "errors", "files", "progress", "tensors", "validation")
    ),
    *(f"scaleot_core/{name}.py" for name in ("__init__", "artifacts", "pipeline", "preflight", *VALUES)),
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
    files: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        files |= {path for name in names if name.startswith("scaleot_core") and (path := module_file(name))}
    if file.name == "tasks.py":
        files |= {file.parent / "lm_tasks"}  # which it hands to lm-eval
    return files


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
    stages = []
    for name in ("dvc.yaml", "studies/dvc.yaml"):
        entries = yaml.safe_load((ROOT / name).read_text())["stages"]
        stages += [(name, stage) for stage, entry in entries.items() if not entry.get("always_changed")]
    return stages


def covered(name: str, by: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}/") for other in by)


def declared(file: str, stage: str) -> tuple[Path, list[str]]:
    """A stage's script and its dependencies."""
    entry = yaml.safe_load((ROOT / file).read_text())["stages"][stage]
    script = next(word for word in entry["cmd"].split() if word.endswith(".py") or word.startswith("studies."))
    return ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py"), entry["deps"]


@pytest.mark.parametrize(("file", "stage"), stages())
def test_all_code_that_can_change_a_figure_is_among_the_deps(file: str, stage: str) -> None:
    script, deps = declared(file, stage)
    missing = {name for name in closure(script) if not covered(name, NEUTRAL | {*deps})}
    assert not missing, f"{stage} can run {sorted(missing)}, which its deps don't list"


@pytest.mark.parametrize(("file", "stage"), stages())
def test_every_listed_file_is_there_and_can_be_run(file: str, stage: str) -> None:
    script, deps = declared(file, stage)
    run = closure(script)
    for dep in deps:
        if dep.startswith(("artifacts", "costs")):
            continue
        assert (ROOT / dep).exists(), dep
        assert dep == "embedded.lock" or any(covered(name, {dep}) for name in run), f"{stage} never runs {dep}"


@pytest.mark.parametrize("module", VALUES)
def test_neutral_classes_define_values_and_validators_alone(module: str) -> None:
    """Whatever computes lies in a module that is a dependency; a property may put values together."""
    for kind in ast.walk(ast.parse((ROOT / f"scaleot_core/{module}.py").read_text())):
        for method in kind.body if isinstance(kind, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef):
                decorators = {ast.unparse(decorator).partition("(")[0] for decorator in method.decorator_list}
                assert decorators & {"field_validator", "model_validator", "property"}, f"{kind.name}.{method.name}"
