"""A chat template, which comes with a model, cannot take the program's memory or time."""

from __future__ import annotations

import time

import pytest

from hotplug.core.errors import RequestError
from hotplug.core.text.template import render

MESSAGES = [{"role": "user", "content": "hello " * 10}]
DOUBLING = "{% set n = namespace(s='abcdefgh') %}{% for i in range(60) %}{% set n.s = "
GREEDY = [
    "{{ 'a' * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ [1] * 10**9 }}", "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}", "{{ '{:999999999999}'.format(1) }}",
    "{{ '{a:999999999999}'.format_map({'a': 1}) }}", "{% set f = 'x{:999999999999}'.format %}{{ f(1) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ ('{0:9999}' * 1000000).format(1) }}", "{{ ('%9999d' * 100000) % messages }}",
    "{{ '{0:{1}}'.format(1, 999999) }}",
    "{{ '{0:{w}}'.format(1, w=999999) }}", "{{ ('{0}' * 1000000).format('a' * 10000) }}",
    "{{ ('{a}' * 1000000).format(a='a' * 10000) }}", "{{ ('%(a)s' * 1000000) % {'a': 'a' * 10000} }}",
    "{{ ('%(a)s' * 1000000)|format(a='a' * 10000) }}", "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'|center(10**9) }}", "{{ 'a'|indent(10**9) }}", "{{ lipsum(n=10000) }}",
    "{{ 2 ** (10**9) }}", "{{ (10**1000) ** 1000 }}",
    DOUBLING + "n.s ~ n.s %}{% endfor %}", DOUBLING + "n.s + n.s %}{% endfor %}",
    DOUBLING + "n.s.replace('a', n.s) %}{% endfor %}", DOUBLING + "n.s|replace('a', n.s) %}{% endfor %}",
    DOUBLING + "n.s.join(range(9)|map('string')|list) %}{% endfor %}", DOUBLING + "(n.s, n.s)|join(n.s) %}{% endfor %}",
    "{% for i in range(90000) %}{% for j in range(90000) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("template", GREEDY)
def test_a_template_that_makes_much_of_little_is_refused_soon(template: str) -> None:
    begin = time.process_time()
    with pytest.raises(RequestError):
        render(template, MESSAGES, {})
    assert time.process_time() - begin < 2.0


def test_what_templates_do_is_still_done() -> None:
    template = (
        "{{ '-' * 3 }}{{ 'a' + 'b' ~ 1 ~ none }}{{ '%s-%5d' % ('x', 3) }}{{ '{:>4}'.format('y') }}"
        "{{ messages[0].content.replace('hello', 'hi')|trim|replace('hi ', '')|indent(2) }}{{ ['a', 'b']|join(', ') }}"
        '{{ \'{{"n": {}, "at": {:>3}}} 20240131\'.format(1, 2) }}'
        "{{ [1] + [2] }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 'ab'|center(6) }}{{ '%s!'|format('z') }}"
    )
    assert (
        render(template, MESSAGES, {}) == '---ab1Nonex-    3   yhia, b{"n": 1, "at":   2} 20240131[1, 2]10243  ab  z!'
    )
