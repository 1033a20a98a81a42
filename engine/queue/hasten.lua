-- with clock
-- with index
-- with taking
-- hasten: waiting slices of what was cancelled are leased wherever they wait, due or not, whatever their site says:
-- somebody has to write their recipients' end, and that needs no connection.
-- KEYS[1] prefix; ARGV holder, cap of the event stream, ids. Answers {full, {id, site, lane, token, slice, ...}}.
local holder, cap = ARGV[1], tonumber(ARGV[2])
local taken, jobs, touched = {}, {}, {}
local full = 0
if redis.call('XLEN', prefix .. 'ev') >= cap then
  full = 1
end
local before = tonumber(redis.call('HGET', prefix .. 'n', 'tok') or 0)
local token = before

local function cancelled(header, lane)
  local high, low = struct.unpack('>BI4', string.sub(header, 2, 6))
  local job = int(high * 4294967296 + low)
  if jobs[job] == nil then
    jobs[job] = redis.call('HGET', prefix .. 'j:' .. job, 'st') == 'cancelled'
  end
  return jobs[job] or redis.call('SISMEMBER', prefix .. 'halt', 'c' .. lane) == 1
end

-- Out of the due index it waits in. One whose lane is being moved may be in another: lease.lua puts that right.
local function drawn(id, lane)
  for _, site in ipairs({ site_of(lane), UNRESOLVED }) do
    if redis.call('ZREM', due_key(id, site), id) == 1 then
      touched[site] = true
      return site
    end
  end
end

if full == 0 then
  for at = 3, #ARGV do
    local id = ARGV[at]
    local header = redis.call('GETRANGE', prefix .. 's:' .. id, 0, 66)
    local lane = string.sub(header, 57, 67)
    if #header == 67 and familiar(header) and redis.call('HEXISTS', prefix .. 'lease', id) == 0 and cancelled(header, lane) then
      local site = drawn(id, lane)
      if site then
        token = token + 1
        take(id, header, token, holder)
        local n = #taken
        taken[n + 1], taken[n + 2], taken[n + 3], taken[n + 4] = id, site, lane, token
        taken[n + 5] = redis.call('GET', prefix .. 's:' .. id)
      end
    end
  end
  remember(touched, before, token, holder)
end
return { full, taken }
