-- with clock
-- with index
-- postpone: nothing of this lane is due before now + delay, STEP slices at a time.
-- KEYS[1] prefix; ARGV lane, delay in microseconds, place to go on from. Answers the next place, -1 at the end.
-- The lane keeps the old scores, or the places of a second call would not be those of the first.
local STEP = 1000
local lane, place = ARGV[1], tonumber(ARGV[3])
local site = site_of(lane)
local ids = redis.call('ZRANGE', prefix .. 'l:' .. lane, place, place + STEP - 1)
local due = int(now + tonumber(ARGV[2]))
for _, id in ipairs(ids) do
  redis.call('ZADD', due_key(id, site), 'XX', 'GT', due, id)
end
retime(site)
if #ids < STEP then
  return -1
end
return place + STEP
