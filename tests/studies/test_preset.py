"""Presets: their values are allowed, and putting one into params.yaml changes nothing else there."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from scaleot_core.common.errors import UserError
from scaleot_core.params import Params, changed, load_params
from studies import preset

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with params.yaml and presets.yaml committed."""
    for name in ("presets.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    git = ("git", "-c", "user.name=tester", "-c", "user.email=tester@example.com")
    for command in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "project")):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def flat(values: dict[str, object]) -> dict[str, object]:
    return {name: span.value for name, span in preset.spans(yaml.safe_dump(values)).items()}


@pytest.mark.parametrize("name", ["recommended", "recommended-secret", "opt-6.7b", "nine-tasks"])
def test_preset_changes_its_values_and_no_other_byte(project: Path, name: str) -> None:
    before, changes = flat(yaml.safe_load(TEXT)), preset.load_preset(name, [])
    preset.apply(name)
    text = Path("params.yaml").read_text(encoding="utf-8")
    assert flat(yaml.safe_load(text)) == before | changes
    assert load_params() == changed(load_params(ROOT / "params.yaml"), changes)

    def comments(text: str) -> list[tuple[int, str]]:
        lines = [line for line in text.splitlines() if "#" in line]
        return [(line.index("#") if name == "recommended" else 0, line[line.index("#") :]) for line in lines]

    assert comments(text) == comments(TEXT)  # each in its column, where no value is too long for it
    preset.apply("default")
    assert Path("params.yaml").read_text(encoding="utf-8") == TEXT


def test_another_preset_takes_the_place_of_the_first_and_own_values_stay(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = TEXT.replace("seed: 0 ", "seed: 7 ")
    Path("params.yaml").write_text(own, encoding="utf-8")
    preset.apply("recommended")
    assert "params.yaml: adapters is ['lora'], was ['layers', 'lora']" in capsys.readouterr().err
    preset.apply("nine-tasks")
    assert load_params().adapters == ["layers", "lora"] and len(load_params().tasks) == 9 and load_params().seed == 7
    preset.apply("default")
    assert Path("params.yaml").read_text(encoding="utf-8") == own


def test_every_preset_changes_parameters_to_allowed_values(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recommended, secret = (changed(params, preset.load_preset(f"recommended{end}", [])) for end in ("", "-secret"))
    assert recommended.adapter_layers == 0 and recommended.adapters == ["lora"]
    cut = secret.channels.model_copy(update={"ratio": recommended.channels.ratio})
    assert secret.model_copy(update={"channels": cut}) == recommended != secret
    for name, rank in (("gpt2-xl", 64), ("opt-1.3b", 64), ("opt-6.7b", 256), ("llama-7b", 256)):
        row = changed(params, preset.load_preset(name, []))
        assert len(row.tasks) == 9 and row.data.questions == "hub" and row.harmonizer.rank == rank
        assert row.data.block_size == 512 and row.adapter_layers == 4 and len(row.offsite_tune.lr) == 5


def test_setting_stands_above_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    changes = preset.load_preset("opt-1.3b", ["alpha=0.5", "tasks=[piqa]"])
    assert changes["alpha"] == 0.5 and changes["tasks"] == ["piqa"] and changes["harmonizer.rank"] == 64


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("opt-13b", [], "no preset is named 'opt-13b'; there are gpt2-xl, opt-1.3b"),
        (".paper", [], "no preset is named"),
        ("opt-1.3b", ["alpha"], "'alpha': a setting is KEY=VALUE"),
        ("opt-1.3b", ["alpha=2"], "alpha = 2: .* the range is 0 to 1"),
        ("opt-1.3b", ["dlr.alpha=2"], "dlr.alpha is no parameter"),
    ],
)
def test_mistake_in_a_preset_is_told_before_the_run(
    name: str, settings: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        preset.load_preset(name, settings)
