"""What an interrupted tuning goes on from is its owner's alone, and one run's at a time."""

from datetime import datetime

import pytest
from helpers import refusal

from scaleot_core.cli.progress import held, private_files, progress_folder


def test_progress_can_be_read_by_its_owner_alone(tmp_path):
    with held(tmp_path / "out") as (folder, _), private_files():
        (folder / "key").mkdir()
        (folder / "key" / "state").write_text("a")
    paths = [folder, folder / "started.json", folder / "key", folder / "key" / "state"]
    assert folder == progress_folder(tmp_path / "out")
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o700, 0o600, 0o700, 0o600]


def test_folder_that_was_open_to_others_is_closed(tmp_path):
    (tmp_path / ".out.progress" / "key").mkdir(parents=True)
    (tmp_path / ".out.progress").chmod(0o777)
    with held(tmp_path / "out") as (folder, _):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_progress_that_is_no_folder_is_refused_and_left_alone(tmp_path, kind):
    target, elsewhere = tmp_path / ".out.progress", tmp_path / "elsewhere"
    if kind == "file":
        target.write_text("a")
    else:
        target.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
    error = refusal(lambda: held(tmp_path / "out").__enter__())
    assert ".out.progress: progress is kept in a folder of your own" in error
    assert not elsewhere.exists() or not any(elsewhere.iterdir())


def test_second_run_into_one_output_is_told(tmp_path):
    with held(tmp_path / "out") as (folder, _):
        assert "another run is writing it" in refusal(lambda: held(tmp_path / "out").__enter__())
        with held(tmp_path / "other"):
            pass
        assert folder.is_dir()
    with held(tmp_path / "out"):
        pass


def test_date_is_that_of_the_day_a_tuning_began(tmp_path):
    with held(tmp_path / "out") as (folder, began):
        (folder / "key").mkdir()
    assert abs(datetime.now() - began).total_seconds() < 60
    with held(tmp_path / "out") as (_, again):
        assert again == began
    (folder / "key").rmdir()  # a run that was killed before it had anything to go on from
    (folder / "started.json").write_text('{"began": "2020-01-01T00:00:00"}')
    with held(tmp_path / "out") as (_, anew):
        assert anew > again


def test_nothing_stays_where_there_is_nothing_to_go_on_from(tmp_path):
    with pytest.raises(KeyboardInterrupt), held(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())
