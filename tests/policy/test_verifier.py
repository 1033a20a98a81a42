"""The stand-alone verifier: it names the first bad entry, whatever was done to a chain or to its checkpoints."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from policy import verifier

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()


def form(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def chain_of(count: int, what: str = "job-paused") -> list[bytes]:
    """Made here, by the description alone: nothing of the program under test."""
    lines, prev = [], "00" * 32
    for seq in range(1, count + 1):
        entry = {
            "seq": seq, "ts": f"2026-11-22T19:44:{seq % 60:02d}.000000Z", "actor_ref": "operator", "action": what,
            "object_ref": f"job/{seq}", "purpose": "Grüße", "result": "done", "prev": prev,
        }  # fmt: skip
        prev = sha256(form(entry)).hexdigest()
        lines.append(form(entry | {"hash": prev}) + b"\n")
    return lines


def checkpoint_of(line: bytes, key: Ed25519PrivateKey = KEY, **changed: Any) -> bytes:
    entry = json.loads(line)
    words = {"v": 1, "seq": entry["seq"], "hash": entry["hash"], "ts": entry["ts"], "key_id": "audit.1"} | changed
    signature = key.sign(b"sales-push audit checkpoint\n" + form(words))
    return form(words | {"signature": signature.hex()}) + b"\n"


CHAIN = chain_of(6)
CHECKPOINTS = [checkpoint_of(CHAIN[2]), checkpoint_of(CHAIN[4])]


def found(chain: list[bytes], checkpoints: list[bytes] = CHECKPOINTS) -> list[tuple[str, int]]:
    return [(finding.kind, finding.seq) for finding in verifier.check(chain, checkpoints, [PUBLIC]).findings]


def test_a_whole_chain() -> None:
    report = verifier.check(CHAIN, CHECKPOINTS, [PUBLIC])
    assert report.is_whole
    assert (report.first, report.last, report.entries, report.checkpoints, report.uncovered) == (1, 6, 6, 2, 1)
    assert verifier.check([], [], []).is_whole


def changed(line: bytes, **fields: Any) -> bytes:
    return form(json.loads(line) | fields) + b"\n"


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ([*CHAIN[:3], changed(CHAIN[3], result="denied"), *CHAIN[4:]], ("hash", 4)),
        ([*CHAIN[:3], changed(CHAIN[3], hash="ab" * 32), *CHAIN[4:]], ("hash", 4)),
        ([*CHAIN[:3], changed(CHAIN[3], prev="ab" * 32), *CHAIN[4:]], ("link", 4)),
        ([*CHAIN[:3], *CHAIN[4:]], ("order", 5)),
        ([*CHAIN[:2], CHAIN[3], CHAIN[2], *CHAIN[4:]], ("order", 4)),
        ([*CHAIN[:3], CHAIN[2], *CHAIN[3:]], ("order", 3)),
        ([*CHAIN[:3], changed(CHAIN[3], note="x"), *CHAIN[4:]], ("form", 4)),
        ([*CHAIN[:3], CHAIN[3].replace(b'","', b'", "', 1), *CHAIN[4:]], ("form", 4)),
        ([*CHAIN[:5], CHAIN[5].rstrip(b"\n")], ("form", 6)),
        (CHAIN[1:], ("beginning", 2)),
        (CHAIN[:4], ("cut", 5)),
        ([], ("cut", 1)),
        (chain_of(6, "job-cancelled"), ("rewritten", 3)),
    ],
)
def test_the_first_bad_entry_is_named(chain: list[bytes], expected: tuple[str, int]) -> None:
    assert found(chain) == [expected]


def test_older_entries_may_have_ended_where_a_checkpoint_stands_for_them() -> None:
    assert found(CHAIN[3:]) == []
    assert found(CHAIN[3:], [checkpoint_of(CHAIN[1])]) == [("beginning", 4)]


def test_checkpoints_of_another_key_or_not_in_form_prove_nothing() -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    assert found(CHAIN, [checkpoint_of(CHAIN[2], other)]) == [("signature", 3)]
    assert verifier.check(
        CHAIN, [checkpoint_of(CHAIN[2], other)], [PUBLIC, other.public_key().public_bytes_raw()]
    ).is_whole
    assert found(CHAIN, [b"{}\n"]) == [("form", 0)]
    signed_elsewhere = form({**json.loads(CHECKPOINTS[0]), "signature": KEY.sign(form({"v": 1})).hex()}) + b"\n"
    assert found(CHAIN, [signed_elsewhere]) == [("signature", 3)]


@given(st.data())
def test_any_single_bit_flipped_in_the_chain_is_found(data: st.DataObject) -> None:
    raw = bytearray(b"".join(CHAIN))
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    entry = b"".join(CHAIN)[: bit // 8].count(b"\n") + 1
    [finding] = verifier.check(_split(bytes(raw)), CHECKPOINTS, [PUBLIC]).findings
    assert finding.seq == entry or finding.line == entry, "it names the entry it is in"


@given(st.data())
def test_any_single_bit_flipped_in_a_checkpoint_is_found(data: st.DataObject) -> None:
    raw = bytearray(b"".join(CHECKPOINTS))
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert not verifier.check(CHAIN, _split(bytes(raw)), [PUBLIC]).is_whole


def _split(raw: bytes) -> list[bytes]:
    parts = raw.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


@given(st.binary(max_size=200))
def test_any_bytes_get_an_answer(raw: bytes) -> None:
    for lines in (_split(raw), [b'{"seq":' + raw + b"}\n"]):
        verifier.check(lines, lines, [PUBLIC])


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(verifier.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "cryptography"}


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The file copied to a place where nothing of ours can be imported."""
    shutil.copy(verifier.__file__, tmp_path / "verifier.py")
    (tmp_path / "elsewhere").mkdir()
    for number, one in enumerate(CHECKPOINTS):
        (tmp_path / "elsewhere" / f"audit-{number}.json").write_bytes(one)
    (tmp_path / "audit.pub").write_text(f"audit.1 {PUBLIC.hex()}\n")

    def run(chain: list[bytes], *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "chain.jsonl").write_bytes(b"".join(chain))
        command = [sys.executable, "-I", "verifier.py", "chain.jsonl", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_it_works_alone(alone: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    given_ = ("elsewhere", "--key", "audit.pub")
    whole = alone(CHAIN, *given_)
    assert (whole.returncode, whole.stderr) == (0, "")
    assert "6 entries, 1 to 6; 2 checkpoints" in whole.stdout
    assert "1 entries are younger" in whole.stdout
    cut = alone(CHAIN[:4], *given_)
    assert cut.returncode == 1
    assert "cut: entry 5" in cut.stdout
    assert "would not show" in alone(CHAIN).stdout
    assert alone(CHAIN, "elsewhere").returncode == 2
    assert alone(CHAIN, "elsewhere", "--key", "nothing").returncode == 2
