-- Fragment: how a slice waits. Its id begins with the letter of its index, so that moving it needs no look inside:
-- 'p' priority (D:<site>), 'c' campaign (d:<site>). idx holds for each site the earliest due of both.
local UNRESOLVED = '?'

-- Whether a header is of the layout these scripts were written for (its first byte). A newer program's slices are read
-- at no offset and changed in nothing here: they wait for that program (rolling restart).
local LAYOUT = 1
local function familiar(header)
  return string.byte(header) == LAYOUT
end

local function due_key(id, site)
  if string.byte(id) == 112 then
    return prefix .. 'D:' .. site
  end
  return prefix .. 'd:' .. site
end

-- Whether any lane of the partition has a site. Asked once a script: none gives the first one and asks afterwards.
local sited
local function is_sited()
  if sited == nil then
    sited = redis.call('EXISTS', prefix .. 'site') == 1
  end
  return sited
end

local function site_of(lane)
  return is_sited() and redis.call('HGET', prefix .. 'site', lane) or UNRESOLVED
end

local function enqueue(id, lane, site, due)
  local score = int(due)
  redis.call('ZADD', prefix .. 'l:' .. lane, score, id)
  redis.call('ZADD', due_key(id, site), score, id)
  redis.call('ZADD', prefix .. 'idx', 'LT', score, site)
end

-- A new slice: its own string, its place in the lane and in the due index. Never due after its expiry, so that
-- somebody looks at it in time to say "expired".
local function lay(data, due)
  local kind = 'c'
  if string.byte(data, 11) % 2 == 1 then
    kind = 'p'
  end
  local id = kind .. string.format('%x', redis.call('HINCRBY', prefix .. 'n', 'seq', 1))
  local lane = string.sub(data, 57, 67)
  local expires = struct.unpack('>I8', string.sub(data, 49, 56))
  redis.call('SET', prefix .. 's:' .. id, data)
  enqueue(id, lane, site_of(lane), math.max(now, math.min(due, expires)))
end

-- Passed over, because something it belongs to is paused: out of the way of a pick for PARK. The lane keeps the old
-- score, so that unpark.lua knows it from a slice that is really due later.
local PARK = 5000000
local function park(id, site, expires)
  redis.call('ZADD', due_key(id, site), int(math.min(now + PARK, expires)), id)
end

-- Back to waiting, from a lease. False for a slice of a newer layout, which stays leased.
local function hand_back(id, due)
  local header = redis.call('GETRANGE', prefix .. 's:' .. id, 0, 66)
  if #header == 67 and not familiar(header) then
    return false
  end
  redis.call('HDEL', prefix .. 'lease', id)
  if #header < 67 then
    return true
  end
  local lane = string.sub(header, 57, 67)
  local expires = struct.unpack('>I8', string.sub(header, 49, 56))
  enqueue(id, lane, site_of(lane), math.max(now, math.min(due, expires)))
  return true
end

local function retime(site)
  local first = redis.call('ZRANGE', prefix .. 'D:' .. site, 0, 0, 'WITHSCORES')[2]
  local second = redis.call('ZRANGE', prefix .. 'd:' .. site, 0, 0, 'WITHSCORES')[2]
  if first and second then
    first = math.min(tonumber(first), tonumber(second))
  else
    first = tonumber(first or second)
  end
  if first then
    redis.call('ZADD', prefix .. 'idx', int(first), site)
  else
    redis.call('ZREM', prefix .. 'idx', site)
  end
end
