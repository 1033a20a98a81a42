-- claim: entries of a stream whose consumers fell silent (T1). XAUTOCLAIM looks at ten times COUNT entries and cleans
-- away COUNT that were trimmed, so an answer with nothing in it says nothing about what comes behind: asked LOOKS times
-- here, in one round trip, 200 times 8 of a hundred thousand trimmed ones at a time (about 10 ms).
-- KEYS[1] stream; ARGV group, consumer, idle in milliseconds, cursor, count. Answers {cursor, entries}; cursor 0-0 when
-- the end was reached.
-- States: pending with somebody silent, then pending with us, delivered once more.
local LOOKS = 200
local cursor, entries = ARGV[4], {}
for _ = 1, LOOKS do
  local told = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], cursor, 'COUNT', ARGV[5])
  cursor, entries = told[1], told[2]
  if cursor == '0-0' or #entries > 0 then
    break
  end
end
return { cursor, entries }
