"""The revisions in order, ``r<number>_<what>.py``. No way down: a newer store is never opened by older code."""
