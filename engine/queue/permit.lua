-- permit: connections to a site, over all workers and hosts (promises.md 2). A permit lives until it is given back or
-- its expiry by Redis TIME: a killed worker under-uses its share until then, nobody ever over-uses it.
-- KEYS[1] the site's permits; ARGV cap, life in microseconds, what (take or renew), then names.
-- take answers how many of the names (in order) hold a permit now; renew answers 1 or 0 for each name.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local cap, life = tonumber(ARGV[1]), tonumber(ARGV[2])
local expiry = string.format('%.0f', now + life)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
-- A clock that stepped back leaves expiries far ahead: nobody's is later than one life from now.
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. expiry, '+inf')) do
  redis.call('ZADD', KEYS[1], expiry, name)
end
local answer
if ARGV[3] == 'take' then
  answer = 0
  local used = redis.call('ZCARD', KEYS[1])
  for at = 4, #ARGV do
    if not redis.call('ZSCORE', KEYS[1], ARGV[at]) then
      if used >= cap then
        break
      end
      used = used + 1
    end
    redis.call('ZADD', KEYS[1], expiry, ARGV[at])
    answer = answer + 1
  end
else
  answer = {}
  for at = 4, #ARGV do
    local held = redis.call('ZSCORE', KEYS[1], ARGV[at])
    if held then
      redis.call('ZADD', KEYS[1], expiry, ARGV[at])
    end
    answer[#answer + 1] = held and 1 or 0
  end
end
-- The key goes with its last permit; a step back of the clock keeps it no longer than one more life.
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil(life / 1000) + 1000))
return answer
