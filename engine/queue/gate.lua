-- with clock
-- with holding
-- with suppressed
-- gate: may these recipients of leased slices be written to, now (decision 7, T4)?
-- KEYS[1] prefix; ARGV for each slice: id, token, suppression tags of 12 bytes each, tag of the domain.
-- Answers standing, facts for each: standing is policy.gate.Standing or -1 for no answer, facts one byte a tag and only when it is CLEAR.
-- A lease is written back as it was, the first of a call: a store that can be read but not written (full disk, replica, out of memory)
-- raises here, before anything is answered, and no mail leaves that could not be settled.
-- Many slices a call: a script costs 15 us of worker and server before it does anything, as much as a slice of one.
local CLEAR, STALE, PAUSED, CANCELLED, EXPIRED, FROZEN, GONE = 0, 1, 2, 3, 4, 5, 6
local STANDING = { sending = CLEAR, accepted = CLEAR, expanding = CLEAR, paused = PAUSED, cancelled = CANCELLED,
  expired = EXPIRED, rejected = CANCELLED, lost = GONE }
local states, heard, proven = {}, nil, false
local halting = redis.call('EXISTS', prefix .. 'halt') == 1
local NO_ANSWER = -1
local NO_HALTS = { 0, 0, 0, 0 }

local function ask(id, token, tags, domain_tag)
  local lease = current(id, token)
  if not lease then
    return STALE, ''
  end
  if not proven then
    redis.call('HSET', prefix .. 'lease', id, lease)
    proven = true
  end
  local header = redis.call('GETRANGE', prefix .. 's:' .. id, 0, 66)
  if #header < 67 then
    return STALE, ''
  end
  local high, low = struct.unpack('>BI4', string.sub(header, 2, 6))
  local job = int(high * 4294967296 + low)
  local state = states[job]
  if not state then
    state = redis.call('HMGET', prefix .. 'j:' .. job, 'st', 'ac', 'li', 'to')
    states[job] = state
  end
  if not (tonumber(state[2] or nil) and tonumber(state[3] or nil) and tonumber(state[4] or nil)) then
    return GONE, ''
  end
  -- A word we do not know holds the mail back; it neither sends nor ends it.
  local standing = STANDING[state[1]] or PAUSED
  if standing == CLEAR or standing == PAUSED then
    local lane = string.sub(header, 57, 67)
    local halts = halting and redis.call('SMISMEMBER', prefix .. 'halt', 'a' .. state[2], 'j' .. job, 'l' .. lane, 'c' .. lane) or NO_HALTS
    if halts[4] == 1 then
      standing = CANCELLED
    elseif now >= struct.unpack('>I8', string.sub(header, 49, 56)) then
      standing = EXPIRED
    elseif halts[1] == 1 then
      standing = FROZEN
    elseif halts[2] == 1 or halts[3] == 1 then
      standing = PAUSED
    end
  end
  if standing ~= CLEAR then
    return standing, ''
  end
  if heard ~= job then
    scopes, heard = {}, job
    listen(state[2], state[3], state[4])
  end
  local domain = against(domain_tag)
  local facts = {}
  for at = 1, #tags, 12 do
    facts[#facts + 1] = string.char(math.max(domain, against(string.sub(tags, at, at + 11))))
  end
  return CLEAR, table.concat(facts)
end

local told = {}
for at = 1, #ARGV, 4 do
  -- What cannot be read of one slice is no answer for that one; a store that cannot be written is none for all.
  local heard_all, standing, facts = pcall(ask, ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3])
  told[#told + 1] = heard_all and standing or NO_ANSWER
  told[#told + 1] = heard_all and facts or ''
end
return told
