-- with clock
-- with index
-- reclaim: the leases of a holder whose counter stood still go back to waiting, due now (decision 6).
-- KEYS[1] prefix; ARGV holder, the counter as it was seen. Answers how many, -1 when the counter has moved.
-- A holder that is not known any more but left leases is dead too: seen is 0 then. Slices of a newer layout stay with it
-- and with its counter, until a program comes that understands them.
if (redis.call('HGET', prefix .. 'hold', ARGV[1]) or '0') ~= ARGV[2] then
  return -1
end
local count, stay = 0, false
local leases = redis.call('HGETALL', prefix .. 'lease')
for at = 1, #leases, 2 do
  if string.match(leases[at + 1], '^%d+ (.*)$') == ARGV[1] then
    if hand_back(leases[at], now) then
      count = count + 1
    else
      stay = true
    end
  end
end
if not stay then
  redis.call('HDEL', prefix .. 'hold', ARGV[1])
end
return count
