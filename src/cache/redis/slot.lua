-- The slot of a key. It holds an entry (or a known absence, or a floor), a token, or both, as src/cache/layout.rs lays it out; all of its
-- changes are made here. A floor is the version of what went: the slot answers nothing, and refuses what is older, which may be late. Versions are compared as two unsigned halves: Lua's numbers are doubles, and the order of its strings depends on the
-- locale. What is not laid out so is not ours, and makes room.
--
-- KEYS     the slot; of what many callers ask at once, several
-- ARGV[1]  what to do; the others are told where it is done
local act = ARGV[1]
local NONE, ABSENT, FLOOR = string.rep('\0', 8), 4, 8
-- What is stamped and not in the store enters no empty slot later than the first; a floor is there for longer.
local TOKEN_MS, FLOOR_MS = 10000, '60000'
-- Looked up once: most of a script's time goes into finding functions. Numbers go to commands as text, for Lua's take a slow way there.
local call, pcall = redis.call, redis.pcall
local sub, byte, pack, unpack = string.sub, string.byte, struct.pack, struct.unpack
local HEAD_FIRST, HEAD_LAST, TOKEN_AT = '0', '49', '34'

-- The slot that is looked at, and what stands there.
local slot, head, ours, standing, floor, absent, token, token_until

local function look(at, bytes)
  slot, head = at, bytes
  local positive, format, flags = byte(head, 1), byte(head, 9, 10)
  ours = #head == 50 and format == 0xD2 and positive < 128
  standing, floor, absent, token, token_until = false, false, false, NONE, 0
  if ours then
    local version = sub(head, 1, 8)
    if version == NONE then absent = flags == ABSENT elseif flags == FLOOR then floor = version else standing = version end
    token = sub(head, 35, 42)
    if token ~= NONE then token_until = unpack('>I8', sub(head, 43, 50)) end
  end
end

local clock
local function now()
  if not clock then
    local time = call('TIME')
    clock = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return clock
end

-- Below 0 where version a is lower than b, above 0 where it is higher.
local function compare(a, b)
  local a_high, a_low = unpack('>I4I4', a)
  local b_high, b_low = unpack('>I4I4', b)
  if a_high ~= b_high then return a_high - b_high end
  return a_low - b_low
end

-- A header without a copy: a token alone, or a floor.
local function bare(version, flags, given, ending)
  return version .. string.char(0xD2, flags) .. string.rep('\0', 24) .. given .. ending
end

-- Leaves a token. What stands stays, and goes when it would have gone.
local function leave(given)
  local ending = pack('>I8', now() + TOKEN_MS)
  if standing or absent or floor then
    call('SETRANGE', slot, TOKEN_AT, given .. ending)
  else
    call('SET', slot, bare(NONE, 0, given, ending), 'PX', tostring(TOKEN_MS))
  end
end

-- Takes the token away. Where Redis has no room even for that, what stands beside it goes too.
local function clear()
  if not (standing or absent or floor) then
    call('UNLINK', slot)
  elseif token ~= NONE then
    local cleared = pcall('SETRANGE', slot, TOKEN_AT, NONE .. NONE)
    if type(cleared) == 'table' then call('UNLINK', slot) end
  end
end

-- Whatever the slot holds goes, and what is older than this version, or than the floor, does not come back.
local function sink(at, version)
  local set = pcall('SET', at, bare(version, FLOOR, NONE, NONE), 'PX', FLOOR_MS)
  if set.err then call('UNLINK', at) end
end

local function higher_of(a, b)
  if a and (not b or compare(a, b) > 0) then return a end
  return b
end

-- Puts a value in the place of all that stands. Whether Redis had room; where not, what is older does not go on answering. Once there was no
-- room nothing more is tried: Redis refuses a script for want of memory only until the script has changed something, and an UNLINK has.
local is_full = false
local function put(value, kept)
  local set = not is_full and pcall('SET', slot, value, 'PX', kept)
  if not set or set.err then
    is_full = true
    call('UNLINK', slot)
    return false
  end
  return true
end

-- Does something with each slot, and gathers the answers, nine bytes for each: a letter, and eight more. W: what stands is no string, nor ours.
-- What is to be `sunk` is so for whoever comes to its slot next, and is at the end, for the sake of `put`.
local sunk = {}
local function each(from, step, with)
  local answers = {}
  for number, at in ipairs(KEYS) do
    local bytes = sunk[at] and bare(sunk[at], FLOOR, NONE, NONE) or pcall('GETRANGE', at, HEAD_FIRST, HEAD_LAST)
    if type(bytes) == 'table' then
      answers[number] = 'W' .. NONE
    else
      look(at, bytes)
      answers[number] = with(from + (number - 1) * step)
    end
  end
  for at, version in pairs(sunk) do sink(at, version) end
  return table.concat(answers)
end

-- enter TOKEN ...: the tokens of writes, each at its slot. One that stands is shared, for nothing has come between since it was left. Answers
-- E and the version that stands, or eight zeros; then, behind all, the tokens.
if act == 'enter' then
  local tokens = {}
  local answers = each(2, 1, function(at)
    if token == NONE then token = ARGV[at] end
    leave(token)
    tokens[#tokens + 1] = token
    return 'E' .. (standing or NONE)
  end)
  return answers .. table.concat(tokens)
end

-- write CHANNEL ORIGIN, then MESSAGE TOKEN STAMPED VALUE KEPT ... for each slot: an entry lands over an older one and over an absence, or where
-- its token stands. With STAMPED, a time, it is accepted and not in the store: then it may also enter an empty slot up to ten seconds after,
-- above the floor if there is one; later it is not taken, and nothing is told, for it will come again. Whatever is older goes in any case, and
-- what did not land is the floor. Answers S and the version that stands, or eight zeros for none, or a floor that is higher; L: it came too
-- late; F: there is no room.
if act == 'write' then
  local told = { ARGV[3] }
  local answers = each(4, 5, function(at)
    local given, stamped, value, kept = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
    local version = sub(value, 1, 8)
    local known = standing or floor
    local ahead = known and compare(known, version)
    local tokened = token ~= NONE and token == given
    local fits = standing or tokened or (absent and stamped == '')
    if not fits and stamped ~= '' and ahead ~= 0 then
      if not (ahead and ahead > 0) and now() - tonumber(stamped) > TOKEN_MS then return 'L' .. NONE end
      fits = true
    end
    told[#told + 1] = ARGV[at]
    if ahead and ahead > 0 then return 'S' .. known end
    if fits then
      sunk[slot] = nil
      return put(value, kept) and 'S' .. version or 'F' .. NONE
    end
    sunk[slot] = version
    return 'S' .. NONE
  end)
  if #told > 1 then call('PUBLISH', ARGV[2], table.concat(told)) end
  return answers
end

look(KEYS[1], call('GETRANGE', KEYS[1], HEAD_FIRST, HEAD_LAST))

-- claim TOKEN: the token of a load, unless another's stands that has not ended. Answers 1 or 0, whether it stands now, and what else does.
if act == 'claim' then
  local mine = token == NONE or token_until <= now()
  if mine then leave(ARGV[2]) end
  if standing or absent then return (mine and '1' or '0') .. call('GET', slot) end
  return mine and '1' or '0'
end

-- release TOKEN: its load will not land.
if act == 'release' then
  if token == ARGV[2] then clear() end
  return ''
end

-- load TOKEN VALUE KEPT: what a load found in the store lands where its token stands, but for an absence over an entry, which may be
-- pending elsewhere. Answers 1 or 0, whether it stands now.
if act == 'load' then
  if token == NONE or token ~= ARGV[2] then return '0' end
  local given, known = sub(ARGV[3], 1, 8), standing or floor
  if known and (given == NONE or compare(known, given) > 0) then
    clear()
    return '0'
  end
  return put(ARGV[3], ARGV[4]) and '1' or '0'
end

-- All below are told to the other replicas: ARGV[2] is their channel, ARGV[3] the message.

-- drop CHANNEL MESSAGE VERSION: that version goes, for the store did not take it, and enters no empty slot; and the token, for whose load may
-- have found it. Answers 1 or 0, whether it stood.
if act == 'drop' then
  local stood = standing == ARGV[4]
  if standing and not stood then clear() else sink(slot, higher_of(floor, ARGV[4])) end
  call('PUBLISH', ARGV[2], ARGV[3])
  return stood and '1' or '0'
end

-- purge CHANNEL MESSAGE VERSION: what is older than the version goes, a known absence and the token with it.
if act == 'purge' then
  if standing and compare(standing, ARGV[4]) >= 0 then clear() else sink(slot, higher_of(floor, ARGV[4])) end
  call('PUBLISH', ARGV[2], ARGV[3])
  return ''
end

-- invalidate CHANNEL MESSAGE: all goes. Answers 1 or 0, whether a copy stood.
if act == 'invalidate' then
  local known = standing or floor
  if known then sink(slot, known) else call('UNLINK', slot) end
  call('PUBLISH', ARGV[2], ARGV[3])
  return (standing or absent) and '1' or '0'
end

return redis.error_reply('ERR unknown act')
