"""How a command ends: one line and an exit code for what a user can mend, a traceback for a bug."""

import ast
import errno

import pytest
from helpers import ROOT

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError


def ending(capsys, error) -> tuple[int, str]:
    """Exit code of a stage that raises, and what it printed on stderr; nothing goes to stdout."""

    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        run_command(main)
    out, err = capsys.readouterr()
    assert out == ""
    return left.value.code, err


def test_user_error_is_one_line_as_it_was_written(capsys):
    said = "params.yaml: [bold]tasks[/bold] = ['piqa']: " + "far longer than a terminal is wide " * 10 + "; mend it"
    assert ending(capsys, UserError(said)) == (1, f"error: {said}\n")


def test_parameter_is_named_as_the_one_who_reads_knows_it(capsys):
    error = UserError("none is left to train on; lower it", parameter="data.eval_questions", value=9)
    assert str(error) == "data.eval_questions = 9: none is left to train on; lower it"
    assert ending(capsys, error)[1] == f"error: params.yaml: {error}\n"
    within = error.within("task piqa")
    assert within.line(lambda key: "--data") == "--data = 9: task piqa: none is left to train on; lower it"
    assert str(UserError("unset", parameter="alpha", value=None)) == "alpha = None: unset"
    assert str(UserError("'x' is none", parameter="tasks")) == "tasks: 'x' is none"


def test_library_never_says_where_a_parameter_is_set():
    """The data owner has no params.yaml: a stage and the command line each name a parameter in their own terms."""
    files = [file for file in (ROOT / "scaleot_core").rglob("*.py") if file.name not in ("entrypoint.py", "errors.py")]
    texts = [node.value for file in files for node in ast.walk(ast.parse(file.read_text())) if string(node)]
    assert texts and not [text for text in texts if "params.yaml:" in text]


def string(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_interruption_exits_with_130(capsys):
    code, said = ending(capsys, KeyboardInterrupt())
    assert code == 130 and said.startswith("interrupted; ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "artifacts/model"), "artifacts/model: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "metrics.json"), "metrics.json: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "a file: No space left"),
        (OSError("something else"), "something else"),
    ],
)
def test_trouble_with_a_file_is_one_line(capsys, error, said):
    code, printed = ending(capsys, error)
    assert code == 1 and printed.startswith("error: ") and said in printed and printed.count("\n") == 1


def test_trouble_that_another_library_tells_at_length_is_one_line(capsys):
    code, printed = ending(capsys, OSError("the hub can't be reached\nand here is a page about it\nand another"))
    assert code == 1 and "the hub can't be reached" in printed and printed.count("\n") == 1


def test_bug_keeps_its_traceback():
    def main():
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_command(main)


def test_stage_that_ends_well_says_nothing(capsys):
    done = []
    run_command(lambda: done.append(1))
    assert done == [1] and capsys.readouterr() == ("", "")
