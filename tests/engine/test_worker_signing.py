"""A worker that is told to sign eight at a time and cannot says so before it begins, and the supervisor gives up."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import worker
from engine.message.multibuffer import Unavailable
from policy.settings import ConfigError


def test_multi_buffer_that_cannot_be_had_refuses_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise Unavailable("the extra `fast` is not installed (ipp-crypto is missing)")

    monkeypatch.setattr(worker, "open_library", missing)
    config = tmp_path / "sales-push.toml"
    config.write_text(
        f'[policy]\ndata_dir = "{tmp_path}"\n[policy.officer]\nname = "O"\naddress = "o@example.org"\n'
        '[engine.signing]\nimplementation = "multi-buffer"\n'
    )
    with pytest.raises(ConfigError) as refused:
        worker.run_worker(0, config)
    assert [(one.path, one.suggestion) for one in refused.value.problems] == [
        ("engine.signing.implementation", 'install the extra `fast`, or set "auto"')
    ]
