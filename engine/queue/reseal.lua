-- with clock
-- reseal: waiting slices move to another key (decision 3). Compare and swap: header and nonce are still those that were
-- read and nobody has leased it since; then only key id and sealed part change. Due, maps, date and token stay.
-- KEYS[1] prefix; ARGV (id, header and nonce as they were read, the slice under its new key) each. Answers how many.
local count = 0
for at = 1, #ARGV, 3 do
  local id, seen = ARGV[at], ARGV[at + 1]
  local key = prefix .. 's:' .. id
  if redis.call('HEXISTS', prefix .. 'lease', id) == 0
    and redis.call('GETRANGE', key, 0, #seen - 1) == seen then
    redis.call('SET', key, ARGV[at + 2])
    count = count + 1
  end
end
return count
