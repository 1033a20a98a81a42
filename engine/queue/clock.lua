-- Fragment. now: microseconds by Redis TIME, the only clock of the scripts. int(n): digits of a whole number; Lua's
-- own tostring turns 1.7e15 into "1.7e+15", which neither SETRANGE nor a sorted set would survive.
local prefix = KEYS[1]
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function int(n)
  return string.format('%.0f', n)
end
