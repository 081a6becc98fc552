"""Chat templates: the model's own is rendered as transformers would; a hostile one does nothing, and quickly."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from codesign.errors import InputError
from codesign.serve import bounds
from codesign.serve.chat_template import ChatTemplate, TemplateFailed, read_template

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
CHATML = (
    "{%- for message in messages %}\n{{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + "
    "'<|im_end|>\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
)
# Each tries to write MARKER, or to use up the machine.
HOSTILE = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subclass_walk": "{% for c in ().__class__.__base__.__subclasses__() %}{% if 'Popen' in c.__name__ %}"
    "{{ c(['touch', 'MARKER']) }}{% endif %}{% endfor %}",
    "lipsum_globals": "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "attr_filter": "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "format_string": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "own_globals": "{{ raise_exception.__globals__['os'].system('touch MARKER') }}",
    "generator_frame": "{{ (messages|map('upper')).gi_frame.f_builtins['open']('MARKER', 'w') }}",
    "include": "{% include '/etc/passwd' %}",
    "nested_range": "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
    "string_doubling": "{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}{{ ns.s }}",
    "constant_folding": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "large_repeat": "{{ ('x' * 100000000)|length }}{{ 'y' * 400000000 }}",
    "endless_output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "mutation": "{{ messages.append(1) }}{{ messages.clear() }}",
}
# These are stopped by the sandbox giving nothing instead of what was asked for, so an answer may come back.
MAY_ANSWER = {"attr_filter", "format_string", "subclass_walk"}


@pytest.fixture
def chatml() -> Iterator[ChatTemplate]:
    template = ChatTemplate(CHATML, {"bos_token": "<s>"})
    yield template
    template.close()


def test_the_bundled_model_has_a_template() -> None:
    from codesign.bundled import target_path

    found = read_template(target_path())

    assert found is not None
    template = ChatTemplate(*found)
    assert template.render(MESSAGES) == "hi\nho\n"
    template.close()


def test_a_chatml_template_reads_as_transformers_renders_it(chatml: ChatTemplate) -> None:
    assert chatml.render(MESSAGES) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n[INST] {{ m.content }} [/INST]\n  "
        "{% else %}\n{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n  {% endif %}\n{% endfor %}",
        "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}: "
        "{{ m | tojson }}\n{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    ],
    ids=["chatml", "instruct", "tojson"],
)
def test_transformers_renders_the_same(source: str) -> None:
    rendering = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    messages = [*MESSAGES, {"role": "user", "content": '\u00e9 <b> "quoted"\n'}]
    template = ChatTemplate(source, special)

    (expected,), _ = rendering.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, **special
    )

    assert template.render(messages) == expected
    template.close()


def test_special_tokens_dates_json_and_loops_are_there() -> None:
    source = (
        "{{ bos_token }}{{ strftime_now('%Y')|length }}{{ {'a': '<\u00e9>'}|tojson }}"
        "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})

    assert template.render(MESSAGES) == '<s>4{"a": "<\u00e9>"}hi'
    template.close()


def test_what_a_template_raises_is_said_and_the_process_goes_on() -> None:
    template = ChatTemplate("{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}ok", {})
    assert template.render(MESSAGES) == "ok"
    process = template._process

    with pytest.raises(TemplateFailed, match="user first"):
        template.render(MESSAGES[1:])

    assert template.render(MESSAGES) == "ok"
    assert template._process is process
    template.close()


def seconds(action: Callable[[], object]) -> float:
    """The quickest of up to three runs: whoever stops this process for a while says nothing about it."""
    found = float("inf")
    for _ in range(3):
        started = time.monotonic()
        action()
        found = min(found, time.monotonic() - started)
        if found < 1.5:
            break
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_does_nothing_and_is_answered_in_time(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    texts = []

    def render() -> None:
        template = ChatTemplate(HOSTILE[name].replace("MARKER", str(marker)), {})
        try:
            texts.append(template.render(MESSAGES))
        except TemplateFailed as error:
            assert len(str(error)) < 600
        finally:
            template.close()

    # The interpreter is started within it; servers have it running.
    assert seconds(render) < 2.0
    assert not marker.exists()
    assert not texts or name in MAY_ANSWER
    assert not any(word in text for text in texts for word in ("root:", "built-in", "<module", "class"))


def test_a_running_server_is_kept_waiting_less_than_two_seconds() -> None:
    template = ChatTemplate("{% if messages|length > 1 %}" + HOSTILE["nested_range"] + "{% endif %}", {})

    def render() -> None:
        template.render(MESSAGES[:1])
        with pytest.raises(TemplateFailed, match="1 s"):
            template.render(MESSAGES)

    assert seconds(render) < 2.0
    assert template.render(MESSAGES[:1]) == ""
    template.close()


def test_output_is_bounded() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    whole = "x" * bounds.TEMPLATE_OUTPUT_BYTES

    assert template.render([{"role": "user", "content": whole}]) == whole
    with pytest.raises(TemplateFailed, match="longer than"):
        template.render([{"role": "user", "content": whole + "x"}])
    template.close()


def test_the_process_inherits_no_environment_and_has_no_files() -> None:
    template = ChatTemplate("x", {})
    template.check()
    assert template._process is not None
    pid = template._process.pid

    assert Path(f"/proc/{pid}/environ").read_bytes() == b""
    assert len(os.listdir(f"/proc/{pid}/fd")) == 3
    template.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_template_that_cannot_be_compiled_says_so() -> None:
    with pytest.raises(TemplateFailed, match="TemplateSyntaxError"):
        ChatTemplate("{% for %}", {}).check()


def test_the_file_goes_before_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "from config", "bos_token": {"content": "<s>"}, "eos_token": None})
    )
    assert read_template(tmp_path) == ("from config", {"bos_token": "<s>"})

    (tmp_path / "chat_template.jinja").write_text("from file")
    assert read_template(tmp_path) == ("from file", {"bos_token": "<s>"})


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))

    assert read_template(tmp_path) == ("d", {})


def test_no_template_is_none(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None


@pytest.mark.parametrize("value", [5, "x" * (bounds.TEMPLATE_BYTES + 1), [{"name": "default", "template": 3}]])
def test_something_else_than_a_template_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))

    with pytest.raises(InputError, match="chat_template"):
        read_template(tmp_path)
