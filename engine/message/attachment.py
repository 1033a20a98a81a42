"""Attachment: a file of a campaign, as its payload keeps it.

Apart from `engine.message.mime`, which is compiled: msgspec reads the annotations of what a payload holds, and machine
code keeps none (engine.compiled).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that travels with the message; with cid it is an inline image ("cid:logo" in the HTML)."""

    filename: str
    content_type: str
    content: bytes
    cid: str | None = None
