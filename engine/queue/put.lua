-- with clock
-- with index
-- put: one chunk's share of this partition (T2). The watermark bit and everything it stands for in one script.
-- KEYS[1] prefix; ARGV job, chunk, account, list, topic, priority, expires, hold|resend, buckets, state, slices,
-- then (due microseconds, slice) a slice, then event batches. Answers 1, or 0 when the chunk had been put before.
local MEMBERS = 2000  -- of one ZADD: a Lua call takes some 8,000 arguments

-- As `lay` in index.lua for every slice of the chunk, with one command where that needs one each: a long tail has a
-- thousand slices a chunk. first: where the first (due, slice) stands.
local function lay_all(first, slices)
  if slices == 0 then
    return
  end
  local number = redis.call('HINCRBY', prefix .. 'n', 'seq', slices) - slices
  local sites, dues, soonest = {}, {}, {}
  for at = first, first + 2 * slices - 2, 2 do
    local data = ARGV[at + 1]
    number = number + 1
    local id = (string.byte(data, 11) % 2 == 1 and 'p' or 'c') .. string.format('%x', number)
    local lane = string.sub(data, 57, 67)
    local score = math.max(now, math.min(tonumber(ARGV[at]), (struct.unpack('>I8', string.sub(data, 49, 56)))))
    sites[lane] = sites[lane] or site_of(lane)
    local site = sites[lane]
    redis.call('SET', prefix .. 's:' .. id, data)
    redis.call('ZADD', prefix .. 'l:' .. lane, int(score), id)
    local key = due_key(id, site)
    dues[key] = dues[key] or {}
    local members = dues[key]
    members[#members + 1] = int(score)
    members[#members + 1] = id
    if #members >= MEMBERS then
      redis.call('ZADD', key, unpack(members))
      dues[key] = {}
    end
    soonest[site] = math.min(soonest[site] or score, score)
  end
  for key, members in pairs(dues) do
    if #members > 0 then
      redis.call('ZADD', key, unpack(members))
    end
  end
  for site, score in pairs(soonest) do
    redis.call('ZADD', prefix .. 'idx', 'LT', int(score), site)
  end
end

local job, chunk, slices = ARGV[1], ARGV[2], tonumber(ARGV[11])
if redis.call('SETBIT', prefix .. 'w:' .. job, chunk, 1) == 1 then
  return 0
end
local state = prefix .. 'j:' .. job
if redis.call('EXISTS', state) == 0 then
  -- Cancelled while this share was made, when this partition knew nothing of the job yet.
  local standing = ARGV[10]
  if redis.call('SISMEMBER', prefix .. 'halt', 'x' .. job) == 1 then
    standing = 'cancelled'
  end
  redis.call('HSET', state, 'ac', ARGV[3], 'li', ARGV[4], 'to', ARGV[5], 'pr', ARGV[6], 'ex', ARGV[7],
    'id', ARGV[8], 'nb', ARGV[9], 'st', standing, 'w', '0')
end
local count = 0
lay_all(12, slices)
for at = 13, 12 + 2 * slices, 2 do
  count = count + string.byte(ARGV[at], 9)
end
if count > 0 then
  redis.call('HINCRBY', state, 'w', count)
end
for at = 12 + 2 * slices, #ARGV do
  redis.call('XADD', prefix .. 'ev', '*', 'b', ARGV[at])
end
return 1
