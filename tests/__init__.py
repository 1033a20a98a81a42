"""Tests by floor (`engine`, `tracker`, `policy`), laws, journeys, dialogues, and the twins they share (`world`)."""

import os

# The text is what is tested, also where a build of it lies in the environment; `make compiled` asks for the build.
os.environ.setdefault("SALESPUSH_COMPILED", "0")
import engine  # noqa: F401  (before any room of another floor: engine.compiled decides where they come from)
