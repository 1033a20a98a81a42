-- with clock
-- with index
-- put: one chunk's share of this partition (T2). The watermark bit and everything it stands for in one script.
-- KEYS[1] prefix; ARGV job, chunk, account, list, topic, priority, expires, hold|resend, buckets, state, slices,
-- then (due microseconds, slice) a slice, then event batches. Answers 1, or 0 when the chunk had been put before.
local job, chunk, slices = ARGV[1], ARGV[2], tonumber(ARGV[11])
if redis.call('SETBIT', prefix .. 'w:' .. job, chunk, 1) == 1 then
  return 0
end
local state = prefix .. 'j:' .. job
if redis.call('EXISTS', state) == 0 then
  redis.call('HSET', state, 'ac', ARGV[3], 'li', ARGV[4], 'to', ARGV[5], 'pr', ARGV[6], 'ex', ARGV[7],
    'id', ARGV[8], 'nb', ARGV[9], 'st', ARGV[10], 'w', '0')
end
local count = 0
for at = 12, 11 + 2 * slices, 2 do
  lay(ARGV[at + 1], tonumber(ARGV[at]))
  count = count + string.byte(ARGV[at + 1], 9)
end
if count > 0 then
  redis.call('HINCRBY', state, 'w', count)
end
for at = 12 + 2 * slices, #ARGV do
  redis.call('XADD', prefix .. 'ev', '*', 'b', ARGV[at])
end
return 1
