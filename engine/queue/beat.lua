-- with clock
-- beat: the heartbeat counter of a holder moves (decision 6). It takes the next number of the partition, so that a
-- counter forgotten and begun again never reads what somebody saw before. KEYS[1] prefix; ARGV holder.
return redis.call('HSET', prefix .. 'hold', ARGV[1], redis.call('HINCRBY', prefix .. 'n', 'beat', 1))
