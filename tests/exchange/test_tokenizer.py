"""A package's tokenizer is the model's own, or it is refused before hours of work."""

from pathlib import Path

import pytest
from helpers import refusal
from tokenizer_kinds import KINDS, STABLE, TOOLS
from tokenizers import AddedToken
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from scaleot_core.exchange import tokenizer as shipping
from scaleot_core.exchange.tokenizer import check_shippable, load_untrusted_tokenizer, save_tokenizer
from scaleot_core.models.tokenizers import tokenizer_difference

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def test_several_chat_templates_are_shipped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    several = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    several.chat_template = {"default": TEMPLATE, "tool_use": "tools " + TEMPLATE}
    check_shippable(several)
    save_tokenizer(tmp_path, several)
    assert not [file for file in tmp_path.iterdir() if file.is_dir()]
    assert load_untrusted_tokenizer(tmp_path).chat_template == several.chat_template
    chat = [{"role": "user", "content": "hello"}]
    assert load_untrusted_tokenizer(tmp_path).apply_chat_template(chat, tokenize=False) == "user: hello\n"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_is_kept(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True), AddedToken("Word", single_word=True, normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    for template in (None, STABLE["llama 3"], {"default": STABLE["chatml"], "tool_use": TOOLS}):
        tokenizer.chat_template = template
        folder = tmp_path / str(type(template).__name__)
        folder.mkdir()
        save_tokenizer(folder, tokenizer)
        assert tokenizer_difference(tokenizer, load_untrusted_tokenizer(folder)) == ""


def test_side_of_padding_that_a_class_has_is_no_reason_to_refuse(tokenizer: PreTrainedTokenizerFast) -> None:
    class Left(PreTrainedTokenizerFast):
        """Pads on the left, as transformers' LlamaTokenizer does, and doesn't write that down."""

        padding_side = "left"

    check_shippable(Left(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>"))


def test_tokenizer_that_a_package_cannot_keep_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Shouting(PreTrainedTokenizerFast):
        """Does in Python what its file doesn't say."""

        def __call__(self, text, *args, **options):
            return super().__call__(text.upper(), *args, **options)

    shouting = Shouting(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    assert "more than its tokenizer.json says" in refusal(lambda: check_shippable(shouting))


def test_tokenizer_without_a_file_or_with_one_that_is_too_large_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(lambda: check_shippable(ByT5Tokenizer()))
    assert said.startswith("model: its tokenizer") and "ByT5Tokenizer writes none; use another" in said
    monkeypatch.setattr(shipping, "LARGEST_TOKENIZER", 1000)
    assert "tokenizer.json has more than 1,000 bytes" in refusal(lambda: check_shippable(tokenizer))
