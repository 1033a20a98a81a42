-- with clock
-- with index
-- with taking
-- with step
-- lease: due slices of the sites named, and of lanes without a site (T3).
-- KEYS[1] prefix; ARGV holder, cap of the event stream, limit of ready, wanted unresolved, then (site, wanted);
-- wanted is a number, "p" and a number for transactional slices alone, "c" and a number for those of campaigns alone.
-- Answers {now, full, {id, site, lane, token, slice, others of its lane, ...}, {site, due, ...}, strangers}.
-- A pick is bounded: it looks at no more than it wants and LOOK more, so what it passes over must move out of the way:
-- a slice of something paused or halted is parked for PARK, one whose lane has moved goes to its site's index, one of a
-- newer layout is put off for PARK and counted as a stranger.
local LOOK = 32
local holder, cap = ARGV[1], tonumber(ARGV[2])
local taken, jobs, touched = {}, {}, {}
local full, strangers = 0, 0
if redis.call('XLEN', prefix .. 'ev') >= cap then
  full = 1
end
local before = tonumber(redis.call('HGET', prefix .. 'n', 'tok') or 0)
local token = before
local halting = redis.call('EXISTS', prefix .. 'halt') == 1

local function halted(what)
  return redis.call('SISMEMBER', prefix .. 'halt', what) == 1
end

local ENDED = { cancelled = true, expired = true, rejected = true, lost = true }
local lanes_resting = {}

-- Paused by its job's state, or halted by account, job or lane. What is cancelled, by job or by lane, and an unknown
-- job are leased whatever is halted beside: somebody has to write their recipients' end.
local function resting(header, lane)
  local high, low = struct.unpack('>BI4', string.sub(header, 2, 6))
  local job = int(high * 4294967296 + low)
  if jobs[job] == nil then
    local state = redis.call('HMGET', prefix .. 'j:' .. job, 'st', 'ac')
    if ENDED[state[1]] then
      jobs[job] = 'over'
    else
      jobs[job] = state[1] == 'paused'
        or (halting and (halted('j' .. job) or (state[2] and halted('a' .. state[2])))) or false
    end
  end
  if jobs[job] == 'over' or not halting then
    return jobs[job] == true
  end
  if lanes_resting[lane] == nil then
    lanes_resting[lane] = halted('c' .. lane) and 'over' or halted('l' .. lane)
  end
  return lanes_resting[lane] ~= 'over' and (jobs[job] or lanes_resting[lane])
end

local function pick(site, asked, one_a_lane)
  local kind, wanted = string.match(asked, '^([pc]?)(%d+)$')
  wanted = tonumber(wanted)
  local urgent = kind == 'c' and {}
    or redis.call('ZRANGEBYSCORE', prefix .. 'D:' .. site, '-inf', int(now), 'LIMIT', 0, wanted + LOOK)
  local plain = kind == 'p' and {}
    or redis.call('ZRANGEBYSCORE', prefix .. 'd:' .. site, '-inf', int(now), 'LIMIT', 0, wanted + LOOK)
  local u, p, lanes = 1, 1, {}
  while wanted > 0 and (urgent[u] or plain[p]) do
    local id
    if urgent[u] and (not plain[p] or token % 4 ~= 3) then
      id, u = urgent[u], u + 1
    else
      id, p = plain[p], p + 1
    end
    local key = prefix .. 's:' .. id
    -- Slices of lanes without a site are small, most of them: read whole at once. Of the others the header decides first.
    local header = one_a_lane and (redis.call('GET', key) or '') or redis.call('GETRANGE', key, 0, 66)
    local lane = string.sub(header, 57, 67)
    if #header < 67 then
      redis.call('ZREM', due_key(id, site), id)
    elseif not familiar(header) then
      redis.call('ZADD', due_key(id, site), int(now + PARK), id)
      strangers = strangers + 1
    elseif not (one_a_lane and lanes[lane]) then
      local home = site_of(lane)
      local expires = struct.unpack('>I8', string.sub(header, 49, 56))
      if home ~= site then
        redis.call('ZREM', due_key(id, site), id)
        enqueue(id, lane, home, now)
        touched[home] = true
      elseif now < expires and resting(header, lane) then
        park(id, site, expires)
      else
        token = token + 1
        wanted = wanted - 1
        lanes[lane] = true
        redis.call('ZREM', due_key(id, site), id)
        local stamp = take(id, header, token, holder)
        local n = #taken
        taken[n + 1], taken[n + 2], taken[n + 3], taken[n + 4] = id, site, lane, token
        taken[n + 5] = one_a_lane and string.sub(header, 1, 32) .. stamp .. string.sub(header, 49) or redis.call('GET', key)
        taken[n + 6] = site == UNRESOLVED and redis.call('ZCARD', prefix .. 'l:' .. lane) - 1 or 0
      end
    end
  end
  touched[site] = true
end

follow_clock()
if full == 0 then
  for at = 5, #ARGV, 2 do
    pick(ARGV[at], ARGV[at + 1], false)
  end
  if tonumber(ARGV[4]) > 0 then
    pick(UNRESOLVED, ARGV[4], true)
  end
  remember(touched, before, token, holder)
end
local ready = {}
local limit = tonumber(ARGV[3])
if limit > 0 then
  ready = redis.call('ZRANGE', prefix .. 'idx', 0, limit - 1, 'WITHSCORES')
  if redis.call('ZCARD', prefix .. 'idx') > limit then
    local others = redis.call('ZRANDMEMBER', prefix .. 'idx', limit, 'WITHSCORES')
    for at = 1, #others do
      ready[#ready + 1] = others[at]
    end
  end
end
return { now, full, taken, ready, strangers }
