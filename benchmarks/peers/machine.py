"""The machine: how many RSA-2048 signatures one core makes now, and what a folder lies on. Linux."""

from __future__ import annotations

import os
import time
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils


def rsa_rate(seconds: float = 1.0) -> float:
    """RSA-2048 signatures a second of CPU of one core, through `cryptography` (OpenSSL)."""
    key = rsa.generate_private_key(65537, 2048)
    digest, prehashed, scheme = os.urandom(32), utils.Prehashed(hashes.SHA256()), padding.PKCS1v15()
    began, cpu, count = time.monotonic(), time.process_time(), 0
    while time.monotonic() - began < seconds:
        for _ in range(20):
            key.sign(digest, scheme, prehashed)
        count += 20
    return count / (time.process_time() - cpu)


def file_system(folder: Path) -> str:
    """Its type, such as ext4 or tmpfs; "" when /proc does not say."""
    try:
        device = os.stat(folder).st_dev
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return type_of(lines, f"{os.major(device)}:{os.minor(device)}")


def type_of(mounts: list[str], device: str) -> str:
    """mounts: lines of mountinfo (proc(5): the device is the third word, the type the first after " - ")."""
    for line in mounts:
        before, _, after = line.partition(" - ")
        if before.split()[2:3] == [device] and after:
            return after.split()[0]
    return ""
