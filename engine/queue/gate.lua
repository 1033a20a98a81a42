-- with clock
-- with holding
-- with suppressed
-- gate: may these recipients of a leased slice be written to, now (decision 7, T4)?
-- KEYS[1] prefix; ARGV id, token, suppression tags of 12 bytes each, tag of the domain.
-- Answers {standing, facts}: standing is policy.gate.Standing, facts one byte a tag and only when it is CLEAR.
-- The lease is written back as it was: a store that can be read but not written (full disk, replica, out of memory)
-- raises here, before anything is answered, and no mail leaves that could not be settled.
local CLEAR, STALE, PAUSED, CANCELLED, EXPIRED, FROZEN, GONE = 0, 1, 2, 3, 4, 5, 6
local STANDING = { sending = CLEAR, accepted = CLEAR, expanding = CLEAR, paused = PAUSED, cancelled = CANCELLED,
  expired = EXPIRED, rejected = CANCELLED, lost = GONE }
local id, tags = ARGV[1], ARGV[3]
local lease = current(id, ARGV[2])
if not lease then
  return { STALE, '' }
end
redis.call('HSET', prefix .. 'lease', id, lease)
local header = redis.call('GETRANGE', prefix .. 's:' .. id, 0, 66)
if #header < 67 then
  return { STALE, '' }
end
local high, low = struct.unpack('>BI4', string.sub(header, 2, 6))
local job = int(high * 4294967296 + low)
local state = redis.call('HMGET', prefix .. 'j:' .. job, 'st', 'ac', 'li', 'to')
if not (tonumber(state[2] or nil) and tonumber(state[3] or nil) and tonumber(state[4] or nil)) then
  return { GONE, '' }
end
-- A word we do not know holds the mail back; it neither sends nor ends it.
local standing = STANDING[state[1]] or PAUSED
if standing == CLEAR or standing == PAUSED then
  local halts = redis.call('SMISMEMBER', prefix .. 'halt', 'a' .. state[2], 'j' .. job, 'l' .. string.sub(header, 57, 67))
  if now >= struct.unpack('>I8', string.sub(header, 49, 56)) then
    standing = EXPIRED
  elseif halts[1] == 1 then
    standing = FROZEN
  elseif halts[2] == 1 or halts[3] == 1 then
    standing = PAUSED
  end
end
if standing ~= CLEAR then
  return { standing, '' }
end
listen(state[2], state[3], state[4])
local domain = against(ARGV[4])
local facts = {}
for at = 1, #tags, 12 do
  facts[#facts + 1] = string.char(math.max(domain, against(string.sub(tags, at, at + 11))))
end
return { CLEAR, table.concat(facts) }
