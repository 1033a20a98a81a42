-- with clock
-- with suppressed
-- facts: what is known against the rows of one chunk, before they are queued (decision 7, T2).
-- KEYS[1] prefix; ARGV job, chunk, buckets, account, list, topic, rows of 32 bytes (mref 8, tag 12, domain tag 12).
-- Answers one byte a row. Duplicates first: the mref belongs to the chunk that asked first, so a repeat of that chunk
-- (a crash between facts and put) is told the same, and of two rows of one mref exactly one is judged by suppression.
local DUPLICATE = 6
local job, chunk, buckets, rows = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[7]
listen(ARGV[4], ARGV[5], ARGV[6])
local facts, seen, domains = {}, {}, {}
for at = 1, #rows, 32 do
  local mref = string.sub(rows, at, at + 7)
  local fact
  if seen[mref] then
    fact = DUPLICATE
  else
    seen[mref] = true
    local bucket = prefix .. 'u:' .. job .. ':' .. int(struct.unpack('>I4', string.sub(mref, 1, 4)) % buckets)
    if redis.call('HSETNX', bucket, mref, chunk) == 0 and redis.call('HGET', bucket, mref) ~= chunk then
      fact = DUPLICATE
    else
      local domain = string.sub(rows, at + 20, at + 31)
      if not domains[domain] then
        domains[domain] = against(domain)
      end
      fact = math.max(against(string.sub(rows, at + 8, at + 19)), domains[domain])
    end
  end
  facts[#facts + 1] = string.char(fact)
end
return table.concat(facts)
