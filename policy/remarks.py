"""What operators write by hand stays out of the audit chain: it is kept for years, and nobody can change it (P-12).

A reason for pausing a job may name a person ("she called, ada@…"). So the words stay with what they explain, and go
with it: `job.reason` with the job (R4), `halt.reason` when the halt ends. The chain gets their reference, by which
whoever has the words can show that these are the ones that were given.

    no words                   operation                 nothing was given
    words                      remark/<16 hex digits>    BLAKE2b under the service key

Laws:
- nothing of the words can be read from the reference, nor guessed and tried, without the service key: a plain hash of
  a short sentence could be tried (GDPR 4(5), recital 26);
- the same words have the same reference while the key is the same, whatever spaces are around them.

Known limits: words given on resuming, and on cancelling an account or a domain's halt, have no row to stay with; only
their reference is kept. Lines written before this room was there keep what they say.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from policy.keys import Keyring

NONE: Final = "operation"
_PREFIX: Final = "remark/"
_BYTES: Final = 8


def reference(keyring: Keyring, words: str) -> str:
    """What the chain says instead of somebody's words."""
    bare = words.strip()
    if not bare:
        return NONE
    raw = bare.encode("utf-8", "surrogatepass")
    digest = blake2b(raw, digest_size=_BYTES, key=keyring.service, person=b"sp-remark")
    return _PREFIX + digest.hexdigest()


def named(keyring: Keyring, what: str, *names: str) -> str:
    """The reference of something that somebody else named (a job that was refused, a bundle of another house): such
    names are whatever their author wrote, and are not repeated. what: a word of ours."""
    digest = blake2b(digest_size=_BYTES, key=keyring.service, person=b"sp-named")
    for part in (what, *names):
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(4, "big") + raw)
    return f"{what}/{digest.hexdigest()}"
