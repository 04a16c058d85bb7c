"""The prompt and responses that the encoder makes of a dialogue for each of the twelve models, written out."""

from dataclasses import dataclass, replace

import pytest
import templates
from tiny import VOCABULARY
from transformers import AutoTokenizer

from dpo_ds.data.chat import FOLDED
from dpo_ds.data.comparison import Answer, Comparison, Preference
from dpo_ds.data.encoded import Encoded
from dpo_ds.data.encoder import MOVED, Encoder, Tokenizing
from dpo_ds.data.template import REFUSED

DIALOGUES = {
    "single": [("user", "Hello")],
    "turns": [("user", "Hello"), ("assistant", "Hi"), ("user", "And now?")],
    "system": [("system", "Be brief."), ("user", "Hello")],
}
ANSWERS = ["It was good.", "No way."]


@dataclass(frozen=True)
class Expected:
    """What a model reads: the prompt of each dialogue, and the text before and after an answer."""

    single: str
    turns: str
    system: str
    end: str
    before: str = ""
    folded: bool = False  # the system message is put into the user's

    def changed(self, dialogue: str) -> list[str]:
        return [FOLDED] if self.folded and dialogue == "system" else []


STABLELM_2 = YI = Expected(
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
)
QWEN_2 = Expected(
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
)
LLAMA_3 = Expected(
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
)
EXPECTED = {
    "gpt2": Expected(
        "\n\nHuman: Hello\n\nAssistant:",
        "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: And now?\n\nAssistant:",
        "\n\nSystem: Be brief.\n\nHuman: Hello\n\nAssistant:",
        end="<|endoftext|>",
        before=" ",
    ),
    "stabilityai/stablelm-2-1_6b-chat": STABLELM_2,
    # The template writes a newline after each of these tokens, which swallow it. The text after them gets a blank.
    "microsoft/Phi-3-mini-4k-instruct": Expected(
        "<|user|> Hello<|end|><|assistant|>",
        "<|user|> Hello<|end|><|assistant|> Hi<|end|><|user|> And now?<|end|><|assistant|>",
        "<|system|> Be brief.<|end|><|user|> Hello<|end|><|assistant|>",
        end="<|end|>",
        before=" ",
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3,
    "meta-llama/Meta-Llama-3-70B-Instruct": LLAMA_3,
    "mistralai/Mistral-7B-Instruct-v0.3": Expected(
        "<s>[INST] Hello[/INST]",
        "<s>[INST] Hello[/INST] Hi</s>[INST] And now?[/INST]",
        "<s>[INST] Be brief.\n\nHello[/INST]",
        end="</s>",
        before=" ",
    ),
    "google/gemma-7b-it": Expected(
        "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi<end_of_turn>\n"
        "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>",
        folded=True,
    ),
    "Qwen/Qwen2-7B-Instruct": QWEN_2,
    "Qwen/Qwen2-72B-Instruct": QWEN_2,
    "01-ai/Yi-34B-Chat": YI,
    "CohereForAI/c4ai-command-r-v01": Expected(
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hello<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hello<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>And now?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hello<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        end="<|END_OF_TURN_TOKEN|>",
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": Expected(
        "<s> [INST] Hello [/INST]",
        "<s> [INST] Hello [/INST] Hi</s> [INST] And now? [/INST]",
        "<s> [INST] Be brief.\n\nHello [/INST]",
        end="</s>",
        before=" ",
        folded=True,
    ),
}
MODELS = list(templates.SHAPES)
TEMPLATED = [model for model in MODELS if templates.SHAPES[model].template]


def encode(tok, prompt: str | list, chat_template: str = "auto") -> Encoded:
    """Encodes the pair of a prompt and the two answers. The prompt is text, or a list of (role, content)."""
    if isinstance(prompt, str):
        text, messages = prompt, [{"role": "user", "content": prompt}]
        answers = [Answer([{"role": "assistant", "content": answer}], answer) for answer in ANSWERS]
    else:
        text, messages = None, [{"role": role, "content": content} for role, content in prompt]
        answers = [Answer([{"role": "assistant", "content": answer}]) for answer in ANSWERS]
    comparison = Comparison(messages, answers, [Preference(0, 1)], text)
    (pair,) = Encoder(tok, Tokenizing(500, chat_template=chat_template)).encode([comparison])
    return pair


def check(tok, pair: Encoded, prompt: str, before: str, end: str, changed: list[str]) -> None:
    """Asserts that the pair is the prompt as written, the answers, the token that ends a turn, and nothing else."""
    assert (pair.left_out, pair.changed) == ("", changed)
    assert tok.decode(pair.prompt) == prompt
    for tokens, answer in zip(pair.answers, ANSWERS, strict=True):
        # Decoded together, because sentencepiece drops a blank at the beginning of a text.
        whole, text = pair.prompt + tokens, f"{prompt}{before}{answer}{end}"
        assert tok.decode(whole) == text
        assert whole == tok(text, add_special_tokens=False)["input_ids"]
        assert tokens[-1] == tok.convert_tokens_to_ids(end)  # that token, not its letters


def check_model(tok, pair: Encoded, model: str, dialogue: str) -> None:
    it = EXPECTED[model]
    check(tok, pair, getattr(it, dialogue), it.before, it.end, it.changed(dialogue))


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("model", MODELS)
def test_a_dialogue_is_what_the_model_was_taught_to_read(model, dialogue):
    tok = templates.tokenizer(model)
    check_model(tok, encode(tok, DIALOGUES[dialogue]), model, dialogue)


# ----------------------------------------------------------------------------------------- what the check must not pass


@pytest.mark.parametrize("model", TEMPLATED)
def test_a_template_without_turn_ends_does_not_pass(model):
    shape, end = templates.SHAPES[model], EXPECTED[model].end
    tok = templates.make(replace(shape, template=shape.template.replace(end, "")))
    pair = encode(tok, DIALOGUES["turns"])
    assert not pair.left_out
    with pytest.raises(AssertionError):
        check_model(tok, pair, model, "turns")


@pytest.mark.parametrize("model", [m for m in TEMPLATED if EXPECTED[m].end != templates.SHAPES[m].eos])
def test_nor_does_one_that_ends_all_turns_but_the_answers(model):
    """The prompts are right, but the encoder ends the responses with EOS, which ends no turn here."""
    shape, end = templates.SHAPES[model], EXPECTED[model].end
    unended = shape.template.replace(end, f"{{{{ '{end}' if m.role != 'assistant' }}}}")
    tok = templates.make(replace(shape, template=unended))
    pair = encode(tok, DIALOGUES["single"])
    assert tok.decode(pair.prompt) == EXPECTED[model].single and pair.answers[0][-1] == tok.eos_token_id
    with pytest.raises(AssertionError):
        check_model(tok, pair, model, "single")


SPOILT = {
    "no turn end": lambda tok, p, c, r: (p, c[:-1], r),
    "the template's newline after it": lambda tok, p, c, r: (p, c, r + tok("\n", add_special_tokens=False).input_ids),
    "two of it": lambda tok, p, c, r: (p, c, [*r, r[-1]]),
    "BOS, or first token, twice": lambda tok, p, c, r: ([p[0], *p], c, r),
    "no BOS, or first token": lambda tok, p, c, r: (p[1:], c, r),
    "a boundary too early": lambda tok, p, c, r: (p[:-1], [p[-1], *c], [p[-1], *r]),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("what", SPOILT)
def test_nor_does_a_spoilt_pair(what, model):
    tok = templates.tokenizer(model)
    pair = encode(tok, DIALOGUES["single"])
    prompt, *answers = SPOILT[what](tok, pair.prompt, *pair.answers)
    with pytest.raises(AssertionError):
        check_model(tok, replace(pair, prompt=prompt, answers=answers), model, "single")


# ------------------------------------------------------------------------- what a template refuses; blanks that merge

ALTERNATING = {model for model in TEMPLATED if templates.ALTERNATE in templates.SHAPES[model].template}


@pytest.mark.parametrize("model", TEMPLATED)
def test_two_messages_of_the_user_are_refused_where_roles_must_alternate(model):
    pair = encode(templates.tokenizer(model), [("user", "Hello"), ("user", "And now?")])
    assert pair.left_out == (f"{REFUSED}: roles must alternate" if model in ALTERNATING else "")


@pytest.mark.parametrize(
    ("model", "prompt"),
    [("gpt2", "Once"), ("google/gemma-7b-it", "<bos>Once"), ("mistralai/Mixtral-8x7B-Instruct-v0.1", "<s> Once")],
)
def test_a_blank_at_a_plain_prompts_end_melts_into_the_answer(model, prompt):
    tok = templates.tokenizer(model)
    end = tok.eos_token
    check(tok, encode(tok, "Once ", chat_template="none"), prompt, " ", end, [MOVED])
    check(tok, encode(tok, "Once\n", chat_template="none"), f"{prompt}\n", "", end, [])


def test_a_blank_at_a_templates_end_melts_into_the_answer():
    """With sentencepiece, the tokens of "[/INST] " and those of "It" are not the tokens of "[/INST] It"."""
    model = "mistralai/Mixtral-8x7B-Instruct-v0.1"
    shape = templates.SHAPES[model]
    open_blank = shape.template.replace("[/INST]", "[/INST] ").replace(" {{ m.content }}</s>", "{{ m.content }}</s>")
    tok = templates.make(replace(shape, template=open_blank))
    check(tok, encode(tok, DIALOGUES["single"]), EXPECTED[model].single, " ", "</s>", [MOVED])


# ------------------------------------------------------------------------------------------------------- the tokenizers


@pytest.mark.parametrize("model", MODELS)
def test_a_tokenizer_fits_the_tiny_models_and_knows_its_special_tokens(model):
    tok, shape = templates.tokenizer(model), templates.SHAPES[model]
    assert max(tok.get_vocab().values()) < VOCABULARY and tok.eos_token_id == 0
    assert (tok.eos_token, tok.bos_token, tok.pad_token) == (shape.eos, shape.bos, shape.pad)
    for token in {shape.eos, shape.bos, shape.pad, *shape.more} - {None}:
        assert tok(token, add_special_tokens=False).input_ids == [tok.convert_tokens_to_ids(token)]
    assert tok("Hello").input_ids.count(tok.bos_token_id) == shape.adds_bos
    assert tok.decode(tok("Né  \n1", add_special_tokens=False).input_ids) == "Né  \n1"  # it knows every character


@pytest.mark.parametrize("model", MODELS)
def test_a_tokenizer_that_was_saved_encodes_as_before(model, tmp_path):
    tok = templates.tokenizer(model)
    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in DIALOGUES.values():
        assert encode(again, prompt) == encode(tok, prompt)
