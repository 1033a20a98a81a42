"""One process of the aiosmtplib peers: a signer in the loop, several connections kept open, uvloop.

    python -m benchmarks.peers.aio CORPUS --port PORT --key FILE --signer dkimpy|cryptography \\
        --first I --step K --count N --connections C

Sends messages I, I+K, I+2K, ... below N. Each connection is one aiosmtplib.SMTP that sends message after message by
sendmail(), the library's own way for bytes that are a message already; no TLS, Nagle off as asyncio has it. Signing in
the loop is the faster arrangement when there are as many processes as cores.

A worker (see `processes`): "ready" once the key is parsed, "go", then {"began": wall clock, "sent": messages}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiosmtplib
import uvloop

from benchmarks.peers.corpus import Corpus
from benchmarks.peers.signing import SELECTOR, SIGNERS, CachedSigner, DkimpySigner
from engine.rehearsal.setting import DOMAIN


async def deliver(corpus: Corpus, signer: CachedSigner | DkimpySigner, port: int, numbers: Iterator[int]) -> int:
    """One connection's share: as many of the numbers as it gets to. Raises SMTPException."""
    sent = 0
    client = aiosmtplib.SMTP(
        hostname="127.0.0.1", port=port, use_tls=False, start_tls=False, local_hostname="peer.test", timeout=60
    )
    async with client:
        for number in numbers:
            signed = signer.sign(corpus.message(number))
            await client.sendmail(corpus.sender, [corpus.recipients[number]], signed)
            sent += 1
    return sent


async def deliver_all(corpus: Corpus, signer: CachedSigner | DkimpySigner, port: int, asked: range, width: int) -> int:
    numbers = iter(asked)
    tasks = [deliver(corpus, signer, port, numbers) for _ in range(min(width, len(asked)))]
    return sum(await asyncio.gather(*tasks))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.aio")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--signer", choices=sorted(SIGNERS), required=True)
    for name in ("--port", "--first", "--step", "--count", "--connections"):
        parser.add_argument(name, type=int, required=True)
    asked = parser.parse_args()
    corpus = Corpus(asked.corpus)
    signer = SIGNERS[asked.signer](DOMAIN, SELECTOR, asked.key.read_bytes())
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.time()
    numbers = range(asked.first, asked.count, asked.step)
    try:
        sent = uvloop.run(deliver_all(corpus, signer, asked.port, numbers, asked.connections))
    except (aiosmtplib.SMTPException, OSError) as error:
        print(f"aiosmtplib: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"began": began, "sent": sent}), flush=True)
    sys.stdin.readline()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
