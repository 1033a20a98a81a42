-- inherit: what a dead consumer of the intake held is its heir's, old at once so that the next look takes it as a new
-- delivery, and the dead one's name is forgotten (T1). KEYS[1] stream; ARGV group, dead, heir, idle in milliseconds.
-- Answers how many entries. One script: forgetting a name forgets its entries, and a last command of the dead may
-- still be on its way here.
local count = 0
while true do
  local held = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000, ARGV[2])
  if #held == 0 then
    break
  end
  local command = { 'XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0 }
  for _, entry in ipairs(held) do
    command[#command + 1] = entry[1]
  end
  command[#command + 1] = 'IDLE'
  command[#command + 1] = ARGV[4]
  command[#command + 1] = 'JUSTID'
  redis.call(unpack(command))
  count = count + #held
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return count
