-- with clock
-- with index
-- postpone: nothing of this lane is due before now + delay, or its expiry where that is sooner, STEP slices at a time.
-- KEYS[1] prefix; ARGV lane, delay in microseconds, place to go on from. Answers the next place, -1 at the end.
-- The lane keeps the old scores, or the places of a second call would not be those of the first.
local STEP = 1000
local lane, place = ARGV[1], tonumber(ARGV[3])
local site = site_of(lane)
local ids = redis.call('ZRANGE', prefix .. 'l:' .. lane, place, place + STEP - 1)
local due = now + tonumber(ARGV[2])
for _, id in ipairs(ids) do
  local expires = redis.call('GETRANGE', prefix .. 's:' .. id, 48, 55)
  if #expires == 8 then
    redis.call('ZADD', due_key(id, site), 'XX', 'GT', int(math.min(due, (struct.unpack('>I8', expires)))), id)
  end
end
retime(site)
if #ids < STEP then
  return -1
end
return place + STEP
