"""The data owner's command: `tune`."""

import secrets
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scaleot_core.cli.options import AsJson, SignOption, setting
from scaleot_core.cli.output import private_file, show
from scaleot_core.cli.progress import held, private_files
from scaleot_core.cli.reading import read_examples
from scaleot_core.common.errors import UserError
from scaleot_core.common.progress import say
from scaleot_core.common.validation import validate_block
from scaleot_core.params import Params
from scaleot_core.settings import Lora, LoraForm, Machine, OffsiteTuning, Quantization

if TYPE_CHECKING:
    from scaleot_core.tuning.examples import Examples
    from scaleot_core.tuning.selection import TuningResult

PROGRESS_SECONDS = 60.0  # between two checkpoints
# What `tune` does unless told otherwise: the noise of --epsilon grows with the number of weights, so it tunes few of
# them, in few large steps at a high rate.
DEFAULTS: dict[str, Any] = {"rank": 16, "alpha": 32.0, "modules": "all", "epochs": 10, "patience": 1}
DEFAULTS |= {"batch_size": 8, "max_grad_norm": 1.0}
PRIVATE: dict[str, Any] = {"rank": 1, "alpha": 2.0, "modules": "attention", "epochs": 3, "patience": 0, "lr": 0.01}
PRIVATE |= {"max_grad_norm": 0.5}
PRIVATE_STEPS = 8  # an epoch, with --epsilon
DEFAULT_LR = {"lora": Lora().lr[0], "layers": OffsiteTuning().lr[0]}  # by --adapters


def tune(
    package: Annotated[Path, typer.Argument(help="The package that came from the model owner: a folder or .zip.")],
    out: Annotated[Path, typer.Option(help="The adapter to write: a folder, or one file if the name ends in .zip.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your records: JSON Lines, a JSON list, Parquet or CSV, all with `prompt` and `completion`, or "
            "`messages`, or `text`. With --task: the task's questions, in the fields of its hub data set."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="A task of lm-eval; without --data its training questions come from the hub.")
    ] = None,
    adapters: Annotated[
        Literal["layers", "lora"],
        typer.Option(help="What to tune: LoRA in every layer that the package has, or the adapter layers whole."),
    ] = "lora",
    lora_rank: Annotated[int | None, setting(LoraForm, "rank", "Without this option 16, or 1 with --epsilon.")] = None,
    lora_alpha: Annotated[
        float | None, setting(LoraForm, "alpha", "Without this option 32, or 2 with --epsilon.")
    ] = None,
    lora_modules: Annotated[
        Literal["all", "attention"] | None,
        setting(LoraForm, "modules", "Without this option all, or attention with --epsilon."),
    ] = None,
    epochs: Annotated[
        int | None, setting(OffsiteTuning, "epochs", "Without this option 10, or 3 with --epsilon.")
    ] = None,
    patience: Annotated[
        int | None, setting(OffsiteTuning, "patience", "Without this option 1, or 0 with --epsilon.")
    ] = None,
    validation: Annotated[float, setting(OffsiteTuning, "validation_fraction")] = 0.1,
    lr: Annotated[
        list[float] | None,
        setting(
            OffsiteTuning,
            "lr",
            f"Without this option {DEFAULT_LR['lora']:g} for LoRA ({PRIVATE['lr']:g} with --epsilon) and "
            f"{DEFAULT_LR['layers']:g} for layers.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        setting(OffsiteTuning, "batch_size", "Without this option 8, or an eighth of the records with --epsilon."),
    ] = None,
    max_grad_norm: Annotated[
        float | None,
        setting(OffsiteTuning, "max_grad_norm", "Without this option 1, or 0.5 of each record with --epsilon."),
    ] = None,
    block_size: Annotated[int, typer.Option(min=8, help="Tokens in a block of `text`.")] = 512,
    epsilon: Annotated[float, setting(OffsiteTuning, "epsilon", "With it each record is one example.")] = 0.0,
    delta: Annotated[float, setting(OffsiteTuning, "delta")] = 1e-5,
    seed: Annotated[int, setting(Params, "seed", "Exceptions are the draws that protect privacy.")] = 0,
    quantize: Annotated[Quantization | None, setting(Machine, "quantize", "Without it the package's dtype.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], setting(Params, "device")] = "auto",
    threads: Annotated[int, setting(Params, "threads")] = 0,
    sign: SignOption = None,
    as_json: AsJson = False,
) -> None:
    """Data owner: tune adapters in the package on your own records. What it writes is all that goes back.

    The same command goes on where it was stopped. Beside the adapter comes OUT.private.json, with the losses, which
    stays with you.
    """
    from scaleot_core.common.files import fingerprint, write_json
    from scaleot_core.common.runtime import setup
    from scaleot_core.compression.quantization import check_kernels
    from scaleot_core.exchange import adapter_folder
    from scaleot_core.exchange.archive import check_new, new_output, unpacked
    from scaleot_core.exchange.foreign_tokenizer import try_tokenizer
    from scaleot_core.exchange.package import Package
    from scaleot_core.exchange.signature import load_signer
    from scaleot_core.exchange.suspicions import suspicions
    from scaleot_core.memory import check_tuning
    from scaleot_core.training.checkpoint import Checkpoint
    from scaleot_core.tuning.adapters import trainable
    from scaleot_core.tuning.selection import TooFewRecords
    from scaleot_core.tuning.selection import tune as tune_parameters
    from scaleot_core.tuning.unmoved import unmoved_shares

    if data is None and task is None:
        raise UserError("nothing to tune on: name a file with --data, or a task of lm-eval with --task")
    defaults = {**DEFAULTS, "lr": DEFAULT_LR[adapters]}
    if epsilon:
        defaults |= {key: value for key, value in PRIVATE.items() if key != "lr" or adapters == "lora"}

    def chosen(**options: Any) -> dict[str, Any]:
        return {key: value if value not in (None, []) else defaults[key] for key, value in options.items()}

    steps = chosen(epochs=epochs, batch_size=batch_size, max_grad_norm=max_grad_norm, lr=lr, patience=patience)
    rules = {"validation_fraction": validation, "epsilon": epsilon, "delta": delta}
    settings = validate_block(OffsiteTuning, steps | rules)
    form = chosen(rank=lora_rank, alpha=lora_alpha, modules=lora_modules)
    lora = validate_block(LoraForm, form) if adapters == "lora" else None
    machine = validate_block(Machine, {"device": device, "threads": threads, "quantize": quantize})
    signer = load_signer(sign) if sign else None
    check_new(out, private_file(out))
    with held(out) as (progress, began):
        with unpacked(package) as folder, new_output(out, private_file(out)) as target:
            shipped = Package(folder)
            runtime = setup(machine.model_copy(update={"dtype": shipped.manifest.dtype}), "tune")
            if quantize:
                check_kernels(quantize, runtime.device)
            check_tuning(shipped, runtime, whole_layers=lora is None, quantize=quantize)
            tried = try_tokenizer(shipped)
            examples = read_examples(shipped, task, data, block_size=block_size, packed=not epsilon, now=began)
            model = shipped.load(runtime.device, quantize)
            if epsilon and batch_size is None:
                settings = settings.model_copy(update={"batch_size": max(1, round(len(examples) / PRIVATE_STEPS))})
            key = fingerprint(
                settings.model_dump(), lora and lora.model_dump(), quantize, seed, shipped.sha256, examples
            )
            checkpoint = Checkpoint(progress / key, PROGRESS_SECONDS)
            if any(path.is_dir() for path in progress.iterdir()) and not checkpoint.folder.exists():
                say("other options, package or records than before: starting anew", style="yellow")
            for line in suspicions(model, shipped.plan, tried.sentences, secrets.randbits(63)):
                say(
                    f"{package}: {line}; it may be a trap for records: tune with --epsilon, or ask its owner",
                    style="yellow",
                )
            parameters = trainable(model, shipped.plan, lora, seed)
            start = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
            start_seed = seed  # LoRA's draw, which is no secret
            seed = secrets.randbits(256) if epsilon else seed  # whoever could guess it could take the noise off
            try:
                with private_files():
                    result = tune_parameters(
                        model, parameters, examples, settings, seed=seed, label="tune", checkpoint=checkpoint
                    )
            except TooFewRecords:
                raise _too_few(f"{data or task}", examples, settings) from None
            except KeyboardInterrupt:
                say("interrupted; the same command goes on from here", style="yellow")
                raise
            adapter_folder.save(target, shipped, parameters, lora=lora, tuning=settings, tuned=result)
            if signer:
                signer(target)
        unmoved = max(unmoved_shares(start, parameters).values(), default=0.0)
        losses = {"validation_loss": result.validation_loss, "history": result.history}
        not_tuned_on = len(set(examples.origins)) - result.tuned_on
        tuning = {"seed": start_seed, "not_tuned_on": not_tuned_on, "began": began.isoformat()}
        write_json(private_file(out), losses | tuning, private=True)
        rmtree(progress, ignore_errors=True)  # with what was begun with other options
    show(
        {
            "adapter": str(out),
            **_count_examples(examples, result),
            "learning rate": result.lr,
            "steps": result.steps,
            "held-out loss": result.validation_loss,
            "epsilon": result.epsilon,
            "largest share that never moved": unmoved,
            "private": str(private_file(out)),
        },
        as_json,
        {"adapter": "send back", "private": "keep"},
    )
    if unmoved:
        say(
            "what never moved tells what the records don't have; run `scaleot audit` before you send it", style="yellow"
        )
    say("the losses are those of the tuned package, not of the real model: what it will gain, its owner alone can tell")


def _too_few(source: str, examples: "Examples", settings: OffsiteTuning) -> UserError:
    """Say, in terms of the options, that no record is left to tune on beside those that are held out."""
    count, size = len(set(examples.origins)), examples.block_size
    unit = f"block{'s' * (count > 1)} of {size} tokens" if size else f"record{'s' * (count > 1)}"
    remedies = ["lower --validation"] * (count > 1) + ["lower --block-size"] * bool(size)
    one_rate = " and one --lr alone" * (len(settings.lr) > 1)
    remedies += [f"add --patience 0{one_rate}, and all epochs run on all of it"]
    return UserError(
        f"{source}: {count:,} {unit} can't be parted into some to tune on and some to hold out; "
        f"{', or '.join(remedies)}, or give more"
    )


def _count_examples(examples: "Examples", result: "TuningResult") -> dict[str, Any]:
    """Count the records, the examples made of them, those held out, and what of the records isn't learnt."""
    tally, unit = examples.tally, "blocks" if examples.block_size else "records"
    return {
        "records": tally.records,
        "examples": len(examples),
        f"{unit} tuned on": result.tuned_on,
        f"{unit} held out": result.held_out,
        "records cut": tally.cut,
        "tokens cut": tally.tokens_cut,
        "answers left out": tally.answers_left_out.total(),
        "answers switched off": tally.switched_off,
        "answers reworded": tally.reworded,
        "fields ignored": dict(sorted(tally.ignored.items())),
    }
