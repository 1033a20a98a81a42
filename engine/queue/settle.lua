-- with clock
-- with index
-- with holding
-- settle: what became of recipients of leased slices, any subset of each, all or nothing a slice (T7).
-- KEYS[1] prefix; ARGV for each slice: id, token, done map, doubt map, event batch or '', number of retries, then
-- (delay, map, slice) a retry. Answers for each 0 stale, 1 kept, 2 gone; -1 when a retry names recipients of whom some
-- but not all were done before.
-- Maps are strings of 8 bytes, worked on byte by byte (a Lua number is a double and holds 53 bits); one SETRANGE is one
-- line in the append-only file where 64 SETBIT would be 64. Bits already set are not counted again, and a retry all of
-- whose recipients were done before is not laid again: the same call twice is the same as once, events included.
local NONE = '\0\0\0\0\0\0\0\0'

local function either(one, other)
  local bytes = {}
  for at = 1, 8 do
    bytes[at] = string.char(bit.bor(string.byte(one, at), string.byte(other, at)))
  end
  return table.concat(bytes)
end

local function both(one, other)
  local bytes = {}
  for at = 1, 8 do
    bytes[at] = string.char(bit.band(string.byte(one, at), string.byte(other, at)))
  end
  return table.concat(bytes)
end

local maps = {}

-- The map of a slice all of whose recipients are done.
local function whole(count)
  if not maps[count] then
    local bytes = {}
    for at = 0, 7 do
      local bits = math.max(0, math.min(8, count - 8 * at))
      bytes[#bytes + 1] = string.char((256 - 2 ^ (8 - bits)) % 256)
    end
    maps[count] = table.concat(bytes)
  end
  return maps[count]
end

local known_jobs = {}

local function is_known(job)
  if known_jobs[job] == nil then
    known_jobs[job] = redis.call('EXISTS', job) == 1
  end
  return known_jobs[job]
end

-- at: where the slice's arguments begin
local function settle(at)
  local id, retries = ARGV[at], at + 6
  local last = retries + 3 * tonumber(ARGV[at + 5]) - 1
  if not current(id, ARGV[at + 1]) then
    return 0
  end
  local key = prefix .. 's:' .. id
  local header = redis.call('GETRANGE', key, 0, 66)
  if #header < 67 then
    redis.call('HDEL', prefix .. 'lease', id)
    return 0
  end
  local done = string.sub(header, 17, 24)
  local fresh = {}
  for retry = retries, last, 3 do
    local known = both(done, ARGV[retry + 1])
    if known == NONE then
      fresh[#fresh + 1] = retry
    elseif known ~= ARGV[retry + 1] then
      return -1
    end
  end
  local doubt = string.sub(header, 25, 32)
  local new_done, new_doubt = ARGV[at + 2], ARGV[at + 3]
  if done ~= NONE then
    new_done = either(done, new_done)
  end
  if doubt ~= NONE then
    new_doubt = either(doubt, new_doubt)
  end
  local nothing_new = new_done == done and new_doubt == doubt and #fresh == 0
  if nothing_new and (ARGV[at + 2] ~= NONE or ARGV[at + 3] ~= NONE) then
    return 1
  end
  -- Events first: where a right is missing (ACL) the store stops a script in its middle, and told twice is folded, while
  -- a done bit without its event would be a recipient that nobody ever hears of.
  if ARGV[at + 4] ~= '' then
    redis.call('XADD', prefix .. 'ev', '*', 'b', ARGV[at + 4])
  end
  local count = string.byte(header, 9)
  local before = done == NONE and 0 or redis.call('BITCOUNT', key, 16, 23)
  local after = count
  if new_done ~= whole(count) then  -- else the slice is deleted below, and nobody reads its map any more
    redis.call('SETRANGE', key, 16, new_done .. new_doubt)
    after = redis.call('BITCOUNT', key, 16, 23)
  end
  local waiting = before - after
  for _, retry in ipairs(fresh) do
    lay(ARGV[retry + 2], now + tonumber(ARGV[retry]))
    waiting = waiting + string.byte(ARGV[retry + 2], 9)
  end
  local high, low = struct.unpack('>BI4', string.sub(header, 2, 6))
  local job = prefix .. 'j:' .. int(high * 4294967296 + low)
  if waiting ~= 0 and is_known(job) then
    redis.call('HINCRBY', job, 'w', waiting)
  end
  if after < count then
    return 1
  end
  local lane = string.sub(header, 57, 67)
  redis.call('DEL', key)
  redis.call('HDEL', prefix .. 'lease', id)
  redis.call('ZREM', prefix .. 'l:' .. lane, id)
  if is_sited() and redis.call('EXISTS', prefix .. 'l:' .. lane) == 0 then
    redis.call('HDEL', prefix .. 'site', lane, '<' .. lane)
  end
  return 2
end

local answers = {}
local at = 1
while at <= #ARGV do
  answers[#answers + 1] = settle(at)
  at = at + 6 + 3 * tonumber(ARGV[at + 5])
end
return answers
