"""Small files in public layouts, with the rows that they have to give."""

from dataclasses import dataclass, field
from typing import Any

Rows = list[dict[str, Any]]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


SYSTEM = {"role": "system", "content": "Be brief."}


@dataclass
class Case:
    """A file in one layout.

    Attributes:
        layout: Its name.
        rows: The file.
        pairs: What the rows are as preferences: prompt, answers from best to worst, margin.
        learned: What they are as demonstrations: prompt, answer.
        unused: What is named as not used.
        ties: Pairs that are tied.
        left_out: Rows that are no preference.
    """

    layout: str
    rows: Rows
    pairs: list[tuple[Any, ...]] = field(default_factory=list)
    learned: list[tuple[str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    ties: int = 0
    left_out: int = 0


ASKED = "User: Why is it cold?\n\nAssistant:"
TOLD = "Be brief.\n\n" + ASKED
TALK = "User: Hi\n\nAssistant: Hello.\n\nUser: Why is it cold?\n\nAssistant:"
WHY, GOOD, BAD = user("Why is it cold?"), assistant("It is winter."), assistant("No.")
BEST = (ASKED, "It is winter.", "No.")
CASES = {
    "vertex preferences": Case(
        "rows",
        [{"input_text": "A post. [summary]: ", "candidate_0": " one", "candidate_1": " two",
          "choice": 1}],
        [("A post. [summary]: ", " two", " one")],
    ),
    "vertex prompts": Case("rows", [{"input_text": "A post. [summary]: "}]),
    "vertex evaluation": Case(
        "rows",
        [{"input_text": "A post. [summary]: ", "output_text": "A summary."}],
        learned=[("A post. [summary]: ", "A summary.")],
    ),
    "ranking": Case(
        "rows",
        [{"prompt": "Say a", "candidates": ["x", "a", "b"], "ranking": [1, 2, 0]}],
        [("Say a", "a", "b", "x")],
    ),
    "scores": Case(
        "rows",
        [{"input_text": "Say a", "candidates": ["x", "a", "b"], "scores": [0.5, 3, -1]},
         {"input_text": "Say b", "candidates": ["x", "b", "a", "y"], "scores": [1, 2, 1, 0]},
         {"input_text": "Say c", "candidates": ["x", "c"], "scores": [1, 1]}],
        [("Say a", "a", "x", "b"), ("Say b", "b", "x", "a", "y")],
        ties=2,
    ),
    "a tie by choice": Case(
        "rows",
        [{"input_text": "Say a", "candidate_0": "a", "candidate_1": "b", "choice": "tie"},
         {"input_text": "Say a", "candidate_0": "a", "candidate_1": "c", "choice": "0"}],
        [("Say a", "a", "c")],
        ties=1,
    ),
    "trl standard, explicit prompt": Case(
        "rows",
        [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}],
        [("The sky is", " blue.", " green.")],
    ),
    "trl standard, implicit prompt": Case(
        "implicit_prompt",
        [{"chosen": "The sky is blue.", "rejected": "The sky is black."},
         {"chosen": "Go\nnow and then", "rejected": "Go\nnow"},
         {"chosen": "The same.", "rejected": "The same."}],
        [("The sky is", " blue.", " black."), ("Go\nnow", " and then", "")],
        left_out=1,
    ),
    "trl conversations, explicit prompt": Case(
        "chosen_rejected",
        [{"prompt": [WHY], "chosen": [GOOD], "rejected": [BAD]},
         {"prompt": [SYSTEM, WHY], "chosen": [GOOD], "rejected": [BAD], "margin": 2}],
        [BEST, (TOLD, "It is winter.", "No.", 2.0)],
    ),
    "trl conversations, implicit prompt": Case(
        "chosen_rejected",
        [{"chosen": [WHY, GOOD], "rejected": [WHY, BAD]},
         {"chosen": [SYSTEM, WHY, GOOD], "rejected": [SYSTEM, WHY, BAD]}],
        [BEST, (TOLD, "It is winter.", "No.")],
    ),
    "conversations with the prompt as text": Case(
        "chosen_rejected",
        [{"prompt": "Why is it cold?", "chosen": [WHY, GOOD], "rejected": [WHY, BAD]},
         {"prompt": "Why is it cold?", "chosen": GOOD, "rejected": BAD}],
        [BEST, BEST],
    ),
    "messages before two texts": Case(
        "rows",
        [{"messages": [user("Hi"), assistant("Hello."), WHY], "chosen": "It is winter.",
          "rejected": "No."}],
        [(TALK, "It is winter.", "No.")],
    ),
    "texts in parts": Case(
        "chosen_rejected",
        [{"chosen": [user([{"type": "text", "text": "Why is "}, {"text": "it cold?"}]), GOOD],
          "rejected": [WHY, BAD]}],
        [BEST],
    ),
    "ultrafeedback binarized": Case(
        "ultrafeedback_binarized",
        [{"prompt": "Why is it cold?", "prompt_id": "f00d", "chosen": [WHY, GOOD],
          "rejected": [WHY, BAD], "messages": [WHY, GOOD], "score_chosen": 8.5,
          "score_rejected": 7.0},
         {"prompt": "Why is it cold?", "prompt_id": "f00d", "chosen": [WHY, GOOD],
          "rejected": [WHY, assistant("A cold front.")], "messages": [WHY, GOOD],
          "score_chosen": 8.0, "score_rejected": 8.0}],
        [BEST],
        [(ASKED, "It is winter."), (ASKED, "It is winter.")],
        ["prompt_id"],
        ties=1,
    ),
    "ultrafeedback cleaned": Case(
        "ultrafeedback_binarized",
        [{"prompt": "Why is it cold?", "chosen": [WHY, GOOD], "rejected": [WHY, BAD],
          "chosen-rating": 5, "rejected-rating": 2.5, "chosen-model": "m-1"}],
        [BEST],
        unused=["chosen-model"],
    ),
    "ultrafeedback": Case(
        "ultrafeedback",
        [{"instruction": "Why is it cold?", "source": "made up", "models": ["m-1", "m-2"],
          "completions": [
              {"model": "m-1", "response": "No.", "overall_score": 2.0, "critique": "Curt."},
              {"model": "m-2", "response": "It is winter.", "overall_score": 8.0,
               "annotations": {"honesty": {"Rating": "5", "Rationale": "True."}}}]},
         {"instruction": "Say a", "completions": [
              {"response": "b", "annotations": {"honesty": {"Rating": "N/A"},
                                                "truth": {"Rating": "2"}}},
              {"response": "a", "annotations": {"honesty": {"Rating": "4"},
                                                "truth": {"Rating": "3"}}},
              {"response": "c", "annotations": {"truth": {"Rating": 1}}}]}],
        [("Why is it cold?", "It is winter.", "No."), ("Say a", "a", "b", "c")],
        unused=["source", "models", "completions[].model", "completions[].critique",
                "completions[].annotations"],
    ),
    "hh-rlhf": Case(
        "hh_rlhf",
        [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why is it cold?\n\n"
                    "Assistant: It is winter.",
          "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why is it cold?\n\n"
                      "Assistant: No."},
         {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
          "rejected": "\n\nHuman: Ho\n\nAssistant: Hello."}],
        [(TALK, "It is winter.", "No.")],
        left_out=1,
    ),
    "hh-rlhf with its prompt": Case(
        "chosen_rejected",
        [{"prompt": "\n\nHuman: Why is it cold?\n\nAssistant:",
          "chosen": "\n\nHuman: Why is it cold?\n\nAssistant: It is winter.",
          "rejected": "\n\nHuman: Why is it cold?\n\nAssistant: No."}],
        [BEST],
    ),
    "shp": Case(
        "shp",
        [{"post_id": "p1", "domain": "cooking", "history": "Can I freeze bread?",
          "human_ref_A": "No idea.", "human_ref_B": "Yes, sliced.", "labels": 0, "score_A": 3,
          "score_B": 9, "score_ratio": 3.0},
         {"history": "Can I freeze tea?", "human_ref_A": "Sure.", "human_ref_B": "Never.",
          "labels": 1},
         {"history": "Can I freeze oil?", "human_ref_A": "Sure.", "human_ref_B": "Never.",
          "score_A": 2, "score_B": 2}],
        [("Can I freeze bread?", "Yes, sliced.", "No idea."),
         ("Can I freeze tea?", "Sure.", "Never.")],
        unused=["post_id", "domain", "score_A", "score_B", "score_ratio"],
        ties=1,
    ),
    "helpsteer2": Case(
        "helpsteer2",
        [{"prompt": prompt, "response": text, "helpfulness": score, "correctness": 3,
          "coherence": 4, "complexity": 1, "verbosity": 1}
         for prompt, text, score in (
             ("Say a", "b", 1), ("Say a", "a", 4), ("Say b", "b", 2), ("Say b", "bb", 2),
             ("Say c", "c", 3), ("Say d", "d", 3), ("Say d", "e", 0), ("Say d", "f", 0))],
        [("Say a", "a", "b", 3.0), ("Say d", "d", "e", 3.0)],
        ties=1,
        left_out=2,
    ),
    "helpsteer2 preferences": Case(
        "helpsteer_preference",
        [{"split": "train", "prompt": "Say a", "response_1": "b", "response_2": "a",
          "preference_strength": 2, "preference_statement": "2 is right."},
         {"prompt": "Say a", "response_1": "a", "response_2": "c", "preference_strength": -3},
         {"prompt": "Say a", "response_1": "a", "response_2": "A", "preference_strength": 0}],
        [("Say a", "a", "b", 2.0), ("Say a", "a", "c", 3.0)],
        unused=["split", "preference_statement"],
        ties=1,
    ),
    "helpsteer3": Case(
        "helpsteer_preference",
        [{"domain": "general", "context": [user("Hi"), assistant("Hello."), WHY],
          "response1": "No.", "response2": "It is winter.", "overall_preference": 1}],
        [(TALK, "It is winter.", "No.", 1.0)],
        unused=["domain"],
    ),
    "sharegpt": Case(
        "sharegpt",
        [{"conversations": [human("Hi"), gpt("Hello."), human("Why is it cold?"),
                            gpt("It is winter.")]},
         {"system": "Be brief.", "conversations": [human("Why is it cold?"),
                                                   gpt("It is winter.")], "id": "7"}],
        learned=[(TALK, "It is winter."), (TOLD, "It is winter.")],
        unused=["id"],
    ),
    "sharegpt preferences": Case(
        "sharegpt",
        [{"conversations": [human("Why is it cold?")], "chosen": gpt("It is winter."),
          "rejected": gpt("No.")},
         {"conversations": [{"from": "system", "value": "Be brief."}, human("Why is it cold?")],
          "chosen": [gpt("It is winter.")], "rejected": [gpt("No.")]}],
        [BEST, (TOLD, "It is winter.", "No.")],
    ),
    "alpaca": Case(
        "alpaca",
        [{"instruction": "Add.", "input": "1 2", "output": "3"},
         {"instruction": "Add 1 and 2.", "input": "", "output": "3", "text": "Below is a task."},
         {"instruction": "Why is it cold?", "output": "It is winter.", "system": "Be brief.",
          "history": []},
         {"instruction": "Why is it cold?", "output": "It is winter.",
          "history": [["Hi", "Hello."]]}],
        learned=[("Add.\n\n1 2", "3"), ("Add 1 and 2.", "3"),
                 ("Be brief.\n\nWhy is it cold?", "It is winter."), (TALK, "It is winter.")],
        unused=["text"],
    ),
    "alpaca preferences": Case(
        "chosen_rejected",
        [{"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "12"}],
        [("Add.\n\n1 2", "3", "12")],
    ),
    "orca pairs": Case(
        "orca_pairs",
        [{"system": "Be brief.", "question": "Why is it cold?", "chosen": "It is winter.",
          "rejected": "No."},
         {"system": "", "question": "Why?", "chosen": "So.", "rejected": "No."}],
        [("Be brief.\n\nWhy is it cold?", "It is winter.", "No."), ("Why?", "So.", "No.")],
    ),
    "tl;dr comparisons": Case(
        "tldr_comparisons",
        [{"info": {"id": "t3", "post": "It ran.", "title": "Cat", "subreddit": "pets"},
          "summaries": [{"text": " A dog.", "policy": "p1"}, {"text": " A cat.", "policy": "p2"}],
          "choice": 1, "worker": "w1", "split": "train"},
         {"info": {"article": "News came.", "title": "Late", "site": "wire"},
          "summaries": [{"text": "News."}, {"text": "None."}], "choice": 0}],
        [("SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: It ran.\n\nTL;DR:", " A cat.", " A dog."),
         ("News came.", "News.", "None.")],
        unused=["info.id", "summaries[].policy", "worker", "split", "info.title", "info.site"],
    ),
    "tl;dr posts": Case(
        "prompt_completion",
        [{"prompt": "POST: It ran.\n\nTL;DR:", "completion": " A cat ran."}],
        learned=[("POST: It ran.\n\nTL;DR:", " A cat ran.")],
    ),
    "tl;dr posts with labels": Case(
        "prompt_label",
        [{"prompt": "POST: It ran.\n\nTL;DR:", "label": "A cat ran."}],
        learned=[("POST: It ran.\n\nTL;DR:", "A cat ran.")],
    ),
    "completions of conversations": Case(
        "prompt_completion",
        [{"prompt": [WHY], "completion": [GOOD]},
         {"messages": [SYSTEM, WHY], "completion": "It is winter."},
         {"prompt": "Why is it cold?", "completion": GOOD}],
        learned=[(ASKED, "It is winter."), (TOLD, "It is winter."),
                 ("Why is it cold?", "It is winter.")],
    ),
    "messages": Case(
        "conversation",
        [{"messages": [WHY, GOOD]},
         {"messages": [user("Hi"), assistant("Hello."), WHY, {**GOOD, "weight": 1}]},
         {"messages": [human("Why is it cold?"), gpt("It is winter.")]}],
        learned=[(ASKED, "It is winter."), (TALK, "It is winter."), (ASKED, "It is winter.")],
        unused=["messages[].weight"],
    ),
    "prompts as conversations": Case("conversation", [{"prompt": [WHY], "id": 3}], unused=["id"]),
    "responses with scores": Case(
        "scored_responses",
        [{"prompt": "Say a", "responses": ["x", "a", "b"], "scores": [0, 2, 1]},
         {"question": "Say b", "completions": ["x", "b"], "ratings": [1.5, 1.5]}],
        [("Say a", "a", "b", "x")],
        ties=1,
    ),
    "responses with ranks": Case(
        "scored_responses",
        [{"prompt": [WHY], "responses": ["No.", "It is winter."], "rank": [2, 1]}],
        [BEST],
    ),
    "candidates with scores": Case(
        "scored_pair",
        [{"input_text": "Say a", "candidate_0": "b", "candidate_1": "a",
          "candidate_0_score": 0.25, "candidate_1_score": 0.75},
         {"prompt": "Say a", "candidate_0": "b", "candidate_1": "a", "candidate_0_score": "1.0",
          "candidate_1_score": "1"}],
        [("Say a", "a", "b")],
        ties=1,
    ),
    "safe rlhf": Case(
        "safe_rlhf",
        [{"prompt": "Say a", "response_0": "a", "response_1": "b", "better_response_id": 0,
          "safer_response_id": 1, "is_response_0_safe": True},
         {"prompt": "Say b", "response_0": "a", "response_1": "b", "better_response_id": 1}],
        [("Say a", "a", "b"), ("Say b", "b", "a")],
        unused=["safer_response_id", "is_response_0_safe"],
    ),
    "webgpt": Case(
        "webgpt",
        [{"question": {"full_text": "Say a", "id": "q1"}, "answer_0": "b", "answer_1": "a",
          "score_0": -0.5, "score_1": 0.5, "quotes_0": {"title": ["t"], "extract": ["e"]}},
         {"question": "Say b", "answer_0": "b", "answer_1": "a", "score_0": 1, "score_1": -1},
         {"question": "Say c", "answer_0": "b", "answer_1": "a", "score_0": 0, "score_1": 0}],
        [("Say a", "a", "b"), ("Say b", "b", "a")],
        unused=["question.id", "quotes_0"],
        ties=1,
    ),
    "arena": Case(
        "arena",
        [{"conversation_a": [WHY, GOOD], "conversation_b": [WHY, BAD], "winner": "model_a",
          "model_a": "m1"},
         {"conversation_a": [WHY, BAD], "conversation_b": [WHY, GOOD], "winner": "model_b"},
         {"conversation_a": [WHY, BAD], "conversation_b": [WHY, GOOD], "winner": "tie"},
         {"conversation_a": [WHY, BAD], "conversation_b": [WHY, GOOD],
          "winner": "tie (bothbad)"},
         {"conversation_a": [WHY, GOOD, WHY, GOOD], "conversation_b": [WHY, BAD, WHY, BAD],
          "winner": "model_a"}],
        [BEST, BEST],
        unused=["model_a"],
        ties=2,
        left_out=1,
    ),
    "arena as a table": Case(
        "arena",
        [{"prompt": '["Say a"]', "response_a": '["a"]', "response_b": '["b"]',
          "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
         {"prompt": "[Say b]", "response_a": '["a"]', "response_b": "b",
          "winner_model_a": "0", "winner_model_b": "1", "winner_tie": "0"},
         {"prompt": "Say c", "response_a": "c", "response_b": "d",
          "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
         {"prompt": '["Hi", "Why is it cold?"]', "response_a": '["Hello.", "No."]',
          "response_b": '["Hello.", "It is winter."]',
          "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
         {"prompt": '["Hi", "Why?"]', "response_a": '["a", "No."]', "response_b": '["b", "So."]',
          "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}],
        [("Say a", "a", "b"), ("[Say b]", "b", '["a"]'), (TALK, "It is winter.", "No.")],
        ties=1,
        left_out=1,
    ),
    "nectar": Case(
        "nectar",
        [{"prompt": "\n\nHuman: Why is it cold?\n\nAssistant: ", "turns": 1,
          "answers": [{"answer": "No.", "rank": 2.0}, {"answer": "It is winter.", "rank": 1.0}]},
         {"prompt": "Say a", "answers": [
             {"answer": "b", "rank": 2, "model": "m1"}, {"answer": "a", "rank": 1},
             {"answer": "c", "rank": 3}]}],
        [BEST, ("Say a", "a", "b", "c")],
        unused=["turns", "answers[].model"],
    ),
    "questions and answers": Case(
        "question_answer",
        [{"instruction": "Say it", "context": "a b", "response": "a", "category": "qa"},
         {"instruction": "Say it", "context": "", "response": "a"},
         {"question": "1 + 1?", "answer": "2"},
         {"system_prompt": "Be brief.", "question": "1 + 2?", "response": "3"},
         {"query": "1 + 3?", "response": "4"},
         {"problem": "1 + 4?", "solution": "5"}],
        learned=[("a b\n\nSay it", "a"), ("Say it", "a"), ("1 + 1?", "2"),
                 ("Be brief.\n\n1 + 2?", "3"), ("1 + 3?", "4"), ("1 + 4?", "5")],
        unused=["category"],
    ),
    "messages that repeat the prompt": Case(
        "conversation",
        [{"prompt": "Why is it cold?", "prompt_id": "p1", "messages": [WHY, GOOD]},
         {"prompt": "Why is it cold?", "messages": [SYSTEM, WHY, GOOD]},
         {"prompt": "Hi", "messages": [user("Hi"), assistant("Hello."), WHY, GOOD]},
         {"prompt": [WHY], "messages": [WHY, GOOD]}],
        learned=[(ASKED, "It is winter."), (TOLD, "It is winter."), (TALK, "It is winter."),
                 (ASKED, "It is winter.")],
        unused=["prompt_id"],
    ),
    "conversations beside an instruction": Case(
        "sharegpt",
        [{"instruction": "Why is it cold?", "response": "It is winter.",
          "conversations": [human("Why is it cold?"), gpt("It is winter.")]}],
        learned=[(ASKED, "It is winter.")],
        unused=["instruction", "response"],
    ),
    "pairs with a system prompt": Case(
        "chosen_rejected",
        [{"system_prompt": "Be brief.", "prompt": "Say a", "chosen": "a", "rejected": "b"}],
        [("Be brief.\n\nSay a", "a", "b")],
    ),
}  # fmt: skip
