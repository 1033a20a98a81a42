"""Templates: minijinja's language, cut into pieces once, so that most of it never runs per recipient (decision 1).

    tokenise   source -> text, {{ expressions }}, {% tags %}; comments gone, raw blocks turned into text, trims applied
    check      every fault with its line: syntax, undeclared fields, what we refuse

Law: the output of the pieces joined is what minijinja makes of the whole source (tests/laws/test_message_laws.py).

Refused, because a template is somebody else's program (faults.md 3.6): multiplication ('x' * 10**8 makes 100 MB in
0.2 s, lists take seconds, and fuel does not count it), the filters format and indent (the same), safe and autoescape
(escaping is by context, always), tojson (its quotes leave an attribute), debug and methods, include, import, extends,
macro, block. A loop's body has at most 32 KiB of source. engine.message.renderer limits what is left while it runs.

Known limit: expressions are looked through by patterns, not by minijinja's parser, which Python cannot ask; what the
patterns miss meets an environment that lacks it.
"""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

import minijinja

MAX_SOURCE: Final = 512 * 1024  # characters of one template; Gmail cuts a message at 102 kB
MAX_CONSTRUCTS: Final = 5_000
MAX_SETS: Final = 100  # each is rendered again with every later slot that uses one
MAX_LOOP_SOURCE: Final = 32 * 1024


class Sort(enum.Enum):
    TEXT = 1
    EXPRESSION = 2
    TAG = 3


@dataclass(frozen=True, slots=True)
class Token:
    """text is literal for TEXT, the inside without its markers for the others ("name|upper", "if vip")."""

    sort: Sort
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Fault:
    line: int
    message: str
    suggestion: str = ""


class TemplateFault(ValueError):
    """The source cannot be cut into tokens."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


_OPEN = re.compile(r"\{\{|\{%|\{#")
_RAW = re.compile(r"\{%[-+]?\s*raw\s*([-+]?)%\}")
_END_RAW = re.compile(r"\{%([-+]?)\s*endraw\s*([-+]?)%\}")
_STRING = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'', re.DOTALL)


def tokenise(source: str) -> list[Token]:
    """Cut a source. Raises TemplateFault where a construct is not closed."""
    tokens: list[Token] = []
    text: list[str] = []
    text_line = line = 1
    at = counted = 0
    trim_next = False

    def literal(piece: str) -> None:
        nonlocal trim_next
        if trim_next:
            piece = piece.lstrip()
            trim_next = not piece
        text.append(piece)

    def flush(*, trim: bool) -> None:
        joined = "".join(text)
        if trim:
            joined = joined.rstrip()
        if joined:
            tokens.append(Token(Sort.TEXT, joined, text_line))
        text.clear()

    while True:
        found = _OPEN.search(source, at)
        if found is None:
            literal(source[at:])
            flush(trim=False)
            return tokens
        literal(source[at : found.start()])
        start = found.start()
        line += source.count("\n", counted, start)
        counted = start
        marker = found.group()
        raw = _RAW.match(source, start)
        if raw is not None:
            end = _END_RAW.search(source, raw.end())
            if end is None:
                raise TemplateFault(line, "{% raw %} is not closed")
            if source.startswith("{%-", start):
                text[:] = ["".join(text).rstrip()]
            body = source[raw.end() : end.start()]
            if raw.group(1) == "-":
                body = body.lstrip()
            if end.group(1) == "-":
                body = body.rstrip()
            trim_next = False
            text.append(body)
            trim_next = end.group(2) == "-"
            at = end.end()
            continue
        if marker == "{#":
            close = source.find("#}", start + 2)
            if close == -1:
                raise TemplateFault(line, "a comment is not closed")
            if source[start + 2 : start + 3] == "-":
                text[:] = ["".join(text).rstrip()]
            trim_next = source[close - 1] == "-" and close - 1 > start + 1
            at = close + 2
            continue
        close = _closing(source, start + 2, "}}" if marker == "{{" else "%}")
        if close == -1:
            raise TemplateFault(line, f"{marker} is not closed")
        inside = source[start + 2 : close]
        left, right = inside.startswith(("-", "+")), inside.endswith(("-", "+"))
        flush(trim=inside.startswith("-"))
        trim_next = inside.endswith("-") and len(inside) > 1
        inside = inside[1 if left else 0 : -1 if right and len(inside) > 1 else None].strip()
        tokens.append(Token(Sort.EXPRESSION if marker == "{{" else Sort.TAG, inside, line))
        at = close + 2
        text_line = line + source.count("\n", start, at)


def _closing(source: str, at: int, marker: str) -> int:
    """Where the construct ends: strings and dict literals inside it are stepped over."""
    depth = 0
    while at < len(source):
        character = source[at]
        if character in "\"'":
            string = _STRING.match(source, at)
            if string is None:
                return -1
            at = string.end()
            continue
        if depth == 0 and source.startswith(marker, at):
            return at
        if character == "{":
            depth += 1
        elif character == "}" and depth:
            depth -= 1
        at += 1
    return -1


def untokenise(token: Token) -> str:
    """The source of one token, for a block that minijinja renders. Literal text is quoted where it must be."""
    if token.sort is Sort.TAG:
        return "{% " + token.text + " %}"
    if token.sort is Sort.EXPRESSION:
        return "{{ " + token.text + " }}"
    return literal_source(token.text)


def literal_source(text: str) -> str:
    if "{" not in text:
        return text
    return "".join(
        '{{ "' + piece + '" }}' if piece in ("{{", "{%", "{#") else piece for piece in re.split(r"(\{[{%#])", text)
    )


_PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*")
_KEYWORDS = frozenset(("true", "false", "none", "True", "False", "None", "not", "loop", "self"))


def simple_path(expression: str) -> tuple[str, ...] | None:
    """("customer", "name") when the expression is a name or dotted path and nothing else: a direct slot."""
    if not _PATH.fullmatch(expression):
        return None
    path = tuple(expression.split("."))
    return None if path[0] in _KEYWORDS else path


OPENING: Final = frozenset(("if", "for", "with"))
CLOSING: Final = frozenset(("endif", "endfor", "endwith", "endset"))
_MIDDLE = frozenset(("elif", "else"))


def keyword(tag: str) -> str:
    return tag.split(None, 1)[0] if tag else ""


def is_block_set(tag: str) -> bool:
    """{% set x %}...{% endset %}, which has a body, as against {% set x = 1 %}."""
    return keyword(tag) == "set" and "=" not in _STRING.sub("", tag)


def assigned(tag: str) -> set[str]:
    """The names a {% set %} gives: later slots that use them are rendered with it in front."""
    target = tag.split(None, 1)[1].split("=", 1)[0] if keyword(tag) == "set" and len(tag.split(None, 1)) == 2 else ""
    return set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", target))


FILTERS: Final = frozenset(
    "abs attr bool capitalize count d default dictsort e escape first float groupby int items join last length list "
    "lower map max min reject rejectattr replace reverse round select selectattr slice sort split string sum title "
    "trim truncate unique upper urlencode".split()
) - {"attr"}
_TESTS = frozenset(
    "boolean defined endingwith eq equalto even false filter float ge greaterthan gt in integer iterable le "
    "lessthan lower lt mapping ne none number odd sequence startingwith string test true undefined upper".split()
)
_FUNCTIONS = frozenset(("range",))
_LOOP_CALLS = frozenset(("cycle", "changed"))
_USED_FILTER = re.compile(r"\|\s*([A-Za-z_][A-Za-z0-9_]*)")
_USED_TEST = re.compile(r"\bis\s+(?:not\s+)?([A-Za-z_][A-Za-z0-9_]*)")
_CALL = re.compile(r"(\|\s*|\.\s*|\bis\s+(?:not\s+)?)?\b([A-Za-z_][A-Za-z0-9_]*)\s*\(")
_WORDS = frozenset(("if", "elif", "else", "in", "and", "or", "not", "is", "set", "for", "with"))


def check(source: str, known: Collection[str] | None) -> list[Fault]:
    """Every fault of a template, in order of lines. known: the fields recipients have and the variables we provide;
    None when the fields are not declared (then every name is taken for a field)."""
    if len(source) > MAX_SOURCE:
        return [Fault(1, f"the template is longer than {MAX_SOURCE} characters")]
    try:
        tokens = tokenise(source)
    except TemplateFault as fault:
        return [Fault(fault.line, str(fault))]
    sets = [token for token in tokens if token.sort is Sort.TAG and keyword(token.text) == "set"]
    if len(tokens) > 2 * MAX_CONSTRUCTS or len(sets) > MAX_SETS:
        return [Fault(1, f"there are more than {MAX_CONSTRUCTS} constructs, or more than {MAX_SETS} sets")]
    faults = [fault for token in tokens if token.sort is not Sort.TEXT for fault in _token_faults(token)]
    environment = minijinja.Environment(pycompat=False, debug=False)
    try:
        environment.add_template("t", source)
    except minijinja.TemplateError as error:
        return [*faults, Fault(error.line or 1, f"syntax error: {error.detail or error.kind}")]
    faults += _loop_faults(tokens)
    if known is not None:
        for name in sorted(names_used(source) - set(known)):
            faults.append(
                Fault(
                    next((t.line for t in tokens if t.sort is not Sort.TEXT and re.search(rf"\b{name}\b", t.text)), 1),
                    f"the field {name!r} is used, but recipients do not have it",
                    _nearest(name, known, "add the field to the recipients, or remove it here"),
                )
            )
    return sorted(faults, key=lambda fault: fault.line)


def names_used(source: str) -> set[str]:
    """Top-level names a valid source asks its context for."""
    environment = minijinja.Environment(pycompat=False, debug=False)
    return environment.undeclared_variables_in_str(source) - _FUNCTIONS - {"loop"}


def filters_used(source: str) -> set[str]:
    """The names of the filters in a source, and perhaps words of its text that look like one."""
    return set(_USED_FILTER.findall(source))


def _nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def _token_faults(token: Token) -> Iterable[Fault]:
    line, code = token.line, _STRING.sub("''", token.text)
    if token.sort is Sort.EXPRESSION and not code.strip():
        yield Fault(line, "an expression is empty")
    if token.sort is Sort.TAG:
        word = keyword(code)
        if word not in OPENING | CLOSING | _MIDDLE | {"set"}:
            yield Fault(line, f"{{% {word} %}} is not available", "use if, for, set, with")
    if "*" in code:
        yield Fault(line, "templates do not multiply", "send the product as a field of its own")
    for name in _USED_FILTER.findall(code):
        if name not in FILTERS:
            yield Fault(line, f"the filter {name!r} is not available", _nearest(name, FILTERS, "remove it"))
    for name in _USED_TEST.findall(code):
        if name not in _TESTS:
            yield Fault(line, f"the test {name!r} is not available", _nearest(name, _TESTS, "remove it"))
    for before, name in _CALL.findall(code):
        if before.startswith("."):
            if name not in _LOOP_CALLS:
                yield Fault(line, f"methods cannot be called: {name}()", "use a filter")
        elif not before and name not in _FUNCTIONS | _WORDS:
            yield Fault(line, f"the function {name!r} is not available", "only range() is")
    if token.sort is Sort.EXPRESSION and re.search(r"\bif\b", code) and not re.search(r"\belse\b", code):
        yield Fault(line, "an inline if needs its else", "write {{ ... if ... else '' }}")


def _loop_faults(tokens: list[Token]) -> list[Fault]:
    faults: list[Fault] = []
    open_loops: list[tuple[int, int]] = []
    size = 0
    for token in tokens:
        if token.sort is Sort.TAG and keyword(token.text) == "for":
            open_loops.append((token.line, size))
        elif token.sort is Sort.TAG and keyword(token.text) == "endfor" and open_loops:
            line, before = open_loops.pop()
            if size - before > MAX_LOOP_SOURCE:
                faults.append(Fault(line, f"the body of a loop is longer than {MAX_LOOP_SOURCE} characters"))
        size += len(token.text)
    return faults
