"""Rows in the schemas of public preference sets, made by code: the published columns, texts of our own.

LAYOUTS[name](n) is row n of a set with what must be read from it: the prompt's messages, the chosen and the rejected
answer (with --pairs best_worst). `rows(name)` are ten of them.
"""

from collections.abc import Callable
from typing import NamedTuple


class Made(NamedTuple):
    row: dict
    messages: list[dict]
    chosen: str
    rejected: str


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def asked(n: int) -> tuple[str, str, str]:
    return f"What is {n} plus {n}?", f"The sum of {n} and {n} is {2 * n}.", f"It is {2 * n + 1}."


def hh(n: int) -> Made:
    """Anthropic/hh-rlhf."""
    question, good, bad = asked(n)
    start = f"\n\nHuman: Hello\n\nAssistant: Hello, friend {n}.\n\nHuman: {question}\n\nAssistant:"
    row = {"chosen": f"{start} {good}", "rejected": f"{start} {bad}"}
    return Made(row, [user("Hello"), answer(f"Hello, friend {n}."), user(question)], good, bad)


def ultrafeedback_binarized(n: int) -> Made:
    """HuggingFaceH4/ultrafeedback_binarized, train_prefs."""
    question, good, bad = asked(n)
    row = {
        "prompt": question, "prompt_id": f"{n:064x}", "chosen": [user(question), answer(good)],
        "rejected": [user(question), answer(bad)], "messages": [user(question), answer(good)],
        "score_chosen": 8.0 + n / 10, "score_rejected": 5.0,
    }  # fmt: skip
    return Made(row, [user(question)], good, bad)


def ultrafeedback(n: int) -> Made:
    """openbmb/UltraFeedback: four completions with scores."""
    question, good, bad = asked(n)
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    answers = {"alpaca-7b": (bad, 2.0), "gpt-4": (good, 9.0), "bard": ("Two things.", 6.5), "falcon": ("Hm.", 4.0)}
    completions = [
        {
            "annotations": {aspect: {"Rating": "4", "Rationale": "It is so."} for aspect in aspects},
            "custom_system_prompt": "As an AI assistant, be honest.", "model": model, "principle": "honesty",
            "response": text, "critique": "Well done, on the whole.", "overall_score": score,
            "fine-grained_score": score / 2,
        }
        for model, (text, score) in answers.items()
    ]  # fmt: skip
    row = {"source": "sharegpt", "instruction": question, "models": [*answers], "completions": completions,
           "correct_answers": ["None"], "incorrect_answers": ["None"]}  # fmt: skip
    return Made(row, [user(question)], good, bad)


def orca_dpo_pairs(n: int) -> Made:
    """Intel/orca_dpo_pairs: the system message is empty in some rows."""
    question, good, bad = asked(n)
    said = "" if n % 3 == 0 else "You are an AI assistant. Help as much as you can."
    row = {"system": said, "question": question, "chosen": good, "rejected": bad}
    return Made(row, [*([system(said)] if said else []), user(question)], good, bad)


def nectar(n: int) -> Made:
    """berkeley-nest/Nectar: seven answers with ranks from 1."""
    question, good, bad = asked(n)
    texts = ["Maybe.", good, "Sums are easy.", "I would add them.", "Who knows?", bad, "Ask again."]
    ranks = [4, 1, 2, 3, 5, 7, 6]
    answers = [{"answer": text, "model": f"model-{m}", "rank": float(rank)}
               for m, (text, rank) in enumerate(zip(texts, ranks, strict=True))]  # fmt: skip
    row = {"prompt": f"\n\nHuman: {question}\n\nAssistant: ", "answers": answers, "turns": 1, "num_responses": 7,
           "source": ["sharegpt"], "good_natured": True}  # fmt: skip
    return Made(row, [user(question)], good, bad)


def shp(n: int) -> Made:
    """stanfordnlp/SHP: labels 1 says that A is the better."""
    question, good, bad = asked(n)
    a_is_better = n % 2 == 0
    a, b = (good, bad) if a_is_better else (bad, good)
    row = {
        "post_id": f"p{n}", "domain": "askscience_train", "upvote_ratio": 0.98, "history": question,
        "c_root_id_A": f"a{n}", "c_root_id_B": f"b{n}", "created_at_utc_A": 1600000000 + n,
        "created_at_utc_B": 1600000100 + n, "score_A": 30 if a_is_better else 4, "score_B": 4 if a_is_better else 30,
        "human_ref_A": a, "human_ref_B": b, "labels": int(a_is_better), "seconds_difference": 100.0,
        "score_ratio": 7.5,
    }  # fmt: skip
    return Made(row, [user(question)], good, bad)


def safe_rlhf(n: int) -> Made:
    """PKU-Alignment/PKU-SafeRLHF."""
    question, good, bad = asked(n)
    better = n % 2
    texts = [bad, bad]
    texts[better] = good
    row = {
        "prompt": question, "response_0": texts[0], "response_1": texts[1], "prompt_source": "PKU", "response_0_source":
        "Alpaca", "response_1_source": "Alpaca", "is_response_0_safe": True, "is_response_1_safe": False,
        "better_response_id": better, "safer_response_id": 1 - better, "response_0_sha256": "0",
    }  # fmt: skip
    return Made(row, [user(question)], good, bad)


def helpsteer3(n: int) -> Made:
    """nvidia/HelpSteer3, preference: below 0 the first response is the better."""
    question, good, bad = asked(n)
    strength = -2 if n % 2 else 3
    first, second = (good, bad) if strength < 0 else (bad, good)
    row = {
        "domain": "general", "language": "english", "context": [user("Hello"), answer("Hi."), user(question)],
        "response1": first, "response2": second, "overall_preference": strength,
        "individual_preference": [{"score": strength, "reasoning": "It is better."}],
    }  # fmt: skip
    return Made(row, [user("Hello"), answer("Hi."), user(question)], good, bad)


def arena(n: int) -> Made:
    """lmarena-ai/arena-human-preference-140k: dialogues of parts, of which some hold null."""
    question, good, bad = asked(n)

    def said(role: str, text: str) -> dict:
        return {"role": role, "content": [{"type": "text", "text": text, "image": None, "mimeType": None}]}

    winner = "model_b" if n % 2 else "model_a"
    texts = (bad, good) if n % 2 else (good, bad)
    a, b = ([said("user", question), said("assistant", text)] for text in texts)
    row = {"id": str(n), "model_a": "one", "model_b": "two", "winner": winner, "evaluation_session_id": "s",
           "evaluation_order": 1, "conversation_a": a, "conversation_b": b, "language": "en", "is_code": False,
           "conv_metadata": {"sum_assistant_a_tokens": 9}}  # fmt: skip
    return Made(row, [user(question)], good, bad)


def argilla_ultrafeedback(n: int) -> Made:
    """argilla/ultrafeedback-binarized-preferences."""
    question, good, bad = asked(n)
    row = {"source": "flan", "instruction": question, "chosen_response": good, "rejected_response": bad,
           "chosen_avg_rating": 4.5, "rejected_avg_rating": 2.0, "chosen_model": "gpt-4"}  # fmt: skip
    return Made(row, [user(question)], good, bad)


def argilla_orca(n: int) -> Made:
    """argilla/distilabel-intel-orca-dpo-pairs: the prompt is `input`; both answers stand in `generations` too."""
    question, good, bad = asked(n)
    row = {"system": "Be brief.", "input": question, "chosen": good, "rejected": bad, "generations": [bad, good],
           "order": ["rejected", "chosen"], "labelling_model": "gpt-4", "rating": [3.0, 9.0],
           "rationale": "The second one is right.", "status": "unchanged", "chosen_score": 9.0}  # fmt: skip
    return Made(row, [system("Be brief."), user(question)], good, bad)


def ms_swift(n: int) -> Made:
    """ms-swift's standard form for DPO."""
    question, good, bad = asked(n)
    row = {"messages": [system("Be brief."), user(question), answer(good)], "rejected_response": bad}
    return Made(row, [system("Be brief."), user(question)], good, bad)


def openai(n: int) -> Made:
    """OpenAI's (and Together's, Fireworks') preference fine-tuning."""
    question, good, bad = asked(n)
    row = {"input": {"messages": [user(question)], "tools": [], "parallel_tool_calls": True},
           "preferred_output": [answer(good)], "non_preferred_output": [answer(bad)]}  # fmt: skip
    return Made(row, [user(question)], good, bad)


def llamafactory_sharegpt(n: int) -> Made:
    """LLaMA-Factory's ShareGPT form with ranking."""
    question, good, bad = asked(n)
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}, {"from": "human", "value": question}]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": good}, "rejected": {"from": "gpt", "value": bad}}
    return Made(row, [user("Hello"), answer("Hi."), user(question)], good, bad)


LARGEST: dict[str, Callable[[int], Made]] = {
    "HH": hh,
    "UltraFeedback binarized": ultrafeedback_binarized,
    "UltraFeedback": ultrafeedback,
    "Orca DPO pairs": orca_dpo_pairs,
    "Nectar": nectar,
    "SHP": shp,
}
LAYOUTS: dict[str, Callable[[int], Made]] = LARGEST | {
    "PKU-SafeRLHF": safe_rlhf,
    "HelpSteer3": helpsteer3,
    "Chatbot Arena": arena,
    "Argilla's UltraFeedback": argilla_ultrafeedback,
    "Argilla's Orca": argilla_orca,
    "ms-swift": ms_swift,
    "OpenAI": openai,
    "LLaMA-Factory": llamafactory_sharegpt,
}


def rows(name: str, count: int = 10) -> list[dict]:
    return [LAYOUTS[name](n).row for n in range(count)]
