"""The text part made from HTML: readable, and with every construct that mattered."""

from __future__ import annotations

import pytest

from engine.message import Campaign, compile_campaign, derive, template


def derived(source: str) -> str:
    tokens = derive.text_of(template.tokenise(source))
    assert tokens is not None
    return "".join(template.untokenise(token) for token in tokens)


def test_a_page_becomes_text() -> None:
    source = (
        "<html><head><title>T</title><style>a{}</style></head><body>"
        '<div style="display:none">preheader {{ hidden }}</div>'
        "<h1>Hello {{ name }}</h1><p>One   two<br>three&nbsp;&amp; four</p>"
        "<ul><li>first</li><li>second</li></ul>"
        '<p><a href="https://x.example/?a=1&amp;b=2">Buy</a> <img alt="A cat" src="x"> '
        '<a href="mailto:a@b.example">a@b.example</a> <a href="{{ unsubscribe_url }}">Leave</a></p>'
        "<!-- comment {{ name }} --></body></html>"
    )

    assert derived(source) == (
        "Hello {{ name }}\n\nOne two\nthree & four\n\n- first\n- second\n\n"
        "Buy <https://x.example/?a=1&b=2> A cat a@b.example Leave <{{ unsubscribe_url }}>\n"
    )


def test_blocks_keep_their_order_in_tables() -> None:
    """What a tree-building parser would move out of the table."""
    source = "<table>{% for row in rows %}<tr><td>{{ row.a }}</td><td>{{ row.b }}</td></tr>{% endfor %}</table>"

    assert derived(source) == "{% for row in rows %}{{ row.a }}\n{{ row.b }}\n{% endfor %}\n"


def test_a_block_inside_a_tag_goes_with_the_tag() -> None:
    assert derived('<p {% if a %}class="b"{% endif %}>x{{ n }}</p>') == "x{{ n }}\n"


@pytest.mark.parametrize(
    "source", ['<p {% if a %}title="x">a{% else %}>b{% endif %}</p>', '<p title="{% if a %}">x{% endif %}</p>']
)
def test_blocks_that_do_not_nest_with_tags(source: str) -> None:
    assert derive.text_of(template.tokenise(source)) is None
    found = compile_campaign(Campaign("x", "a@b.example", html=source, bulk=False))
    assert isinstance(found, list)
    assert "text" in [problem.path for problem in found]


def test_marks_cannot_be_forged() -> None:
    assert "{{ a }}" in derived("{{ a }}")
    assert derived("&#xE000;0&#xE001;&#xE000;99&#xE001;x").strip() == "x"
