"""A newsletter as senders really write them: 26 kB of table layout, Outlook comments, 25 links, slots of every kind.

The demo and the benchmarks send this one, so that their figures are those of a real campaign: three filters, two
conditionals, one loop, about fifty places where a recipient differs. Everything in it is invented.
"""

from __future__ import annotations

SUBJECT = "{{ name }}, {{ offers | length }} picks for {{ city }} this week"

_STYLE = (
    "font-family:Helvetica,Arial,sans-serif;font-size:15px;line-height:23px;color:#2b2f36;"
    "mso-line-height-rule:exactly;-webkit-text-size-adjust:100%;"
)

_ARTICLES = (
    ("The allotment that feeds a street", "garden", "Twelve neighbours, one hose and a timetable on the shed door."),
    (
        "Bread without a recipe",
        "kitchen",
        "What the flour tells you when you stop weighing it, and when to start again.",
    ),
    ("A bicycle for every errand", "town", "We carried a fridge, a cello and three children, though not at once."),
    ("Repairing a wool coat", "workshop", "Needle, thread, patience: an evening's work that lasts ten winters."),
    ("Night trains are back", "travel", "Seven routes, slept on and compared, with the compartments to avoid."),
    ("Light for small rooms", "home", "Why one lamp too many is better than one ceiling light too strong."),
    ("Letters from the islands", "reading", "Four new translations that taste of salt, peat and long ferries."),
    ("The quiet of early markets", "town", "Come at six, bring change, and let the fishmonger choose."),
)

_ITEMS = (
    ("Enamel mug, two colours", "mug", "14.50"),
    ("Linen apron", "apron", "39.00"),
    ("Cast-iron pan, 26 cm", "pan", "64.00"),
    ("Beeswax candles, six", "candles", "22.00"),
    ("Field notebook", "notebook", "9.80"),
    ("Oak chopping board", "board", "48.00"),
)


def _article(number: int, title: str, section: str, teaser: str) -> str:
    url = f"https://www.shop.example/{section}/{title.lower().replace(' ', '-')}?ref=letter&amp;pos={number}"
    return f"""
  <tr>
    <td align="left" valign="top" style="padding:18px 24px 4px 24px;{_STYLE}">
      <!--[if mso]><table role="presentation" width="552" cellpadding="0" cellspacing="0"><tr><td width="552"><![endif]-->
      <h2 style="margin:0 0 6px 0;font-size:20px;line-height:26px;color:#12343b;">
        <a href="{url}" style="color:#12343b;text-decoration:none;">{title}</a>
      </h2>
      <p style="margin:0 0 10px 0;{_STYLE}">{teaser} For readers in {{{{ city }}}} we added an address or two
      around the corner, and the first comment under the piece is waiting for yours, {{{{ name }}}}.</p>
      <p style="margin:0 0 14px 0;{_STYLE}">
        <a href="{url}&amp;more=1" style="color:#b3541e;font-weight:bold;text-decoration:underline;">Read on</a>
        &nbsp;&middot;&nbsp; {3 + number} minutes &nbsp;&middot;&nbsp; filed under {section}
      </p>
      <!--[if mso]></td></tr></table><![endif]-->
    </td>
  </tr>"""


def _item(title: str, slug: str, price: str) -> str:
    return f"""
      <td width="184" align="center" valign="top" style="padding:8px;{_STYLE}">
        <!--[if mso]><v:rect xmlns:v="urn:schemas-microsoft-com:vml" href="https://www.shop.example/goods/{slug}?from=outlook"
          style="width:160px;height:36px;" fillcolor="#12343b" stroke="f"><v:textbox inset="0,0,0,0"><center><![endif]-->
        <p style="margin:0 0 4px 0;font-weight:bold;{_STYLE}">{title}</p>
        <p style="margin:0 0 8px 0;color:#6b7280;font-size:13px;line-height:18px;">from &euro; {price}, {{{{ name }}}}</p>
        <!--[if mso]></center></v:textbox></v:rect><![endif]-->
      </td>"""


def html() -> str:
    """The HTML template: about 26 kB, 25 links to the shop (six of them inside Outlook comments)."""
    articles = "".join(_article(i, *article) for i, article in enumerate(_ARTICLES, 1))
    first, second = _ITEMS[:3], _ITEMS[3:]
    goods = "".join(
        '\n    <tr><td><table role="presentation" width="100%" cellpadding="0" cellspacing="0"><tr>'
        + "".join(_item(*item) for item in row)
        + "\n    </tr></table></td></tr>"
        for row in (first, second)
    )
    filler = "".join(
        f"""
  <tr>
    <td align="left" style="padding:2px 24px;{_STYLE}font-size:12px;line-height:18px;color:#6b7280;">
      <span style="color:#12343b;font-weight:bold;">Notice board {n}.</span> Reader evenings take place on the {n + 2}. of the
      month, doors open at half past six, seats are kept until seven; bring a book you would lend to {{{{ name }}}}.
    </td>
  </tr>"""
        for n in range(1, 9)
    )
    return f"""<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" "http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" lang="en">
<head>
<meta http-equiv="Content-Type" content="text/html; charset=utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>The week in good things</title>
<style type="text/css">
  body {{ margin: 0; padding: 0; background: #f4f1ea; }}
  a:hover {{ text-decoration: none; }}
  @media only screen and (max-width: 620px) {{ .card {{ width: 100% !important; }} td {{ padding-left: 12px !important; }} }}
</style>
<!--[if gte mso 9]><xml><o:OfficeDocumentSettings><o:PixelsPerInch>96</o:PixelsPerInch></o:OfficeDocumentSettings></xml><![endif]-->
</head>
<body style="margin:0;padding:0;background-color:#f4f1ea;">
<div style="display:none;max-height:0;overflow:hidden;">{{{{ name }}}}, this is for your coffee on Sunday in {{{{ city | title }}}}.</div>
<table role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0" bgcolor="#f4f1ea"><tr><td align="center">
<table role="presentation" class="card" width="600" cellpadding="0" cellspacing="0" border="0" bgcolor="#ffffff">
  <tr>
    <td align="center" style="padding:28px 24px 8px 24px;{_STYLE}">
      <a href="https://www.shop.example/?ref=letter" style="color:#12343b;font-size:26px;text-decoration:none;">The Good Things Letter</a>
    </td>
  </tr>
  <tr>
    <td align="left" style="padding:8px 24px;{_STYLE}">
      <p style="margin:0 0 10px 0;{_STYLE}">Dear {{{{ name }}}},</p>
      {{% if member %}}<p>as a member since {{{{ since }}}} you read this a day early \
and post is free in {{{{ city }}}}.</p>{{% else %}}<p>reading along costs nothing. \
<a href="https://www.shop.example/join?ref=letter" style="color:#b3541e;">Members</a> read a day early.</p>{{% endif %}}
      <p style="margin:0 0 10px 0;{_STYLE}">Your corner, {{{{ city | upper }}}}, has been busy: café, Bäckerei and \
“the little cinema” all wrote to us. Here is what they asked us to pass on — and eight pieces to keep.</p>
    </td>
  </tr>{articles}
  <tr>
    <td align="left" style="padding:10px 24px;{_STYLE}">
      <h3 style="margin:0 0 6px 0;font-size:17px;color:#12343b;">Picked for you</h3>
      <ul style="margin:0 0 10px 18px;padding:0;{_STYLE}">{{% for offer in offers %}}
        <li>{{{{ offer }}}} for {{{{ name | default("you") }}}}</li>{{% endfor %}}
      </ul>
      {{% if points > 100 %}}<p><b>{{{{ points }}}} points</b> are worth a pot of tea.</p>{{% endif %}}
    </td>
  </tr>{goods}{filler}
  <tr>
    <td align="center" style="padding:16px 24px;{_STYLE}font-size:12px;line-height:18px;color:#6b7280;">
      <a href="https://www.shop.example/contact" style="color:#6b7280;">Write to us</a> &middot;
      <a href="{{{{ view_url }}}}" style="color:#6b7280;">Read in a browser</a> &middot;
      <a href="{{{{ preferences_url }}}}" style="color:#6b7280;">Preferences</a> &middot;
      <a href="{{{{ notice_url }}}}" style="color:#6b7280;">What we know about you</a> &middot;
      <a href="{{{{ unsubscribe_url }}}}" style="color:#6b7280;">Unsubscribe</a><br />
      {{{{ postal_address }}}}
    </td>
  </tr>
</table>
</td></tr></table>
</body>
</html>
"""


def second_html() -> str:
    """A short second campaign: shows that those who opted out of the first are refused."""
    return (
        '<html><body style="margin:0"><p>Dear {{ name }},</p><p>one more thing: the shop in {{ city }} opens on Saturday. '
        '<a href="https://www.shop.example/opening">Come by</a>.</p>'
        '<p><a href="{{ unsubscribe_url }}">Unsubscribe</a> · {{ postal_address }}</p></body></html>\n'
    )
