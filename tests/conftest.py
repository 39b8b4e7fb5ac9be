"""What several processes of tests share; in each of them, what tests ask for is in shared_fixtures.py."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from warm_python import warm_python

ROOT = Path(__file__).parents[1]
SHARED_BIN = "SCALEOT_TEST_WARM_BIN"  # the folder of `warm_bin`, where several processes run the tests


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures where tests run; start `warm_bin` once where tests are handed out to several processes."""
    hands_out = config.getoption("numprocesses", None) and not config.option.collectonly
    if hands_out and not hasattr(config, "workerinput"):
        started = ExitStack()
        os.environ[SHARED_BIN] = str(started.enter_context(warm_programs()))
        config.add_cleanup(started.close)
    else:
        config.pluginmanager.import_plugin("shared_fixtures")


@contextmanager
def warm_programs() -> Iterator[Path]:
    """Start what answers the programs of `warm_bin`."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with TemporaryDirectory() as home:
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": home}
        with warm_python({"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **offline}) as folder:
            yield folder


@pytest.fixture(scope="session")
def warm_bin() -> Iterator[Path]:
    """A folder of programs, `python` and `dvc`, that need not import what stages and DVC import."""
    if shared := os.environ.get(SHARED_BIN):
        yield Path(shared)
    else:
        with warm_programs() as folder:
            yield folder
