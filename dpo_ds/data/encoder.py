"""Turns pairs into token ids: the chat template, the boundary between prompt and response, truncation.

A response ends with the model's end-of-turn token. Prompt + chosen and prompt + rejected begin with the same prompt
tokens. Pairs that had to be changed or left out are counted in the report.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from dpo_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Kinds in the report. The first three change a pair, the others leave it out.
MOVED = "the response's first tokens merge with the prompt's: the boundary was moved back"
FOLDED = "the template takes no system role: its message went into the first user's"
CUT_PROMPT = "the prompt was cut to --max_length"
CUT_RESPONSE = "a response was cut to --max_length"
NO_ROOM = "no room for a response token within --max_length"
EQUAL_NOW = "the responses are equal once cut"
REFUSED = "the chat template refuses the dialogue"


@dataclass(frozen=True)
class Tokenizing:
    max_length: int  # tokens of prompt + the longer response
    truncation: str = "keep_end"  # or keep_start
    chat_template: str = "auto"  # or none


class Encoder:
    """Encodes rows for one tokenizer. Raises UserError if it has no EOS or its template refuses a plain dialogue."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", tokenizing: Tokenizing):
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no EOS token to end responses with: set one"
            )
        self.tokenizer, self.options = tokenizer, tokenizing
        self.templated = tokenizing.chat_template == "auto" and bool(tokenizer.chat_template)
        # lead: what the template writes before an answer (None if it rewrites the prompt once an answer follows);
        # suffix: what it writes after the answer; kept_suffix: the part of the suffix that belongs to the response.
        self.lead, self.suffix, self.kept_suffix = self._around_answer() if self.templated else (None, "", "")

    def _around_answer(self) -> tuple[str | None, str, str]:
        answer = "dpo ds answer"
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        try:
            rendered, opened = self._render(chat, open_turn=False), self._render(chat[:1], open_turn=True)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} takes no plain dialogue ({error}); "
                "use --chat_template none"
            ) from error
        at = rendered.rfind(answer)
        lead = rendered[len(opened) : at] if rendered.startswith(opened) else None
        suffix = rendered[at + len(answer) :]
        specials = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        specials |= set(self.tokenizer.all_special_tokens)
        # Some tokenizers list runs of blanks as added tokens; those do not end a turn.
        ends = [at + len(token) for token in specials if token.strip() and (at := suffix.find(token)) >= 0]
        return lead, suffix, suffix[: min(ends)] if ends else ""

    def _render(self, messages: list[dict], open_turn: bool) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
        assert isinstance(text, str)  # it returns tokens where it is asked for them
        return text

    def encode(self, rows: dict[str, list]) -> list[dict]:
        """Encodes a batch of checked rows: each gives prompt, chosen, rejected (lists of ids), left_out, changed."""
        texts, notes = [], []
        for n in range(len(rows["row"])):
            row = {key: column[n] for key, column in rows.items()}
            note: dict = {"left_out": "", "changed": []}
            notes.append(note)
            texts += self._templated_texts(row, note) if self.templated else self._plain_texts(row)
        ids = self._ids(texts)
        results = []
        for n, note in enumerate(notes):
            prompt, chosen, rejected = ids[3 * n : 3 * n + 3]
            if not note["left_out"]:
                prompt, chosen, rejected = self._split(prompt, chosen, rejected, note)
                prompt, chosen, rejected = self._truncate(prompt, chosen, rejected, note)
            results.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, **note})
        return results

    def _plain_texts(self, row: dict) -> list[str]:
        return [row["text"], row["text"] + row["chosen"], row["text"] + row["rejected"]]

    def _templated_texts(self, row: dict, note: dict) -> list[str]:
        messages = row["messages"]
        if messages[0]["role"] == "system" and len(messages) > 1 and not self._takes_system(messages):
            first = {"role": messages[1]["role"], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            messages = [first, *messages[2:]]
            note["changed"].append(FOLDED)
        try:
            prompt = self._render(messages, open_turn=True)
            return [prompt, *(self._with_answer(messages, prompt, row[key]) for key in ("chosen", "rejected"))]
        except jinja2.TemplateError:
            note["left_out"] = REFUSED
            return ["", "", ""]

    def _takes_system(self, messages: list[dict]) -> bool:
        """Whether the template writes a system message: some refuse it, some drop it silently."""
        try:
            return messages[0]["content"].strip() in self._render(messages, open_turn=True)
        except jinja2.TemplateError:
            return False

    def _with_answer(self, messages: list[dict], prompt: str, answer: str) -> str:
        answer = answer.strip()
        # The data may hold text that a template has already written.
        for end in (self.kept_suffix.strip(), self.tokenizer.eos_token):
            answer = answer.removesuffix(end).rstrip() if end else answer
        text = self._render([*messages, {"role": "assistant", "content": answer}], open_turn=False)
        if self.lead is not None and not text.startswith(prompt):
            # Mistral's template writes the system message before the last user message only if no answer follows.
            return prompt + self.lead + answer + self.kept_suffix
        if self.suffix and text.endswith(self.suffix):
            return text.removesuffix(self.suffix) + self.kept_suffix
        return text

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids. A template has already written special tokens; plain text gets the tokenizer's own."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self.tokenizer(texts, add_special_tokens=not self.templated, truncation=False, verbose=False)["input_ids"]
        for n, tokens in enumerate(ids):
            if bos is not None and tokens[:2] == [bos, bos]:
                tokens = tokens[1:]
            response = n % 3 > 0
            if self.templated:
                if response and not self.kept_suffix and tokens[-1:] != [eos]:
                    tokens = [*tokens, eos]
            else:
                while tokens[-1:] == [eos] and (len(tokens) > 1 or eos != bos):
                    tokens = tokens[:-1]
                tokens = [*tokens, eos] if response else tokens
            ids[n] = tokens
        return ids

    def _split(self, prompt: list[int], chosen: list[int], rejected: list[int], note: dict):
        """Splits the tokens into the shared prompt and the two responses."""
        boundary = len(prompt)
        if chosen[:boundary] != prompt or rejected[:boundary] != prompt:
            boundary = _common(prompt, chosen, rejected)
            note["changed"].append(MOVED)
        prompt, chosen, rejected = prompt[:boundary], chosen[boundary:], rejected[boundary:]
        if not prompt:  # the first response token must be predicted from some token
            bos = self.tokenizer.bos_token_id
            prompt = [self.tokenizer.eos_token_id if bos is None else bos]
        return prompt, chosen, rejected

    def _truncate(self, prompt: list[int], chosen: list[int], rejected: list[int], note: dict):
        limit = self.options.max_length
        P, C, R = len(prompt), len(chosen), len(rejected)
        if self.options.truncation == "keep_start":
            prompt = prompt[:limit]
            keep = limit - len(prompt)
        else:
            keep = limit - 1  # response tokens: at least one prompt token must remain to predict them from
            whole = max(1, limit - min(max(C, R), keep))
            if P > whole:
                # A model that expects BOS first does not work without it.
                head = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id and whole > 1 else []
                prompt = head + prompt[P - (whole - len(head)) :]
        if len(prompt) < P:
            note["changed"].append(CUT_PROMPT)
        if max(C, R) > keep:
            note["changed"].append(CUT_RESPONSE)
        chosen, rejected = chosen[:keep], rejected[:keep]
        if not chosen or not rejected:
            note["left_out"] = NO_ROOM
        elif chosen == rejected:
            note["left_out"] = EQUAL_NOW
        return prompt, chosen, rejected


def _common(*sequences: list[int]) -> int:
    """Length of the longest common prefix."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
