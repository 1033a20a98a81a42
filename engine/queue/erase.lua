-- with clock
-- with index
-- erase: people leave waiting slices: their rows are blank, their end is told, in one step (P-54, I6). Compare and swap as
-- in reseal.lua: header and nonce are still those that were read, and nobody has leased it.
-- KEYS[1] prefix; ARGV cap of the event stream, then for each slice: id, header and nonce as they were read, the slice
-- as it is to be or '' when nobody is left in it, how many leave who were not done before, event batch or ''.
-- Answers for each 1 done, 0 it is leased, gone or another by now, -1 the event stream is at its cap.
-- A slice that was swapped has another nonce, so the same call twice is once, events included.
local cap = tonumber(ARGV[1])
local answers, touched = {}, {}

-- Nobody is left: out of its lane and of the index it waits in (one whose lane is being moved may be in another).
local function forget(id, lane)
  redis.call('DEL', prefix .. 's:' .. id)
  redis.call('ZREM', prefix .. 'l:' .. lane, id)
  for _, site in ipairs({ site_of(lane), UNRESOLVED }) do
    if redis.call('ZREM', due_key(id, site), id) == 1 then
      touched[site] = true
      break
    end
  end
  if is_sited() and redis.call('EXISTS', prefix .. 'l:' .. lane) == 0 then
    redis.call('HDEL', prefix .. 'site', lane, '<' .. lane)
  end
end

local function erase(id, seen, data, leaving, events)
  local key = prefix .. 's:' .. id
  if redis.call('HEXISTS', prefix .. 'lease', id) == 1
    or not familiar(seen) or redis.call('GETRANGE', key, 0, #seen - 1) ~= seen then
    return 0
  end
  if events ~= '' then
    if redis.call('XLEN', prefix .. 'ev') >= cap then
      return -1
    end
    -- Events first, as in settle.lua: told twice is folded, a done bit without its event would be a row that never ends.
    redis.call('XADD', prefix .. 'ev', '*', 'b', events)
  end
  if data == '' then
    forget(id, string.sub(seen, 57, 67))
  else
    redis.call('SET', key, data)
  end
  local high, low = struct.unpack('>BI4', string.sub(seen, 2, 6))
  local job = prefix .. 'j:' .. int(high * 4294967296 + low)
  if leaving > 0 and redis.call('EXISTS', job) == 1 then
    redis.call('HINCRBY', job, 'w', -leaving)
  end
  return 1
end

for at = 2, #ARGV, 5 do
  answers[#answers + 1] = erase(ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3]), ARGV[at + 4])
end
for site in pairs(touched) do
  retime(site)
end
return answers
