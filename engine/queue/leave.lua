-- with clock
-- leave: forget the heartbeat of a holder that goes, unless it still holds leases. KEYS[1] prefix; ARGV holder.
for _, lease in ipairs(redis.call('HVALS', prefix .. 'lease')) do
  if string.match(lease, '^%d+ (.*)$') == ARGV[1] then
    return 0
  end
end
return redis.call('HDEL', prefix .. 'hold', ARGV[1])
