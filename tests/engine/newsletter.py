"""A newsletter of the size people send, to measure with and test on: 34 kB on the wire, 25 links, 51 slots, Outlook
comments. Fifty-one with tracking on: 25 links, 25 fields and expressions, one pixel (and six boundaries)."""

from __future__ import annotations

from engine.message import Attachment, Campaign

FIELDS = frozenset({"first_name", "city", "points", "code", "vip"})

TEXT = """Dear {{ first_name }},

eleven offers for {{ city }}, and you have {{ points }} points with the code {{ code }}.
{{ first_name }}, come to {{ city }} before the end of the week.
https://shop.example/offers?code={{ code }}

{{ postal_address }}
Unsubscribe: {{ unsubscribe_url }}
Preferences: {{ preferences_url }}
Privacy: {{ notice_url }}
"""
_STYLE = "padding:12px 24px;font-family:Helvetica,Arial,sans-serif;font-size:16px;line-height:24px;color:#333333"


def page() -> str:
    """The HTML source."""
    rows = [
        f'<tr><td style="{_STYLE}"><h2 style="margin:0">Offer {number} for {{{{ first_name }}}}</h2>'
        f"<p>{'A sentence about the things on offer, as long as such sentences are. ' * 27}"
        "Only in our shops and only until the end of the week.</p>"
        f'<!--[if mso]><v:roundrect href="https://shop.example/offer/{number}?utm_source=news&amp;n={number}" '
        'arcsize="10%" fillcolor="#d62828"><center>Buy</center></v:roundrect><![endif]-->'
        f'<!--[if !mso]><!--><a href="https://shop.example/offer/{number}?utm_source=news&amp;n={number}" '
        f'style="background:#d62828;color:#ffffff">Buy now</a><!--<![endif]--></td></tr>\n'
        for number in range(11)
    ]
    return (
        '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" '
        '"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">\n'
        '<html xmlns:v="urn:schemas-microsoft-com:vml"><head><meta charset="utf-8"><title>News</title>'
        "<style>@media (max-width:600px){.col{width:100%!important}}</style></head>\n"
        '<body style="margin:0"><p>Dear {{ first_name|title }}, you have {{ points }} points.</p>\n'
        '<table role="presentation" width="100%">\n' + "".join(rows) + "</table>\n"
        '<p><a href="https://shop.example/terms">Terms</a> <a href="https://shop.example/blog">Blog</a> '
        '<a href="https://shop.example/">Shop</a> code {{ code }}</p>\n'
        '<p>{{ postal_address }} <a href="{{ unsubscribe_url }}">Unsubscribe</a> '
        '<a href="{{ preferences_url }}">Preferences</a> <a href="{{ notice_url }}">Privacy</a></p>\n'
        "</body></html>\n"
    )


def campaign(*attachments: Attachment) -> Campaign:
    return Campaign(
        subject="{{ first_name }}, eleven offers for {{ city }}",
        from_address="news@shop.example",
        from_name="Shop of Examples",
        reply_to="hello@shop.example",
        html=page(),
        text=TEXT,
        attachments=attachments,
        fields=FIELDS,
        list_id="weekly.shop.example",
        list_label="Weekly",
        feedback_id=("1", "shop", "campaign", "salespush"),
        account_name="Shop of Examples",
        postal_address="1 Market Street, Exampleton",
        view_url="https://track.shop.example/v/abcdef",
        notice_url="https://track.shop.example/n/abcdef",
    )


def recipient(number: int) -> dict[str, object]:
    return {
        "first_name": f"Person{number}",
        "city": "Exampleton",
        "points": number,
        "code": f"C-{number:06}",
        "vip": number % 2 == 0,
    }
