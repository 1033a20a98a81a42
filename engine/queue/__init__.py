"""The queue: slices on lanes, leases with tokens, a journal beside it (design decisions 3 to 8, promises T2 to T8).

What it promises: a recipient put on a lane leaves it in exactly one way, through a settle that carries the token of
the current lease; what was recorded about it before a crash is found again in the journal.

The path, and who walks it:

1. `slices`    pure: what a slice is, bit by bit; cutting, sealing, opening
2. `lanes`     facts.lua, put.lua (intake); lease.lua, assign.lua, postpone.lua, gate.lua, settle.lua, release.lua
               (courier); beat.lua, reclaim.lua, leave.lua (heartbeat and the dead); `questions` holds what is asked
               step.lua, in lease.lua: what was due stays due when the clock of the store steps back
3. `permits`   permit.lua, rate.lua: connections and messages per second of a site, over all workers; its back-off
4. `pace`      pure: how many of those one worker should want, by what the site answers
5. `schedule`  pure: when to try again, and when to give up; `windows`: the hours of a job's delivery window
6. `journal`   intents before the dot, outcomes before the settle; `replay` reads what a crash left
7. `epoch`     how often Redis came back older, and whom the ledger must be asked about because of it
8. `states`    pure: the legal states of all this, and a census that finds any other

9. `sweeps`    walks over all of it: reseal.lua (new weeks' keys), hasten.lua (what was cancelled), unpark.lua (resumed)
10. claim.lua and bury.lua keep the intake stream for `engine.campaign.claims`: what silent workers held, their names
11. `erasing`  erase.lua: people leave waiting slices; exchange.lua: sealed stream entries give way to others

`scripts` loads the Lua files by name. A script touches one hash tag, knows no clock but Redis TIME, holds 64-bit maps
as strings (a Lua number is a double) and runs on Valkey 9 and Redis 7.0 alike.

Never here: an address in clear, DNS, SMTP, a decision whether to send (that is policy.gate's).
"""
