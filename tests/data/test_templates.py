"""Chat templates that never end or fill the memory are refused; others render as ever."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf.data.templates import render

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Zähle: <b>1</b> " * 20},
    {"role": "assistant", "content": "<think>hm</think>\n\n eins "},
    {"role": "user", "content": "und?"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m.content ~ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if loop.index0 == 0 and system is defined %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.split('</think>')[-1].lstrip('\n') | trim + ' ' }}{% endif %}{% endfor %}"
)
BUSY = (
    "{% macro show(m, n=1) %}[{{ n }} {{ m.role | upper }}: {{ m.content | trim | tojson }}]"
    "{% endmacro %}{% set ns = namespace(last=none, users=[]) %}"
    "{% for m in messages if m.role != 'system' %}{% set ns.last = loop.last %}"
    "{% if m.role == 'user' %}{% set ns.users = ns.users + [m] %}{% endif %}"
    "{{ show(m, loop.index) }}{{ loop.length }}{% else %}none{% endfor %}"
    "{% for m in messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ '%s/%d' | format(m.role, loop.index) }}"
    "{{ '{}'.format(loop.revindex) }}{{ 7 // 2 ** 1 }}"
    "{% endfor %}"
    "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ ns.users | length }}"
    "{% generation %}x{% endgeneration %}{% for i in range(3) %}{{ i * 2 }}{% endfor %}"
    "{{ messages | map(attribute='role') | join(', ') }}{{ (messages | first).role in ['system'] }}"
)


@pytest.mark.parametrize("template", [CHATML, LLAMA, BUSY])
def test_templates_of_real_models_are_rendered_as_transformers_does(template: str) -> None:
    [expected], _ = render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    ours = render(template, messages=MESSAGES, add_generation_prompt=True, bos_token="<s>")
    assert ours == expected


def test_a_long_conversation_is_rendered() -> None:
    messages = [{"role": "user", "content": "x" * 5000}] * 1000
    assert len(render(CHATML, messages=messages, add_generation_prompt=True)) > 5_000_000
    assert render(BUSY, messages=messages[:300], add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}"
        "{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{{ loop([[1]]) }}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10**10 }}",
        "{{ 2 ** 99999 ** 99999 }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '%*d' % (10**10, 1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**10) }}",
        "{{ [1] * 10**10 }}",
        "{{ 'a' | indent(10**10) }}",
        "{{ 1 | tojson(indent=10**10) }}",
        "{{ [1] | batch(10**10, 1) | list }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}"
        "{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
        "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x={}) %}{% for i in range(99) %}"
        "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}"
        "{% set ns.x = [ns.x, ns.x] | join(ns.x) %}{% endfor %}",
        "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
        "{% set x = 'a' * 99999 %}{{ (x * 1000) * 99999 }}",
        "{{ lipsum(n=10**6) }}",
        "{% include 'x' %}",
        "{{ raise_exception('no') }}",
        "{{ messages.x.y.z }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_what_never_ends_or_fills_the_memory_is_refused(template: str) -> None:
    messages = [{"role": "user", "content": "x" * 10_000}]
    with pytest.raises(ValueError):  # noqa: PT011
        render(template, messages=messages, add_generation_prompt=True)
