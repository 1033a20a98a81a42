"""What is said of each promise where there is nothing, or not all, to test here: later, not software, missing.

Promises with tests need no line: their tests speak. A line for one that has tests tells what these do not cover.
"""

from __future__ import annotations

from typing import Final

PROMISES: Final = tuple(f"P-{number:02d}" for number in range(1, 61))

# Comes with accounts, the desk, incidents and the Delivery Optimization Engine switch.
LATER: Final[dict[str, str]] = {
    "P-02": "versions of the policy, notices and acceptance by account come with accounts",
    "P-05": "the register of complaints comes with the desk and incidents; class R6 and due dates are here",
    "P-16": "30 days of grace and reactivation of an account come with accounts",
    "P-18": "last activity of an account holder comes with accounts",
    "P-19": "the notice 30 days before, and no deletion without it, come with accounts",
    "P-20": "acts that keep an account active come with accounts",
    "P-24": "the sealed security log (R1) comes with logins and API keys; nothing here keeps a network address",
    "P-25": ("two approvers and the sealed package come with the desk; the disclosure ledger with gag dates is here"),
    "P-34": "with accounts: an account's export with its suppressions; `suppress export` has the tags",
    "P-49": "with incidents: timers, letters, register",
    "P-50": ("with incidents and accounts: blast radius of a credential; the log of reads it needs is there (P-38)"),
    "P-58": (
        "with accounts and the Delivery Optimization Engine; consent to purpose `doe` is recorded and ends (P-57)"
    ),
    "P-59": "with the Delivery Optimization Engine: there is no table of it yet",
    "P-60": "with the Delivery Optimization Engine",
}

# What a program cannot do or know: a sentence why.
NOT_SOFTWARE: Final[dict[str, str]] = {}

# Held in part: what is missing.
GAPS: Final[dict[str, str]] = {
    "P-03": "who may open the writer's socket may say any role; the purpose is asked of whoever asks through us",
    "P-06": "account holders get no letter when the table or the list of subprocessors changes: with accounts",
    "P-12": "the role on every row comes with accounts",
    "P-15": (
        "a proof letter that bounces does not fall back to the officer by itself; the request lapses as not identified"
    ),
    "P-17": ("erasing a whole account (its contacts, DKIM keys, secrets) has no seam yet: the officer ends it by hand"),
    "P-23": "roles are words the caller says until accounts exist; there is no access log to join",
    "P-28": "that the strictest of account and campaign wins is tested in tests/policy, not guarded here",
    "P-29": "no job that improves the services exists; what is tested is that its purpose reads figures only",
    "P-31": "the platform has no account or promotions list of its own: the test makes them like any other's",
    "P-35": (
        "data is declared by kind and held by setting, not filtered octet by octet; no letter on a change; commands "
        "and mounts are not looked into"
    ),
    "P-37": "Argon2id and TLS of an administration page come with accounts; no DANE, no MTA-STS",
    "P-38": "roles come with accounts: whoever reaches the writer's socket says which role it is",
    "P-39": "that somebody looked is a day in a file: who it was and what was found is not written down here",
    "P-40": (
        "TLS can be required of the installation, not of an account; only the version is recorded; expires, no 5.7.10"
    ),
    "P-44": "processors and recipients are not told of a correction (Art. 19); what is leased is sent as it was",
    "P-46": (
        "an installation is one place: no region label on an account or a worker; the country of an MX is not recorded"
    ),
    "P-48": ("attestation of age comes with accounts; rows held for later keep a birth date, sealed, until expanded"),
    "P-53": "the accounts concerned are not told of a request at the platform (no address of theirs to write to)",
    "P-54": (
        "import again says `erased`, not `suppressed`; the time with two million events is in benchmarks/erasure.py"
    ),
    "P-57": "deleting features of the Delivery Optimization Engine comes with it",
}
