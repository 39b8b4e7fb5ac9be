"""Try a package's tokenizer and its chat template where they can do no harm, before anything depends on them."""

from collections.abc import Iterator

from scaleot_core.common.errors import UserError
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.sandbox import GIB, Begin, run_bounded
from scaleot_core.models.loading import check_tokenizer
from scaleot_core.records.probes import rendered_parts

TOKENIZER_SECONDS = 120.0  # to load and try one: the largest take some seconds
TEMPLATE_SECONDS = 20.0  # to render three short conversations
MEMORY = 2 * GIB  # for either; the largest tokenizers take some hundred MB


def has_template(package: Package) -> bool:
    """Return whether a package has a chat template, after its tokenizer was loaded and tried in a child process.

    UserError where that takes too long or too much memory, and for a tokenizer that `check_tokenizer` refuses.
    """
    config = package.config

    def attempt(begin: Begin) -> Iterator[bool]:
        tokenizer = package.tokenizer()
        try:
            check_tokenizer(tokenizer, config)
        except UserError as error:
            raise error.within(f"{package.folder}/tokenizer.json") from None
        yield tokenizer.chat_template is not None

    (answer,) = run_bounded(attempt, what=f"{package.folder}/tokenizer.json", seconds=TOKENIZER_SECONDS, memory=MEMORY)
    return answer


def template_parts(package: Package) -> dict[str, bool]:
    """Say which parts of a conversation a package's chat template renders, as `rendered_parts`, in a child process.

    UserError where that takes too long or too much memory.
    """

    def attempt(begin: Begin) -> Iterator[dict[str, bool]]:
        tokenizer = package.tokenizer()
        begin("")
        yield rendered_parts(tokenizer)

    (parts,) = run_bounded(attempt, what=template_file(package), seconds=TEMPLATE_SECONDS, memory=MEMORY)
    return parts


def template_file(package: Package) -> str:
    """Return the path of the file that has a package's chat template, if there is one."""
    names = ("chat_template.jinja", "tokenizer_config.json")
    return f"{package.folder}/{next(name for name in names if name in package.manifest.files)}"
