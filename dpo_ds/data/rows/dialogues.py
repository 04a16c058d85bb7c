"""Whole dialogues as plain text, in HH's style: the prompt is all up to the last answer."""

from itertools import pairwise

from dpo_ds.data.comparison import LeftOut
from dpo_ds.data.dialogue import ROLES, as_dialogue, last_answer, parse_dialogue, prompt_messages, without_tail
from dpo_ds.data.rows.chats import DIFFER, NO_PROMPT, compare, from_chats, shared_messages
from dpo_ds.data.rows.parts import REPEATED, TAIL, Parts, before_prompt, text_parts
from dpo_ds.data.rows.row import Prompt, Row


def from_dialogues(row: Row, prompt: Prompt | None, texts: list[str]) -> Parts:
    """Whole dialogues as text, in HH's style."""
    ended = [without_tail(text) for text in texts]
    if ended != texts:
        row.notes.changed[TAIL] = None
        texts = ended
    prompts = [text[: last_answer(text)] for text in texts]
    if any(found != prompts[0] for found in prompts):
        chats = [parse_dialogue(text) or [] for text in texts]
        shared = shared_messages(chats)
        turns = [[message["role"] for message in chat[shared:]] for chat in chats]
        if not all(chats) or any(a == b for roles in turns for a, b in pairwise(roles)):
            raise LeftOut(DIFFER)
        return from_chats(row, prompt, chats)
    start, messages = len(prompts[0]), prompt_messages(prompts[0])
    if not messages:  # no answer, or nothing before it
        raise LeftOut(NO_PROMPT)
    if prompt is not None and prompt.text is not None and as_dialogue(prompt.text) == prompts[0]:
        row.notes.changed[REPEATED] = None
    elif prompt is not None:
        compare(row, prompt, messages)
    before = before_prompt(row, messages)
    text = "".join(f"\n\n{ROLES[message['role']]}: {message['content']}" for message in before) + prompts[0]
    return text_parts(row, [*before, *messages], text, [text[start:] for text in texts])
