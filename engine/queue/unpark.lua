-- with clock
-- with index
-- unpark: slices that lease.lua passed over because something was paused are due now, after a resume.
-- KEYS[1] prefix; ARGV sites and slices of each that are looked at, at most. Answers how many there were; what is beyond
-- the limits comes by itself within PARK, and what is still paused is parked again by the next lease.
local sites, slices = tonumber(ARGV[1]), tonumber(ARGV[2])
local count = 0
for _, site in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'idx', '-inf', int(now + PARK), 'LIMIT', 0, sites)) do
  for _, index in ipairs({ 'D:', 'd:' }) do
    local key = prefix .. index .. site
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. int(now), int(now + PARK), 'LIMIT', 0, slices)) do
      local lane = redis.call('GETRANGE', prefix .. 's:' .. id, 56, 66)
      local due = redis.call('ZSCORE', prefix .. 'l:' .. lane, id)
      if due and tonumber(due) <= now then
        redis.call('ZADD', key, int(now), id)
        count = count + 1
      end
    end
  end
  retime(site)
end
return count
