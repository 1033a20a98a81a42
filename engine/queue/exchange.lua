-- exchange: sealed entries of a stream give way to others, or to none (P-54).
-- KEYS[1] stream; ARGV '1' (small: built anew) or '0', then for each: id, SHA-1 of what is sealed in it as it was read,
-- what is to be sealed in it or '' for none, digest of the rows as they were handed in or ''.
-- Answers how many. Compare and swap: an entry that is gone or another by now stays as it is.
-- What XDEL takes stays in its block of a hundred entries or 4 KiB until the block is empty, and an RDB would keep it.
-- So a small stream is built anew with the same ids; in a large one the entries are large, each a block of its own: there
-- an entry that is replaced goes first and comes back at the end.
local wanted = {}
for at = 2, #ARGV, 4 do
  wanted[ARGV[at]] = at
end

-- The fields of an entry as they are to be, nil when it is to go; and whether that is a change.
local function changed(id, fields)
  local at = wanted[id]
  if not at then
    return fields, false
  end
  local place
  for i = 1, #fields, 2 do
    if fields[i] == 'sealed' then
      place = i + 1
    end
  end
  if not place or redis.sha1hex(fields[place]) ~= ARGV[at + 1] then
    return fields, false
  end
  if ARGV[at + 2] == '' then
    return nil, true
  end
  fields[place] = ARGV[at + 2]
  if ARGV[at + 3] ~= '' then
    for i = 1, #fields, 2 do
      if fields[i] == 'of' then
        return fields, true
      end
    end
    fields[#fields + 1] = 'of'
    fields[#fields + 1] = ARGV[at + 3]
  end
  return fields, true
end

local count = 0
if ARGV[1] == '1' then
  local kept = {}
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
    local fields, is_change = changed(entry[1], entry[2])
    if is_change then
      count = count + 1
    end
    if fields then
      kept[#kept + 1] = { entry[1], fields }
    end
  end
  if count > 0 then
    redis.call('DEL', KEYS[1])
    for _, entry in ipairs(kept) do
      redis.call('XADD', KEYS[1], entry[1], unpack(entry[2]))
    end
  end
  return count
end
for id in pairs(wanted) do
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], id, id)) do
    local fields, is_change = changed(id, entry[2])
    if is_change then
      count = count + 1
      redis.call('XDEL', KEYS[1], id)
      if fields then
        redis.call('XADD', KEYS[1], '*', unpack(fields))
      end
    end
  end
end
return count
