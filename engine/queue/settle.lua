-- with clock
-- with index
-- with holding
-- settle: what became of recipients of a leased slice, any subset, all or nothing (T7).
-- KEYS[1] prefix; ARGV id, token, done map, doubt map, event batch or '', then (delay, map, slice) a retry.
-- Answers 0 stale, 1 kept, 2 gone; -1 when a retry names recipients of whom some but not all were done before.
-- Maps are strings of 8 bytes, worked on byte by byte (a Lua number is a double and holds 53 bits); one SETRANGE is one
-- line in the append-only file where 64 SETBIT would be 64. Bits already set are not counted again, and a retry all of
-- whose recipients were done before is not laid again: the same call twice is the same as once, events included.
local NONE = '\0\0\0\0\0\0\0\0'
local id = ARGV[1]
if not current(id, ARGV[2]) then
  return 0
end
local key = prefix .. 's:' .. id
local header = redis.call('GETRANGE', key, 0, 66)
if #header < 67 then
  redis.call('HDEL', prefix .. 'lease', id)
  return 0
end

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

local done = string.sub(header, 17, 24)
local fresh = {}
for at = 6, #ARGV, 3 do
  local known = both(done, ARGV[at + 1])
  if known == NONE then
    fresh[#fresh + 1] = at
  elseif known ~= ARGV[at + 1] then
    return -1
  end
end
local doubt = string.sub(header, 25, 32)
local new_done, new_doubt = either(done, ARGV[3]), either(doubt, ARGV[4])
local nothing_new = new_done == done and new_doubt == doubt and #fresh == 0
if nothing_new and (ARGV[3] ~= NONE or ARGV[4] ~= NONE) then
  return 1
end
local before = redis.call('BITCOUNT', key, 16, 23)
redis.call('SETRANGE', key, 16, new_done .. new_doubt)
local after = redis.call('BITCOUNT', key, 16, 23)
local waiting = before - after
for _, at in ipairs(fresh) do
  lay(ARGV[at + 2], now + tonumber(ARGV[at]))
  waiting = waiting + string.byte(ARGV[at + 2], 9)
end
if ARGV[5] ~= '' then
  redis.call('XADD', prefix .. 'ev', '*', 'b', ARGV[5])
end
local high, low = struct.unpack('>BI4', string.sub(header, 2, 6))
local job = prefix .. 'j:' .. int(high * 4294967296 + low)
if waiting ~= 0 and redis.call('EXISTS', job) == 1 then
  redis.call('HINCRBY', job, 'w', waiting)
end
if after < string.byte(header, 9) then
  return 1
end
local lane = string.sub(header, 57, 67)
redis.call('DEL', key)
redis.call('HDEL', prefix .. 'lease', id)
redis.call('ZREM', prefix .. 'l:' .. lane, id)
if redis.call('EXISTS', prefix .. 'l:' .. lane) == 0 then
  redis.call('HDEL', prefix .. 'site', lane, '<' .. lane)
end
return 2
