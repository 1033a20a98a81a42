-- Fragment: is this token the current lease of this slice? A lease reads "<token> <holder>".
local function current(id, token)
  local lease = redis.call('HGET', prefix .. 'lease', id)
  return lease and string.match(lease, '^(%d+) ') == token and lease
end
