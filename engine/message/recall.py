"""Recall: forms of values that recipients share (a city, a first name, a line of a list), made once and looked up.

Escaping, checking and encoding a value costs 0.7 to 3 us in every part it stands in, a look-up 0.1 us.

Law: what is found is what would be made, because the key is all that the form is made of. Kept is only what came at
least twice: of anything else nothing stays but a hash that differs in every process. A recall holds at most `MOST`
forms of keys of at most `LONGEST` characters, begins anew when it is full, and dies with its compiled contents; it is
never written anywhere.

Known limit: "at least twice" may be the same recipient tried again.
"""

from __future__ import annotations

from typing import Final, TypeVar

MOST: Final = 1024  # forms; with keys about 150 kB when all are of a usual length
SEEN: Final = 4096  # hashes of keys that came once
SHARED: Final = 64  # forms: whoever has fewer after SEEN keys rests, so that values of one person each cost little
REST: Final = 32_768  # offers
LONGEST: Final = 120  # characters or octets of a key

Key = TypeVar("Key", str, bytes, "str | int")
Form = TypeVar("Form")


class Recall(dict[Key, Form]):
    """Ask with `get`; what was made after a None is offered to `keep`."""

    __slots__ = ("_rest", "_seen")

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[int] = set()
        self._rest = 0  # offers that are not looked at, because hardly anything is shared

    def keep(self, key: Key, form: Form) -> Form:
        """The form itself, kept when its key came before."""
        if self._rest:
            self._rest -= 1
            return form
        if not isinstance(key, int) and len(key) > LONGEST:
            return form
        seen, number = self._seen, hash(key)
        if number not in seen:
            if len(seen) >= SEEN:
                seen.clear()
                self._rest = REST if len(self) < SHARED else 0
            seen.add(number)
            return form
        if len(self) >= MOST:
            self.clear()
        self[key] = form
        return form
