-- with clock
-- with index
-- assign: the site of a lane, and its waiting slices moved there, STEP at a time (decision 4).
-- KEYS[1] prefix; ARGV lane, site, place to go on from. Answers the next place, -1 at the end. Slices that slip through
-- between two calls are moved by lease.lua when it meets them in the wrong index.
local STEP = 1000
local lane, site, place = ARGV[1], ARGV[2], tonumber(ARGV[3])
if redis.call('EXISTS', prefix .. 'l:' .. lane) == 0 then
  return -1
end
local old = site_of(lane)
if place == 0 then
  if old == site then
    return -1
  end
  redis.call('HSET', prefix .. 'site', lane, site)
  redis.call('HSET', prefix .. 'site', '<' .. lane, old)
else
  old = redis.call('HGET', prefix .. 'site', '<' .. lane)
  if not old then
    return -1
  end
end
local ids = redis.call('ZRANGE', prefix .. 'l:' .. lane, place, place + STEP - 1)
for _, id in ipairs(ids) do
  local due = redis.call('ZSCORE', due_key(id, old), id)
  if due then
    redis.call('ZREM', due_key(id, old), id)
    redis.call('ZADD', due_key(id, site), due, id)
  end
end
retime(old)
retime(site)
if #ids < STEP then
  redis.call('HDEL', prefix .. 'site', '<' .. lane)
  return -1
end
return place + STEP
