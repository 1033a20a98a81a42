-- with clock
-- with index
-- reclaim: the leases of a holder whose counter stood still go back to waiting, due now (decision 6).
-- KEYS[1] prefix; ARGV holder, the counter as it was seen. Answers how many, -1 when the counter has moved.
-- A holder that is not known any more but left leases is dead too: seen is 0 then.
if (redis.call('HGET', prefix .. 'hold', ARGV[1]) or '0') ~= ARGV[2] then
  return -1
end
local count = 0
local leases = redis.call('HGETALL', prefix .. 'lease')
for at = 1, #leases, 2 do
  if string.match(leases[at + 1], '^%d+ (.*)$') == ARGV[1] then
    hand_back(leases[at], now)
    count = count + 1
  end
end
redis.call('HDEL', prefix .. 'hold', ARGV[1])
return count
