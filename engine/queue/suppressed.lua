-- Fragment: what is known against a tag. A bucket is a hash: 12-byte tag -> cells of 6 bytes, scope (1), number of the
-- scope (4), reason (1); scopes: 1 platform, 2 account, 3 list, 4 topic (written by policy.suppression).
-- Fails closed: what cannot be read as cells, an unknown scope or an empty reason counts as 3, restricted.
local RESTRICTED = 3
local scopes = {}

local function listen(account, list, topic)
  for scope, number in pairs({ [2] = account, [3] = list, [4] = topic }) do
    if tonumber(number) > 0 then
      scopes[struct.pack('>BI4', scope, tonumber(number))] = true
    end
  end
end

local function against(tag)
  local first, second = string.byte(tag, 1, 2)
  local cells = redis.call('HGET', prefix .. 'x:' .. (first * 4 + math.floor(second / 64)), tag)
  if not cells then
    return 0
  end
  if #cells == 0 or #cells % 6 ~= 0 then
    return RESTRICTED
  end
  local worst = 0
  for at = 1, #cells, 6 do
    local scope = string.byte(cells, at)
    if scope == 1 or scope == 0 or scope > 4 or scopes[string.sub(cells, at, at + 4)] then
      local reason = string.byte(cells, at + 5)
      if scope == 0 or scope > 4 or reason == 0 then
        reason = RESTRICTED
      end
      worst = math.max(worst, reason)
    end
  end
  return worst
end
