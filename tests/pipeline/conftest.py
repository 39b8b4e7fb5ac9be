"""Whole stages and pipelines: slow, and each with its process as it was before."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scaleot_core import preflight
from scaleot_core.common.runtime import Runtime


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a stage sets in its process is set back; scratch lies in the stage's own folder."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


_rates: dict[tuple[Runtime, torch.dtype], float] = {}


@pytest.fixture(scope="module", autouse=True)
def rate() -> Iterator[None]:
    """How fast this machine multiplies, which prepare_data tells, is measured once a process, not for every project."""
    measure = preflight._rate

    def measured(runtime: Runtime, dtype: torch.dtype) -> float:
        if (runtime, dtype) not in _rates:
            _rates[runtime, dtype] = measure(runtime, dtype)
        return _rates[runtime, dtype]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_rate", measured)
        yield
