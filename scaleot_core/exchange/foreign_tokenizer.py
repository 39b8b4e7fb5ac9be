"""Try a package's tokenizer and its chat template where they can do no harm, before anything depends on them."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from scaleot_core.common.errors import UserError
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.sandbox import GIB, Begin, run_bounded
from scaleot_core.exchange.suspicions import SENTENCES
from scaleot_core.exchange.untrusted import read_untrusted_json
from scaleot_core.models.loading import check_tokenizer
from scaleot_core.records.probes import rendered_parts

TOKENIZER_SECONDS = 120.0  # to load and try one: the largest take some seconds
TEMPLATE_SECONDS = 10.0  # to render three short conversations
MEMORY = 2 * GIB  # for either; the largest tokenizers take some hundred MB


class TriedTokenizer(NamedTuple):
    """What a package's tokenizer was found to do."""

    has_template: bool
    sentences: list[list[int]]
    """The tokens of `SENTENCES`."""


def try_tokenizer(package: Package) -> TriedTokenizer:
    """Load a package's tokenizer and try it, in a child process.

    UserError where that takes too long or too much memory, and for a tokenizer that `check_tokenizer` refuses.
    """
    config, file = package.config, f"{package.folder}/tokenizer.json"

    def attempt(begin: Begin) -> Iterator[Any]:
        tokenizer = package.tokenizer()
        try:
            check_tokenizer(tokenizer, config)
        except UserError as error:
            raise error.within(file) from None
        yield tokenizer.chat_template is not None, [tokenizer(text)["input_ids"] for text in SENTENCES]

    ((has_template, sentences),) = run_bounded(attempt, what=file, seconds=TOKENIZER_SECONDS, memory=MEMORY)
    check_tokens(package, sentences)
    return TriedTokenizer(has_template, sentences)


def check_tokens(package: Package, texts: Iterable[list[int]]) -> None:
    """Raise UserError where texts have tokens that a package's model has no embedding of."""
    vocabulary = package.config.vocab_size
    if any(not 0 <= token < vocabulary for tokens in texts for token in tokens):
        raise UserError(
            f"{package.folder}/tokenizer.json: it makes tokens that the model's embedding of {vocabulary:,} doesn't "
            "have; don't use it, ask whoever made it"
        )


def template_parts(package: Package) -> dict[str, bool]:
    """Say which parts of a conversation a package's chat template renders, as `rendered_parts`, in a child process.

    UserError where that takes too long or too much memory.
    """

    def attempt(begin: Begin) -> Iterator[dict[str, bool]]:
        tokenizer = package.tokenizer()
        begin("")
        yield rendered_parts(tokenizer)

    (parts,) = run_bounded(attempt, what=template_file(package) or "", seconds=TEMPLATE_SECONDS, memory=MEMORY)
    return parts


def template_file(package: Package) -> str | None:
    """Return the path of the file that has a package's chat template, None where there is none."""
    if "chat_template.jinja" in package.manifest.files:
        return f"{package.folder}/chat_template.jinja"
    settings = package.folder / "tokenizer_config.json"
    return str(settings) if "chat_template" in read_untrusted_json(settings) else None
