"""Tests by floor (`engine`, `tracker`, `policy`), laws, journeys, dialogues, and the twins they share (`world`)."""
