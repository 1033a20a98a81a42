"""What the privacy policy promises, tested promise by promise (P-01 to P-60), and proof that the tests guard it.

Law: a test of a promise names the enforcement it guards, and fails when that is switched off; a test that passes
without it proves nothing and is shown as such.

    @promise("P-07", off={"policy.consent.holds": lambda acts, now: True})
    def test_p07_no_consent_no_pixel(...): ...

`off` names what stands between promise and breach: a dotted path where it is looked up, and what takes its place.

    make policy-table      each promise: its tests, run once as they are and once with their enforcement switched off
    --unguarded            pytest's option behind the second run: switch off what each test names

`table` says of every promise what is held here, what comes later, what no software can hold, and what is missing.

Known limits: what is switched off is switched off in this process; enforcement in another process (a worker, a server
script) is tested in `tests/journeys` and `tests/chaos` and cannot be named here.
"""
