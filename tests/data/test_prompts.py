"""How instruction, context, input and conversations become the text of a prompt."""

import json

import pytest

from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import Message, PromptFields, PromptText

LLAMA_3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d')"
    " %}{%- endif %}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Knows no system turn and says so, as Gemma's does.
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') !="
    " (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<turn>' + message['role'] + '\n' + message['content'] | trim + '</turn>\n' }}{% endfor %}"
    "<turn>model\n"
)
# Passes over system turns without a word.
DEAF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '[' + message['content'] + ']' }}{% endif %}{% endfor %}"
)
BOS = {"bos_token": "<s>"}
CHAT = (Message("user", "  hi "), Message("assistant", "user"), Message("user", "bye\n"))
SYSTEM = Message("system", "Be kind.")


def parts(prompt: PromptText) -> list[str]:
    return [prompt.text[start:end] for start, end in prompt.spans]


def reserve(prompt: PromptText) -> list[str]:
    return [prompt.text[start:end] for start, end in prompt.reserve]


def chat(*messages: Message, context: str | None = None) -> PromptFields:
    return PromptFields(None, messages, context)


def test_input_text_is_never_wrapped() -> None:
    fields = PromptFields("a post [summary]: ", (), None)
    for template in (None, LLAMA_3):
        prompt = PromptRenderer("Sum it up.", template, BOS).render(fields)
        assert prompt.text == "Sum it up.\n\na post [summary]: "
        assert parts(prompt) == ["a post [summary]: "]
    assert PromptRenderer(None).render(fields).text == "a post [summary]: "
    assert PromptRenderer("").render(fields).text == "a post [summary]: "


def test_context_stands_between_instruction_and_input() -> None:
    prompt = PromptRenderer("Answer.").render(PromptFields("Why?", (), "Because."))
    assert prompt.text == "Answer.\n\nBecause.\n\nWhy?"
    assert parts(prompt) == ["Because.", "Why?"]


def test_the_plain_conversation() -> None:
    prompt = PromptRenderer("Help.").render(chat(SYSTEM, *CHAT, context="It rains."))
    assert prompt.text == (
        "Help.\n\nIt rains.\n\nBe kind.\n\nUser:   hi \n\nAssistant: user\n\nUser: bye\n\n\n"
        "Assistant:"
    )
    assert parts(prompt) == ["It rains.", "  hi ", "user", "bye\n"]
    assert reserve(prompt) == ["Be kind."]
    assert PromptRenderer().render(chat(Message("user", "hi"))).text == "User: hi\n\nAssistant:"


def test_a_template_that_trims_and_writes_bos() -> None:
    prompt = PromptRenderer("Help.", LLAMA_3, BOS).render(chat(SYSTEM, *CHAT, context="It rains."))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert prompt.text == (
        head.format("system") + "Help.\n\nIt rains.\n\nBe kind.<|eot_id|>"
        + head.format("user") + "hi<|eot_id|>"
        + head.format("assistant") + "user<|eot_id|>"
        + head.format("user") + "bye<|eot_id|>"
        + head.format("assistant")
    )  # fmt: skip
    assert parts(prompt) == ["It rains.", "hi", "user", "bye"]
    assert reserve(prompt) == ["Be kind."]


def test_spans_are_exact_where_contents_look_like_scaffolding() -> None:
    tricky = (Message("user", "user\n"), Message("assistant", "<|im_end|>"), Message("user", "us"))
    prompt = PromptRenderer(None, CHATML).render(chat(*tricky))
    assert parts(prompt) == ["user\n", "<|im_end|>", "us"]
    starts = [prompt.text[start - 5 : start] for start, _ in prompt.spans]
    assert starts == ["user\n", "tant\n", "user\n"]


@pytest.mark.parametrize("template", [STRICT, DEAF])
def test_a_template_without_system_turn_gets_it_before_the_user(template: str) -> None:
    prompt = PromptRenderer("Help.", template, BOS).render(chat(SYSTEM, *CHAT))
    assert "Help.\n\nBe kind.\n\n  hi" in prompt.text
    assert not prompt.text.startswith("<s>")
    assert [part.strip() for part in parts(prompt)] == ["hi", "user", "bye"]
    assert reserve(prompt) == ["Be kind."]


def test_a_refused_conversation_says_what_the_template_said() -> None:
    twice = chat(Message("user", "a"), Message("user", "b"))
    for renderer in (PromptRenderer(None, STRICT, BOS), PromptRenderer("Help.", STRICT, BOS)):
        with pytest.raises(ValueError, match="Roles must alternate"):
            renderer.render(twice)


def test_a_broken_template_is_an_error_of_the_row() -> None:
    with pytest.raises(ValueError, match="chat template"):
        PromptRenderer(None, "{% for %}").render(chat(*CHAT))


def test_a_template_that_rewrites_contents_still_gives_spans() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'].split('</think>')[-1] + '\n' }}"
        "{% endfor %}assistant: {% generation %}{% endgeneration %}"
    )
    turns = (Message("user", "q1"), Message("assistant", "hm</think>yes"), Message("user", "q2"))
    prompt = PromptRenderer(None, template).render(chat(*turns))
    assert prompt.text == "user: q1\nassistant: yes\nuser: q2\nassistant: "
    assert parts(prompt) == ["q1", "q2"]


def test_dates_in_templates_stand_still() -> None:
    template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0]['content'] }}"
    assert PromptRenderer(None, template).render(chat(*CHAT)).text.startswith("2024-07-26 ")


def test_identity_follows_whatever_changes_prompts() -> None:
    renderers = [
        PromptRenderer(),
        PromptRenderer("Help."),
        PromptRenderer(None, CHATML),
        PromptRenderer(None, LLAMA_3),
        PromptRenderer(None, LLAMA_3, BOS),
    ]
    assert len({renderer.identity for renderer in renderers}) == len(renderers)
    assert PromptRenderer("").identity == PromptRenderer(None).identity
    assert PromptRenderer("Help.").identity == renderers[1].identity


def test_predictions_repeat_the_raw_input() -> None:
    renderer = PromptRenderer("Help.", CHATML)
    assert renderer.raw_input(PromptFields("a post ", (), "context")) == "a post "
    raw = json.loads(renderer.raw_input(chat(SYSTEM, *CHAT)))
    assert raw[1] == {"author": "user", "content": "  hi "}
    assert len(raw) == 4
