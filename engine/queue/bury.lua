-- bury: consumers of a group that nobody reads for any more (faults 3.3: every life of a worker has a name of its own).
-- KEYS[1] stream; ARGV group, milliseconds. Answers how many were forgotten.
-- States: only who has been silent for so long and has nothing pending; looked at and forgotten in one script, because
-- forgetting a consumer forgets its entries. One that lives after all is made anew by its next read.
local gone = 0
for _, told in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for at = 1, #told, 2 do
    consumer[told[at]] = told[at + 1]
  end
  if consumer.pending == 0 and consumer.idle >= tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
    gone = gone + 1
  end
end
return gone
