"""Tokenizers of the kinds that the families have, each trained on a few words, and chat templates of several kinds."""

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = [
    "the capital of capital the cap user assistant system hello hi bye see you \n\n be kind [INST] [/INST] answer word",
    "one two three 1+1? two the answer is hello there 42 been nice",
] * 30


def _train(
    raw: Tokenizer, alphabet: list[str], words: list[str], bos: str = "<s>", special: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*SPECIAL, *special], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token="</s>", pad_token="</s>")


def _byte_level(*, prefix_space: bool = False, around: str = "$A", trim: bool = False, bos: str = "<s>") -> Tokenizer:
    """GPT-2's kind, as of OPT, GPT-NeoX, Qwen and LLaMA 3; `around` is what the post-processor makes of a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    raw.decoder = decoders.ByteLevel()
    made = _train(raw, pre_tokenizers.ByteLevel.alphabet(), WORDS, bos)
    names = [(name, raw.token_to_id(name)) for name in ("<s>", "</s>")]
    steps = [processors.ByteLevel(trim_offsets=trim), processors.TemplateProcessing(around, "$A $B", names)]
    made.backend_tokenizer.post_processor = processors.Sequence(steps)
    return made


def _sentencepiece(*, legacy: bool) -> PreTrainedTokenizerFast:
    """LLaMA 2's and Mistral's kind: spaces are letters, one is put in front, bytes stand for what is unknown."""
    raw = Tokenizer(models.BPE(byte_fallback=True))
    if legacy:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    trainer_words = [word for text in WORDS for word in text.split()]
    alphabet = ["▁", *(chr(i) for i in range(33, 127))]
    made = _train(raw, alphabet, trainer_words, special=tuple(f"<0x{i:02X}>" for i in range(256)))
    names = [("<s>", raw.token_to_id("<s>"))]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", names)
    return made


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bare": _byte_level,
    "bos": lambda: _byte_level(around="<s> $A", trim=True),
    "bos and eos": lambda: _byte_level(around="<s> $A </s>"),
    "bos is eos": lambda: _byte_level(around="</s> $A", bos="</s>"),
    "prefix space": lambda: _byte_level(prefix_space=True),
    "trimmed": lambda: _byte_level(trim=True),
    "metaspace": lambda: _sentencepiece(legacy=False),
    "metaspace, legacy": lambda: _sentencepiece(legacy=True),
}

# Chat templates. « and » stand where a template that marks what the assistant generates has its marks.
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}«{{ m.content }}<|im_end|>\n»"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA2 = (  # the system prompt goes into the first question; roles have to alternate
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>' + system + '<</SYS>>' + m.content %}"
    "{% else %}{% set content = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}«{{ ' ' + content.strip() + ' ' + eos_token }}»{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{% for m in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}{{ '<|im_start|>' + m.role + '\n\n' }}"
    "{% if m.role == 'assistant' %}«{{ m.content | trim }}<|im_end|>»"
    "{% else %}{{ m.content | trim }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
_PLAIN = (  # words alone, no special token
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'Answer: ' }}«{{ m.content }}{{ eos_token }}»"
    "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}{% endif %}" + _CHATML
)
_STABLE = {
    "chatml": _CHATML,
    "llama 2": _LLAMA2,
    "llama 3": _LLAMA3,
    "plain": _PLAIN,
    "default system": _DEFAULT_SYSTEM,
}
STABLE = {name: text.replace("«", "").replace("»", "") for name, text in _STABLE.items()}
"""Templates that keep what they rendered before."""
MARKED = {
    name: text.replace("«", "{% generation %}").replace("»", "{% endgeneration %}") for name, text in _STABLE.items()
}
REWRITING = {
    # as Qwen3: what comes after the last question alone has its thinking, an empty one where none is given
    "thinking": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
        "loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # as Mistral: the system prompt stands with the last question
    "system last": (
        "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}{% if m == users[-1] and messages[0].role == "
        "'system' %}{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    # an end of the text stands behind the last answer alone
    "end last": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if loop.last and m.role == "
        "'assistant' %}{{ eos_token }}{% else %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
TOOLS = (  # tools, calls and their results are printed, arguments as they come
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}"
    "({{ c.function.arguments }}){% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
