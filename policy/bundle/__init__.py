"""The bundle: everything held about one person, as a file they can read, check and take elsewhere (P-42, P-43, P-56).

Promise: what the places (`policy.personal`) say is what the bundle holds, record for record, nothing left out and
nothing made up; the only record worked out here is the account of use. Same records and same instant: same bytes.

    1. `gathering`  every place is asked for its records of the person
    2. `contents`   records sorted into files, in a stable order; the account of use is worked out from them
    3. `writing`    data/*.jsonl, csv/*.csv, schema/*.schema.json, README.html, and manifest.json with a hash of each
    4. `zips`       one zip: plain, or AES-256 under a one-time passphrase, which every zip program opens
    5. kept 0600 in data_dir/exports for 7 days, then gone (`writing.expire`)
    6. `reading`    opened, every hash checked, entered into an instance as far as it can mean something there

Two kinds: *access* (GDPR 15, PIPEDA 4.9, CCPA 1798.110) has all of it; *portability* (GDPR 20) has what the person
provided and what was observed of them, not what was concluded (WP242 rev.01): no inferred.jsonl, no inferred fields.

Rooms: `contents`, `schemas`, `csvs`, `zips`, `pages`, `manifest` are pure but for random salts; `operations` is what
the writer does when asked.

Known limits: bundles are made in memory (a person has thousands of records, not millions) and zip64 is not written.
What a place may not export (a disclosure under a gag, P-33) it does not hand over; this package cannot know of it.
"""
