-- Fragment: a waiting slice becomes a lease (T3). The first lease fixes the date of its messages. Answers what is written
-- into the header, date and token.
local function take(id, header, token, holder)
  local date = string.sub(header, 33, 40)
  if date == '\0\0\0\0\0\0\0\0' then
    date = struct.pack('>I8', now)
  end
  local stamp = date .. struct.pack('>I8', token)
  redis.call('SETRANGE', prefix .. 's:' .. id, 32, stamp)
  redis.call('HSET', prefix .. 'lease', id, int(token) .. ' ' .. holder)
  return stamp
end

-- After the last of a call: the indexes taken from, the highest token given, and a heartbeat for who has leases.
local function remember(touched, before, token, holder)
  for site in pairs(touched) do
    retime(site)
  end
  if token == before then
    return
  end
  redis.call('HSET', prefix .. 'n', 'tok', int(token))
  if redis.call('HEXISTS', prefix .. 'hold', holder) == 0 then
    redis.call('HSET', prefix .. 'hold', holder, redis.call('HINCRBY', prefix .. 'n', 'beat', 1))
  end
end
