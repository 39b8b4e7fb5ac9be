"""All attacks on one package and its adapters, and their results as attack.json has them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from scaleot_core.artifacts import Artifacts
from scaleot_core.attacks import exposure, hidden, membership, restoration
from scaleot_core.attacks.capabilities import Yardstick
from scaleot_core.attacks.targets import Target, targets
from scaleot_core.common import distributed
from scaleot_core.common.files import cached_json
from scaleot_core.common.runtime import Runtime
from scaleot_core.exchange import adapter_folder
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.returned import fitted, kept_channels
from scaleot_core.methods import ModelOwner
from scaleot_core.models.families import decoder_layers
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_tokenizer
from scaleot_core.params import Params
from scaleot_core.training.blocks import prepare
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.tuning import examples
from scaleot_core.tuning.adapters import TunedAdapter, plug_in, plugged_in


@dataclass(frozen=True)
class Outcome:
    """The results of all attacks."""

    curves: list[dict[str, Any]]
    """Of restoration, a row for each target and measurement."""
    weights: list[dict[str, Any]]
    """What the package has of each tensor."""
    summary: dict[str, Any]
    """All results in the end, as attack.json has them."""


class Attacks:
    """The attacks on what a project's artifacts have. Each finished one is kept in the checkpoint's folder.

    What the untouched model has is kept in the folder `untouched`, for other packages that are measured beside it with
    the same questions and text. While an attacker trains, no model is in memory but what is trained and, of `queries`,
    the one that is asked.
    """

    def __init__(
        self, artifacts: Artifacts, params: Params, runtime: Runtime, checkpoint: Checkpoint, untouched: Path
    ) -> None:
        self.artifacts, self.params, self.runtime = artifacts, params, runtime
        self.checkpoint, self.untouched = checkpoint, untouched
        self.blocks, self.heldout = artifacts.blocks("train"), artifacts.blocks("heldout")
        prepare(self.blocks, runtime.device)  # all is measured with the kernels that attacks train with
        self.package = Package(artifacts.emulator, links=True)
        self.owner = ModelOwner(
            artifacts.model, runtime, self.blocks, params, artifacts.harmonizers, checkpoint.folder, checkpoint
        )
        tokenizer = load_tokenizer(artifacts.model)

        def encoded(task: str, part: str) -> examples.Examples:
            rows = artifacts.questions(task, part)
            return examples.from_task(self.owner.outline, tokenizer, task, rows, block_size=params.data.block_size)

        self.members, self.others = ({task: encoded(task, part) for task in params.tasks} for part in ("train", "eval"))
        asked = slice(params.attack.eval_questions)
        questions = {task: artifacts.questions(task, "eval")[asked] for task in params.tasks}
        answers = {task: data[asked] for task, data in self.others.items()}
        self.yardstick = Yardstick(tokenizer, questions, answers, params.evaluate.batch_size)

    def run(self) -> Outcome:
        """Run all attacks."""
        package, params = self.package, self.params
        load = partial(package.load, self.runtime.device)
        before: dict[str, dict[str, Any]] = {
            "model": cached_json(self.untouched / "model.json", partial(self._measured, self.owner.load, "the model")),
            "package": self._cached("before-package", partial(self._measured, load, "the package")),
        }
        attacked = {
            name: self._cached(name, partial(self._attacked, name, target))
            for name, target in targets(package, self.owner, self._served).items()
        }
        model_loss = math.log(before["model"]["perplexity"])
        curves = restoration.curves({name: result.pop("curve") for name, result in attacked.items()}, model_loss)
        ends = {row["target"]: {**row, **attacked[row["target"]]} for row in curves}  # the last row stays
        self._add_shares(before, ends)
        model, shipped = self.owner.load(), load()
        weights = exposure.exposure(model, shipped, package.plan)
        members = {task: self._membership(model, task) for task in params.tasks}
        pruned = any(layer.channels for layer in package.plan)
        channels = kept_channels(self.artifacts.emulator_private, package.sha256) if pruned else {}
        difficulty = hidden.recovery_difficulty(  # last, since it changes the model
            model, shipped, package.plan, channels, self.heldout, params.seed
        )
        summary = {
            "package": package.sha256,
            "before": before,
            "restoration": ends,
            "recovery_difficulty": difficulty,
            "weights": exposure.shares(weights),
            "membership": members,
        }
        return Outcome(curves, weights, summary)

    def _cached(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        figures: dict[str, Any] = cached_json(self.checkpoint.folder / f"{name}.json", run)
        return figures

    def _returned(self, task: str, kind: str) -> TunedAdapter:
        """Read what came back for a task, at the real model's shapes."""
        tuned = adapter_folder.read(self.artifacts.adapter(task, kind) / "adapter", self.package, links=True)
        return fitted(tuned, self.package, self.owner.outline, self.artifacts.emulator_private)

    def _served(self) -> PreTrainedModel:
        """Load the plug-in of the first task and kind of adapters, as it would be served."""
        plugged = self.owner.load()
        plug_in(plugged, self.package.plan, self._returned(self.params.tasks[0], self.params.adapters[0]))
        return plugged

    def _measured(self, load: Callable[[], PreTrainedModel], label: str) -> dict[str, Any]:
        model = load()
        return {"perplexity": math.exp(mean_loss(model, self.heldout)), **self.yardstick.measure(model, label)}

    def _attacked(self, name: str, target: Target) -> dict[str, Any]:
        victim, label = target.load(), f"attack {name}"
        distributed.shard_layers(decoder_layers(victim))
        curve = restoration.restore(
            victim,
            self.blocks,
            self.heldout,
            self.params.attack,
            seed=self.params.seed,
            label=label,
            checkpoint=self.checkpoint.within(name),
            parameters=target.parameters(victim),
            loss=target.loss(victim),
        )
        return {"curve": curve, **distributed.broadcast_from_main(partial(self.yardstick.measure, victim, label))}

    def _add_shares(self, before: Mapping[str, dict[str, Any]], ends: Mapping[str, dict[str, Any]]) -> None:
        """Put into every row the share above its floor: of what nobody trained, that of a uniform guess."""
        floors = [(before, self.yardstick.uniform_guess(self.owner.config.vocab_size))]
        if "without_weights" in ends:  # with the same training
            floors.append((ends, ends["without_weights"]))
        for rows, floor in floors:
            for row in rows.values():
                row["above_floor"] = self.yardstick.above_floor(row, before["model"], floor)

    def _membership(self, model: PreTrainedModel, task: str) -> dict[str, dict[str, Any]]:
        """Run membership inference with each kind of a task's adapters in the real model, which stays as it is."""
        most = self.params.attack.membership_records
        parts = [data[task][:most] for data in (self.members, self.others)]

        def asked(who: str) -> list[list[membership.Answer]]:
            size, label = self.params.evaluate.batch_size, f"membership {task}: {who}"
            return [membership.answers(model, part, size, label) for part in parts]

        cache = self.untouched / f"{task}.json"
        records = cached_json(cache, lambda: [[asdict(answer) for answer in part] for part in asked("the model")])
        base = [[membership.Answer(**record) for record in part] for part in records]
        attacks: dict[str, Any] = {}
        for kind in self.params.adapters:
            with plugged_in(model, self.package.plan, self._returned(task, kind)):
                attacks[kind] = membership.attack(base, asked(f"plug_in, {kind}"))
        return attacks
