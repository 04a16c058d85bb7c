"""Texts that have been through a chat template already: found by the template's own tokens, and used as they are."""

import os
import re

from dpo_ds.data.comparison import LeftOut, Markers

GOES_ON = "a dialogue that is rendered already goes on after its answers differ; give it as messages"
NOT_OPEN = (
    "a prompt that is rendered already does not end where an answer begins; end it as the chat template does, or use "
    "--chat_template none"
)
NO_OPENING = "a dialogue that is rendered already has no assistant's turn before its answers differ"

# What the templates of common families begin a text or a turn with. Another model's text is not this model's.
FAMILIES = ("<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|system|>",
            "<|start|>", "<|start_of_role|>", "<|START_OF_TURN_TOKEN|>", "<｜begin▁of▁sentence｜>", "<｜User｜>",
            "[INST]", "<s>[INST]", "<bos><start_of_turn>")  # fmt: skip
# What they write before a message, wherever it stands.
MARKS = (*FAMILIES[:-2], "<|assistant|>", "<｜Assistant｜>")


def rendered_prompt(prompt: str, answers: list[str], markers: Markers) -> tuple[str, list[str]] | None:
    """The prompt and the answers, if the prompt begins or ends as the template writes it; None if it does not.

    A token of the template in the middle of a prompt shows nothing: the user may ask what it means.
    """
    opening = markers.opening.strip()
    # An opening such as "Assistant:" is written by people too.
    marked = any(sign in opening for sign in ("<", "[", *filter(None, markers.specials)))
    opened = marked and prompt.rstrip().endswith(opening)
    if not opened and not _begins(prompt, markers):
        return None
    if all(answer.startswith(prompt) for answer in answers):
        answers = [answer[len(prompt) :] for answer in answers]
    if opening and not opened and all(answer.startswith(markers.opening) for answer in answers):
        return prompt + markers.opening, [answer[len(markers.opening) :] for answer in answers]
    return (_opened(prompt, answers, markers) if opening else prompt), answers


def _opened(prompt: str, answers: list[str], markers: Markers) -> str:
    """A rendered prompt with the opening of an answer at its end. Raises LeftOut if that is not what follows it."""
    opening, blanks = markers.opening.rstrip(), markers.opening[len(markers.opening.rstrip()) :]
    before, found, after = prompt.rpartition(opening.strip())
    if found and not after.strip():
        # The blanks behind it may stand in the prompt or in the answers.
        as_it_is = after.startswith(blanks) or any(answer[:1].isspace() for answer in answers)
        return prompt if as_it_is else before + found + blanks
    if found and (not markers.end or markers.end not in after):  # the assistant has begun its answer
        return prompt
    closing = markers.closing.rstrip()
    ended_answer = found and not after.partition(markers.end)[2].strip()
    if ended_answer or not closing or not prompt.rstrip().endswith(closing):
        raise LeftOut(NOT_OPEN)
    more = "" if prompt.endswith(markers.closing) else markers.closing[len(closing) :]
    return (prompt if not more else prompt.rstrip() + more) + markers.opening


def rendered_dialogues(texts: list[str], markers: Markers) -> tuple[str, list[str]] | None:
    """The prompt and the answers of whole dialogues that a template wrote; None if they are no such texts."""
    if not all(_begins(text, markers) for text in texts):
        return None
    common = os.path.commonprefix(texts)  # noqa: RUF071  (compares character by character, as intended)
    if markers.opening:
        opening = markers.opening if markers.opening in common else markers.opening.strip()
        at = common.rfind(opening)
        if at < 0:
            raise LeftOut(NO_OPENING)
        cut = at + len(opening)
        if any(opening in text[cut:] for text in texts):
            raise LeftOut(GOES_ON)
    else:
        cut = _after_last_special(common, markers)
    return texts[0][:cut], [text[cut:] for text in texts]


def require_own(text: str, markers: Markers) -> None:
    """Raises LeftOut for a text that another model's template wrote: this model's would put a frame around it."""
    for token in FAMILIES:
        if text.lstrip().startswith(token):
            raise LeftOut(
                f"a text begins with {token}, which another model's chat template writes; give messages, or use "
                "--chat_template none"
            )


def require_bare(answer: str) -> None:
    """Raises LeftOut for an answer with the frame of a chat template around it, beside a prompt without one."""
    for token in (*FAMILIES, *MARKS[-2:]):
        if answer.lstrip().startswith(token):
            raise LeftOut(
                f"an answer begins with {token}, which a chat template writes, but its prompt does not; give the "
                "answer's text alone, or use --chat_template none"
            )


def _begins(text: str, markers: Markers) -> bool:
    return any(token and text.lstrip().startswith(token) for token in markers.specials)


def _after_last_special(common: str, markers: Markers) -> int:
    """Where the answers begin if it is not known what the template writes before them: after the last special token
    and the whole lines, or else words, that all have in common after it."""
    ends = [common.rfind(token) + len(token) for token in markers.specials if token in common]
    if not ends:
        raise LeftOut(NO_OPENING)
    end = max(ends)
    shared = common[end:]
    lines = shared.rfind("\n") + 1
    words = len(re.sub(r"\s*\S*\Z", "", shared))
    return end + max(lines, words if not lines else 0)
