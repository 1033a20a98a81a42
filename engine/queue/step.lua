-- Fragment: the clock of the store may step back by days. What was due before stays due then, or a queue would stand
-- still until the clock has been there again; what was due later comes that much later. `at` in the hash n is the
-- clock as last seen here, written down every SEEN, which is also how much earlier than due a slice may come.
-- Steps of less than STEP are nobody's trouble.
local SEEN, STEP = 30000000, 5000000

local function follow_clock()
  local at = tonumber(redis.call('HGET', prefix .. 'n', 'at') or 0)
  if now < at - STEP then
    for _, site in ipairs(redis.call('ZRANGE', prefix .. 'idx', 0, -1)) do
      for _, index in ipairs({ prefix .. 'D:' .. site, prefix .. 'd:' .. site }) do
        for _, id in ipairs(redis.call('ZRANGEBYSCORE', index, '(' .. int(now), int(at + SEEN))) do
          redis.call('ZADD', index, int(now), id)
        end
      end
      retime(site)
    end
    redis.call('HSET', prefix .. 'n', 'at', int(now))
  elseif now > at + SEEN and redis.call('EXISTS', prefix .. 'idx') == 1 then
    redis.call('HSET', prefix .. 'n', 'at', int(now))
  end
end
