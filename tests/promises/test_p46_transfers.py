"""P-46: data leaves the operator's countries only on a ground that is written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.outlets import outlets
from engine.settings import EngineSettings
from engine.worker import run_worker
from policy.outlets import check
from policy.settings import ConfigError, PolicySettings, load
from tests.promises.marks import promise
from tests.promises.test_p35_subprocessors import OFFICER, RELAY, TODAY


@promise("P-46", off={"policy.subprocessors._wrong": lambda *_: None})
@pytest.mark.parametrize(("home", "country"), [('["CA", "US"]', "IE"), ('["IE"]', "US"), ("[]", "CA")])
def test_p46_nothing_goes_to_another_country_without_a_ground(tmp_path: Path, home: str, country: str) -> None:
    config = tmp_path / "sales-push.toml"
    entry = RELAY.format(more=', "message"').replace('country = "IE"', f'country = "{country}"')
    written = (
        f'[policy]\ndata_dir = "{tmp_path / "data"}"\nhome_countries = {home}\n{OFFICER}{entry}'
        'SAFEGUARD[engine.smarthost]\nhost = "smtp.relay.example"\n'
    )
    config.write_text(written.replace("SAFEGUARD", ""))
    with pytest.raises(ConfigError, match=f"nothing says on which ground data goes to {country}"):
        run_worker(0, config)
    config.write_text(written.replace("SAFEGUARD", 'safeguard = "standard contractual clauses, 2021/914, module 2"\n'))
    check(load(PolicySettings, config), outlets(load(EngineSettings, config)), TODAY)
