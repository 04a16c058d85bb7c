"""Small tokenizers with the chat templates and special tokens of the twelve models and a few others, made by code.

Each has its model's special tokens, writes the same text around a message, and treats blanks in the same way. Its
vocabulary is another: the embedded one, or one like sentencepiece's, trained on the embedded sample. It fits in
tiny.VOCABULARY. EOS has id 0, as in tiny's configs.

The templates are written here, after the real ones. They follow the revisions in which Phi-3's takes a system role and
writes no BOS, and Mixtral's takes no system role.
"""

import gzip
import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_ds.embedded import model_folder, sample_file

END = "<|endoftext|>"  # EOS in the vocabularies below; make() replaces it by the model's own
WORDS = 512  # tokens of `pieces`, besides its 256 bytes

# -------------------------------------------------------------------------------------------------------- vocabularies


@cache
def byte_level() -> str:
    """The embedded tokenizer, as JSON: like those of GPT-2, Llama-3, Qwen2 and Command-R."""
    return AutoTokenizer.from_pretrained(model_folder()).backend_tokenizer.to_str()


@cache
def pieces() -> str:
    """A BPE like sentencepiece's, as JSON: like those of Mistral, Gemma, Yi and Phi-3. A mark at a word's beginning
    stands for the blank before it.

    A character outside the vocabulary, such as a newline, is written as bytes. A blank at a text's end is a token by
    itself. If the text goes on, that blank merges into the next word.
    """
    with gzip.open(sample_file(), "rt", encoding="utf-8") as file:
        texts = [row["prompt"] + row["chosen"] for row in map(json.loads, file)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    visible = sorted(string.digits + string.ascii_letters + string.punctuation)
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=[END], initial_alphabet=visible, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    # The bytes are added only now, because the trainer would take their names for special tokens.
    vocabulary = trained["vocab"] | {f"<0x{byte:02X}>": len(trained["vocab"]) + byte for byte in range(256)}
    merges = [tuple(merge) for merge in trained["merges"]]
    whole = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return whole.to_str()


# ----------------------------------------------------------------------------------------------------------- templates

ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)


def chatml(default_system: str = "") -> str:
    default = f"<|im_start|>system\n{default_system}<|im_end|>\n"
    return (
        ("{% if messages[0].role != 'system' %}" + default + "{% endif %}" if default_system else "")
        + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The system text stands before the user's last message only if that message is the last of all. So a text with an
# answer has no system text. This is not our mistake: the real template does the same.
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "[INST] {{ system if loop.last }}{{ m.content }}[/INST]{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% set system = messages[0].role == 'system' %}"
    "{% if system %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ messages[0].content }}<|END_OF_TURN_TOKEN|>{% endif %}"
    "{% for m in (messages[1:] if system else messages) %}" + ALTERNATE + "<|START_OF_TURN_TOKEN|>"
    "<|{{ 'USER' if m.role == 'user' else 'CHATBOT' }}_TOKEN|>{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no such role') }}{% endif %}"
    "{% endfor %}"
)

# What stands before "</think>" is dropped, in the last answer too, and only the generation prompt writes "<think>".
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
# Reasoning stays only after the user's last message. The last answer has a place for it even if there is none.
QWEN_3 = (
    "{% if tools %}<|im_start|>system\n{{ messages[0].content ~ '\n\n' if messages[0].role == 'system' }}"
    "# Tools\n<tools>{% for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% set ask = namespace(at=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ask.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' or m.role == 'system' and not loop.first %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set thought, said = m.reasoning_content or '', m.content %}"
    "{% if not thought and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1] %}{% set said = said.split('</think>')[-1] %}"
    "{% endif %}{% set said = said.lstrip('\n') %}"
    "{% if loop.index0 > ask.at and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{% set call = call.function or call %}{{ '\n' if said or not loop.first }}"
    '<tool_call>\n{"name": "{{ call.name }}", "arguments": '
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}}\n</tool_call>"
    "{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Messages of any other role are left out, without a word.
ZEPHYR = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}<|{{ m.role }}|>\n{{ m.content }}"
    "{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_3_1 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% set system = messages[0].role == 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ date_string }}\n\n{{ messages[0].content | trim if system }}<|eot_id|>"
    "{% for m in (messages[1:] if system else messages) %}"
    "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('only one tool call at once') }}{% endif %}"
    "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# -------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Shape:
    template: str | None
    eos: str
    bos: str | None = None
    pad: str | None = None
    more: tuple[str, ...] = ()  # further special tokens
    adds_bos: bool = False  # the tokenizer adds BOS to a plain text
    rstrip: bool = False  # the further special tokens swallow the blanks after them
    base: Callable[[], str] = byte_level
    blank: str = "never"  # where `pieces` adds a blank: "always" before each piece of text, "first" or "never"
    blanks: tuple[str, ...] = ()  # runs of blanks that are tokens by themselves
    named: bool = False  # it has several chat templates, each with a name
    added: tuple[str, ...] = ()  # added tokens that are not special


CHATML = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
TURNS = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")

GPT_2 = Shape(None, END, END)
STABLELM_2 = Shape(chatml(), END, END, END, CHATML)
LLAMA = Shape(LLAMA_3, "<|eot_id|>", "<|begin_of_text|>", None, HEADERS, adds_bos=True)
QWEN_2 = Shape(chatml("You are a helpful assistant."), "<|im_end|>", None, END, CHATML)

SHAPES = {
    "gpt2": GPT_2,
    "stabilityai/stablelm-2-1_6b-chat": STABLELM_2,
    "microsoft/Phi-3-mini-4k-instruct": Shape(
        PHI_3, END, "<s>", END, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), rstrip=True, base=pieces,
        blank="always",
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA,
    "meta-llama/Meta-Llama-3-70B-Instruct": LLAMA,
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(
        MISTRAL, "</s>", "<s>", None, ("[INST]", "[/INST]"), adds_bos=True, base=pieces, blank="first"
    ),
    "google/gemma-7b-it": Shape(
        GEMMA, "<eos>", "<bos>", "<pad>", ("<start_of_turn>", "<end_of_turn>"), adds_bos=True, base=pieces,
        blanks=("\n", "\n\n"),
    ),
    "Qwen/Qwen2-7B-Instruct": QWEN_2,
    "Qwen/Qwen2-72B-Instruct": QWEN_2,
    "01-ai/Yi-34B-Chat": Shape(chatml(), "<|im_end|>", "<|startoftext|>", "<unk>", ("<|im_start|>",), base=pieces),
    "CohereForAI/c4ai-command-r-v01": Shape(
        COMMAND_R, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<PAD_TOKEN>", TURNS, adds_bos=True, named=True
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": Shape(MIXTRAL, "</s>", "<s>", adds_bos=True, base=pieces, blank="first"),
}  # fmt: skip

# Further shapes, which the tests of the twelve models do without.
SENTENCES = ("<｜User｜>", "<｜Assistant｜>")
THOUGHT = ("<think>", "</think>")
OTHERS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Shape(
        R1, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", None, SENTENCES, adds_bos=True, added=THOUGHT
    ),
    "Qwen/Qwen3-8B": Shape(
        QWEN_3, "<|im_end|>", None, END, CHATML, added=(*THOUGHT, "<tool_call>", "</tool_call>", "<tool_response>")
    ),
    "HuggingFaceH4/zephyr-7b-beta": Shape(ZEPHYR, "</s>", "<s>", adds_bos=True, base=pieces, blank="first"),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(
        LLAMA_3_1, "<|eot_id|>", "<|begin_of_text|>", None, (*HEADERS, "<|eom_id|>"), adds_bos=True
    ),
    "marked": Shape(MARKED, "<|im_end|>", None, END, CHATML),
}


def make(shape: Shape, name: str = "") -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(shape.base().replace(END, shape.eos))
    if shape.base is pieces:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=shape.blank)
    more = [AddedToken(token, rstrip=shape.rstrip, normalized=False, special=True) for token in shape.more]
    roles = {"eos_token": shape.eos, "bos_token": shape.bos, "pad_token": shape.pad}
    roles = {role: token for role, token in roles.items() if token}
    backend.add_special_tokens([*roles.values(), *more])
    backend.add_tokens([*shape.blanks, *shape.added])
    if shape.adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{shape.bos} $A", special_tokens=[(shape.bos, backend.token_to_id(shape.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=name,
        chat_template={"default": shape.template, "rag": "{{ documents }}"} if shape.named else shape.template,
        extra_special_tokens=more,
        **roles,
    )


def end_of_turn(model_id: str) -> str:
    """The token that ends a model's answer: its end-of-turn token, or EOS if it has none."""
    shape = SHAPES[model_id]
    return next((end for end in ("<|im_end|>", "<|end|>", "<end_of_turn>") if end in shape.more), shape.eos)


@cache
def tokenizer(model_id: str) -> PreTrainedTokenizerFast:
    """The stand-in for a model's tokenizer. It is shared: do not change it."""
    return make({**SHAPES, **OTHERS}[model_id], model_id)
