"""Conversations: the template's variables, the end of a turn, and one conversation as one text.

The reference is `apply_chat_template` of transformers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from support.chats import (
    BRACKETS,
    CHATML,
    DATED,
    NO_SYSTEM,
    TEMPLATES,
    THINKING,
    chat_tokenizer,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.data.chat_check import check_conversations
from rlhf.data.prompt_codec import PromptCodec, PromptLayout
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts
from rlhf.data.schema import Message, PromptFields
from rlhf.data.templates import template_date
from rlhf.data.turn_ends import turn_end_id, turn_end_text, with_recorded_turn_end, with_turn_end
from rlhf.errors import InputError

CHAT = [
    {"role": "user", "content": "is it a cat?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthe dog ran"},
    {"role": "user", "content": "the mat?"},
]
FIELDS = PromptFields(None, tuple(Message(t["role"], t["content"]) for t in CHAT), None)
ENDS = {
    "chatml": "<|im_end|>",
    "thinking": "<|im_end|>",
    "dated": "<|eot|>",
    "no system": "<end_of_turn>",
    "brackets": "<|end|>",
}
# What an answer must begin with to be a conversation's, and options likewise.
FITTING: dict[str, tuple[str, dict[str, Any]]] = {
    "chatml": ("", {}),
    "thinking": ("", {"enable_thinking": False}),
    "dated": ("", {"date_string": "1 May 2025"}),
    "no system": ("", {}),
    "brackets": (" ", {}),
}


def make_codec(tokenizer: PreTrainedTokenizerFast) -> PromptCodec:
    eos = tokenizer.eos_token_id
    layout = with_turn_end(PromptLayout((), (), True, eos, frozenset({eos})), tokenizer)
    return PromptCodec(tokenizer, layout, 512, 64)


def transformers_ids(tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> list[int]:
    options = {"date_string": template_date("%d %b %Y")} | options
    ids = tokenizer.apply_chat_template(turns, return_dict=False, **options)
    return [int(id_) for id_ in ids]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_prompt_and_response_are_the_conversation_of_transformers(kind: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[kind])
    codec = make_codec(tokenizer)
    before, options = FITTING[kind]
    prompt = PromptRenderer.for_tokenizer(tokenizer, None, options).render(FIELDS)
    asked = transformers_ids(tokenizer, CHAT, add_generation_prompt=True, **options)
    assert codec.prompt_ids(prompt) == asked
    [response] = codec.response_rows([f"{before}Yes, it is."], prompts=[prompt])
    answered = [*CHAT, {"role": "assistant", "content": "Yes, it is."}]
    whole = transformers_ids(tokenizer, answered, **options)
    after = tokenizer.decode(whole[len(asked) + len(response) :])
    assert [*asked, *response] == whole[: len(asked) + len(response)]
    assert after in ("", "\n")
    assert response[-1] == tokenizer.convert_tokens_to_ids(ENDS[kind])


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_response_ends_as_its_prompt_was_written(kind: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[kind])
    codec = make_codec(tokenizer)
    end, eos = tokenizer.convert_tokens_to_ids(ENDS[kind]), tokenizer.eos_token_id
    renderer = PromptRenderer.for_tokenizer(tokenizer, "Help.")
    text, chat = (renderer.render(one) for one in (PromptFields("the cat", (), None), FIELDS))
    rows = codec.response_rows(["the", "the", "the"], [True, True, False], [text, chat, chat])
    bare = rows[2]
    assert rows == [[*bare, eos], [*bare, end], bare]
    assert codec.response_rows(["the"]) == [[*bare, eos]]
    assert codec.layout.eos_ids == {eos, end}
    for id_ in (eos, end):  # whichever the policy sampled
        assert codec.decode([*bare, id_, *bare]) == "the"
    short = PromptCodec(tokenizer, codec.layout, 512, len(bare))
    assert short.response_rows(["the"], prompts=[chat]) == [bare]


USER = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        None,
        USER + "{{ '<|assistant|>' }}",  # what follows an answer is the next turn
        USER,
        CHATML.replace("<|im_end|>", "</turn>"),  # several tokens
        CHATML.replace("<|im_end|>", " .<|im_end|>"),
        "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        + CHATML,
        "{% for m in messages %}{{ m['content'] | length }}<|im_end|>{% endfor %}",
        "{% for",
    ],
)
def test_without_one_token_at_the_end_a_turn_ends_in_eos(template: str | None) -> None:
    tokenizer = chat_tokenizer(template)
    assert turn_end_id(tokenizer) is None
    codec = make_codec(tokenizer)
    assert codec.layout.eos_ids == {tokenizer.eos_token_id}
    assert codec.layout.turn_end_id is None


def test_a_record_says_how_turns_ended() -> None:
    tokenizer = chat_tokenizer(CHATML)
    layout = make_codec(tokenizer).layout
    assert turn_end_text(layout, tokenizer) == "<|im_end|>"
    tokenizer.chat_template = None
    bare = make_codec(tokenizer).layout
    assert turn_end_text(bare, tokenizer) == ""
    again = with_recorded_turn_end(bare, tokenizer, "<|im_end|>")
    assert again.turn_end_id == layout.turn_end_id
    assert with_recorded_turn_end(layout, tokenizer, "").turn_end_id is None
    with pytest.raises(InputError, match="no token '<eot>'"):
        with_recorded_turn_end(layout, tokenizer, "<eot>")


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_options_reach_the_template(options: dict[str, Any]) -> None:
    tokenizer = chat_tokenizer(THINKING)
    renderer = PromptRenderer.for_tokenizer(tokenizer, None, options)
    expected = tokenizer.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True, **options
    )
    assert renderer.render(FIELDS).text == expected
    plain = PromptRenderer.for_tokenizer(tokenizer)
    assert (renderer.identity == plain.identity) == (not options)


@pytest.mark.parametrize(
    ("template", "name", "said"),
    [
        (THINKING, "enable_thinkin", "it reads enable_thinking; did you mean `enable_thinking`?"),
        (THINKING, "messages", "does not read it, it reads enable_thinking"),
        (DATED, "bos_token", "it reads date_string"),
        (CHATML, "enable_thinking", "the chat template reads no options"),
        (None, "enable_thinking", "there is no chat template"),
        ("{% if depth is not defined %}{% set depth = 1 %}{% endif %}{{ range(depth) }}", "x",
         "it reads depth"),
    ],
)  # fmt: skip
def test_an_option_that_no_template_reads_is_refused(
    template: str | None, name: str, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        PromptRenderer.for_tokenizer(chat_tokenizer(template), None, {name: False})
    [problem] = caught.value.problems
    assert problem.startswith(f"chat_template_options.{name}: ")
    assert said in problem


def test_named_templates_and_a_template_in_its_own_file(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": DATED}]
    path.write_text(json.dumps(config | {"chat_template": named}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert PromptRenderer.for_tokenizer(loaded).chat_template == DATED
    assert turn_end_id(loaded) == tokenizer.convert_tokens_to_ids("<|eot|>")
    loaded.save_pretrained(tmp_path / "again")  # as files
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    identities = {PromptRenderer.for_tokenizer(one).identity for one in (loaded, again)}
    assert len(identities) == 1
    path.write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(NO_SYSTEM)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert PromptRenderer.for_tokenizer(loaded).chat_template == NO_SYSTEM
    assert turn_end_id(loaded) == tokenizer.convert_tokens_to_ids("<end_of_turn>")


def checked(tmp_path: Path, template: str, rows: list[dict[str, Any]], **options: Any) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = chat_tokenizer(template)
    renderer = PromptRenderer.for_tokenizer(tokenizer, "Help.", options)
    load = load_preferences if "chosen" in rows[0] else load_prompts
    data: Any = load(str(path), renderer=renderer)
    lines = check_conversations(data, make_codec(tokenizer), renderer, "dataset")
    return [line.replace(str(tmp_path), "") for line in lines]


def rows_with(answer: str) -> list[dict[str, Any]]:
    return [{"input_text": "the cat", "output_text": "the"}] + [
        {"messages": CHAT, "output_text": answer}
    ] * 12


@pytest.mark.parametrize("kind", TEMPLATES)
def test_fitting_rows_give_no_warning(kind: str, tmp_path: Path) -> None:
    before, options = FITTING[kind]
    rows = rows_with(f"{before}the cat sat")
    assert checked(tmp_path, TEMPLATES[kind], rows, **options) == []
    pairs = [{"messages": CHAT, "chosen": f"{before}the", "rejected": "a"}]
    assert checked(tmp_path, TEMPLATES[kind], pairs, **options) == []
    assert checked(tmp_path, TEMPLATES[kind], rows[:1], **options) == []


def test_thoughts_that_the_template_adds_are_shown(tmp_path: Path) -> None:
    head, ours, whole, meaning = checked(tmp_path, THINKING, rows_with("the cat sat"))
    assert head.startswith("dataset: warning: in 8 of the first 8 conversations, ")
    assert head.endswith("at /rows.jsonl:2:")
    assert ours == (
        r"  prompt, then answer: … '<|im_start|>' 'assistant' '\n' 'the' ' cat' ' sat' '<|im_end|>'"
    )
    assert whole.startswith(r"  whole conversation:  … '<|im_start|>' 'assistant' '\n' '<")
    assert r"puts '<think>\n\n</think>\n\n' before an answer, where the row has ''" in meaning
    assert "chat_template_options can set enable_thinking" in meaning


def test_a_missing_space_is_shown(tmp_path: Path) -> None:
    _, ours, whole, meaning = checked(tmp_path, BRACKETS, rows_with("the cat"))
    assert ours.split(" … ")[1].endswith("'the' ' cat' '<|end|>'")
    assert whole.split(" … ")[1].endswith("' the' ' cat' '<|end|>'")
    assert "puts ' ' before an answer, where the row has ''" in meaning


def test_text_that_the_template_strips_is_shown(tmp_path: Path) -> None:
    *_, meaning = checked(tmp_path, DATED, rows_with(" the cat"))
    assert "puts '' before an answer, where the row has ' '" in meaning
    *_, meaning = checked(tmp_path, DATED, rows_with("the cat\n"))
    assert r"the template leaves out '\n' at the end of the answer" in meaning


def test_tokens_that_reach_across_are_shown(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '.' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    rows = [{"messages": CHAT[:1], "output_text": "the"}]
    _, ours, whole, meaning = checked(tmp_path, template, rows)
    assert ours.split(" … ")[1] == "'.' 'assistant' ':' ' ' 'the' '<|end|>'"
    assert whole.split(" … ")[1] == "'.' 'assistant' ':' ' the' '.'"
    assert "tokens reach across the beginning" in meaning


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # The first answer loses its thoughts only once there is another one.
        ("{% for m in messages %}[{{ m['content'].split('</think>')[-1] if messages | "
         "selectattr('role', 'equalto', 'assistant') | list | length > 1 else m['content'] }}]"
         "{% endfor %}", "writes the turns before an answer differently"),
        ("{% for m in messages %}[{{ m['content'] | upper if loop.last else m['content'] }}]"
         "{% endfor %}", "differently"),
        ("{% for m in messages %}[{{ m['content'] if m['role'] == 'user' else '?' }}]{% endfor %}",
         "the template rewrites the answer"),
    ],
)  # fmt: skip
def test_other_differences_are_named(template: str, said: str, tmp_path: Path) -> None:
    *_, meaning = checked(tmp_path, template, [{"messages": CHAT, "output_text": "the"}])
    assert said in meaning


def test_an_encoder_reads_the_prompt_alone() -> None:
    """As with T5, where prompt and response are two texts."""
    tokenizer = chat_tokenizer(THINKING)
    layout = PromptLayout((), (1,), False, 1, frozenset({1}))
    codec, renderer = PromptCodec(tokenizer, layout, 64, 64), PromptRenderer(None, THINKING)
    assert check_conversations([], codec, renderer, "dataset") == []  # type: ignore[arg-type]
