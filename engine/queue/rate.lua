-- rate: tokens of a site by the generic cell rate algorithm, in microseconds of Redis TIME, taken in blocks
-- (promises.md 2). KEYS[1] the site's theoretical arrival time; ARGV wanted, microseconds a token, burst in tokens.
-- Answers {granted, microseconds until the next token}. In any window of s seconds at most s * rate + burst are granted.
-- A clock that stepped back leaves an arrival time far ahead: it is clamped to one full burst from now.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local wanted, interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local tolerance = interval * burst
local arrival = tonumber(redis.call('GET', KEYS[1]) or now)
if arrival < now then
  arrival = now
end
local clamped = arrival > now + tolerance
if clamped then
  arrival = now + tolerance
end
local granted = math.min(wanted, math.floor((now + tolerance - arrival) / interval + 1e-6))
if granted > 0 or clamped then
  arrival = arrival + granted * interval
  local life = math.ceil((arrival - now) / 1000) + 1000
  redis.call('SET', KEYS[1], string.format('%.3f', arrival), 'PX', string.format('%.0f', life))
end
local wait = math.max(0, math.ceil(arrival + interval - now - tolerance))
return { granted, wait }
