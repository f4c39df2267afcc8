"""nanogspo/templates.py: a chat template is stopped by time and memory, and the next one runs as if nothing had been.

Run: python -m pytest tests/test_templates.py
"""

import json
import os
import sys
import time
from unittest.mock import patch

import pytest

from nanogspo import templates

DOUBLED = "{% set ns = namespace(a=[1]) %}{% for i in range(50) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
ENDLESS = {  # each would run for hours; the last four are one call into C, which no check between steps would end
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive": "{% for x in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "equal": DOUBLED + DOUBLED.replace("ns", "nt").replace("nttpace", "namespace") + "{{ ns.a == nt.a }}",
    "tojson": DOUBLED + "{{ ns.a | tojson | length }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
}
HUGE = [
    "{{ 'x' * 10 ** 10 }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ ('x' * 10 ** 4).replace('x', 'x' * 10 ** 6) }}",
    "{{ messages | tojson(indent=10 ** 10) }}",
    "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "{{ range(9) | batch(10 ** 9, 'x') | list | length }}",
    "{% set ns = namespace(a=['x']) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "{% for x in range(99999) %}{{ 'x' * 10 ** 7 }}{% endfor %}",
]
VARIABLES = json.dumps({"messages": [{"role": "user", "content": "hi"}]})


def refusal(source, seconds=templates.SECONDS):
    """The one line that a hostile template ends in; the template after it renders, in the time that all have."""
    with patch.object(templates, "SECONDS", seconds), pytest.raises(ValueError) as error:
        templates.render(source, VARIABLES)
    assert "\n" not in str(error.value) and len(str(error.value)) < 320
    assert templates.render("{{ messages[0].content }}", VARIABLES) == "hi"
    return str(error.value)


@pytest.mark.parametrize("name", ENDLESS)
def test_time_is_limited(name):
    templates.render("", "{}")  # started
    began = time.monotonic()
    # doubled lists take memory as fast as time: whichever runs out first
    assert refusal(ENDLESS[name], seconds=0.3).startswith("it took more than ")
    assert time.monotonic() - began < 20  # a start and a stop of Python on a busy machine


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces RLIMIT_AS")
def test_memory_is_limited():
    import resource

    templates.render("", "{}")
    _, process = templates._renderer
    assert resource.prlimit(process.pid, resource.RLIMIT_AS)[0] == templates.BYTES
    for source in HUGE:
        assert "of memory" in refusal(source, seconds=60), source  # a busy machine must not run out of time first


def test_output_is_limited():
    longer = templates.CHARACTERS + 1
    assert refusal(f"{{{{ 'x' * {longer} }}}}") == f"it printed {longer} characters"


def test_errors_are_one_line_and_say_their_type():
    assert refusal("{{ raise_exception('no\nsystem turn') }}") == "no system turn"
    assert refusal("{% for x in").startswith("TemplateSyntaxError: ")
    assert refusal("{{ messages.append(1) }}").startswith("SecurityError: ")
    assert refusal("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").startswith("RecursionError: ")
    assert refusal("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}").startswith("RecursionError: ")


def test_one_renderer_serves_until_it_ends(monkeypatch):
    """Longer than a rendering may take, one thread at a time, and replaced when somebody kills it."""
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    templates.render("", "{}")
    _, first = templates._renderer
    time.sleep(0.4)
    assert templates.render("{{ x }}", '{"x": "\\ud83d é"}') == "\ud83d é"  # half a character goes through as it came
    assert templates._renderer[1] is first
    first.kill()
    first.wait()
    ask, locked = templates._ask, []
    monkeypatch.setattr(templates, "_ask", lambda request: (locked.append(templates._lock.locked()), ask(request))[1])
    assert templates.render("again", "{}") == "again" and locked == [True]
    if hasattr(os, "getsid"):  # the terminal's Ctrl-C does not reach it
        assert os.getsid(templates._renderer[1].pid) != os.getsid(0)


def test_an_interrupted_rendering_leaves_no_answer_behind():
    class Interrupted:
        def __init__(self, pipe):
            self.pipe, self.close, self.answers = pipe, pipe.close, 0

        def readline(self):
            self.answers += 1
            if self.answers == 1:
                raise KeyboardInterrupt
            return self.pipe.readline()

    templates.render("", "{}")
    _, process = templates._renderer
    process.stdout = Interrupted(process.stdout)
    with pytest.raises(KeyboardInterrupt):
        templates.render("stale", "{}")
    assert templates.render("fresh", "{}") == "fresh"
