-- with clock
-- with index
-- with holding
-- release: a leased slice handed back, due after a delay. KEYS[1] prefix; ARGV id, token, delay in microseconds.
-- Answers 0 stale, 1 kept.
if not current(ARGV[1], ARGV[2]) then
  return 0
end
hand_back(ARGV[1], now + tonumber(ARGV[3]))
return 1
