-- The one bucket rule of the mesh, for requests no sidecar has stamped:
-- bucket = (murmur3_32(length-prefixed salt, unit) * 10000) >> 32.
-- The table "models" (name -> salt, unit rule) is put before this text by xds/translate.
local bit = require("bit")
local band, bxor, rol, lshift, rshift, tobit = bit.band, bit.bxor, bit.rol, bit.lshift, bit.rshift, bit.tobit

-- The low 32 bits of a product; a double is exact to 53 bits, so it is made of halves.
local function mul(a, b)
  return tobit(band(a, 0xffff) * b + lshift(tobit(rshift(a, 16) * b), 16))
end

local function murmur(s)
  local h, n = 0, #s
  local whole = n - n % 4
  for i = 1, whole, 4 do
    local a, b, c, d = s:byte(i, i + 3)
    local k = mul(tobit(a + b * 0x100 + c * 0x10000 + d * 0x1000000), 0xcc9e2d51)
    h = tobit(rol(bxor(h, mul(rol(k, 15), 0x1b873593)), 13) * 5 + 0xe6546b64)
  end
  if whole < n then
    local a, b, c = s:byte(whole + 1, n)
    local k = mul(a + (b or 0) * 0x100 + (c or 0) * 0x10000, 0xcc9e2d51)
    h = bxor(h, mul(rol(k, 15), 0x1b873593))
  end
  h = bxor(h, n)
  h = mul(bxor(h, rshift(h, 16)), 0x85ebca6b)
  h = mul(bxor(h, rshift(h, 13)), 0xc2b2ae35)
  return bxor(h, rshift(h, 16)) % 0x100000000
end

local function bucket(salt, unit)
  local n = #salt
  local prefix = string.char(n % 0x100, math.floor(n / 0x100) % 0x100, 0, 0)
  return math.floor(murmur(prefix .. salt .. unit) * 10000 / 0x100000000)
end

local function header(headers, name)
  local v = headers:getAtIndex(name, 0)
  if v ~= nil and v ~= "" then return v end
end

-- What is randomised: the same sources in the same order as in a sidecar.
local asked = 0
local function unit(rule, handle, headers, body)
  local u = header(headers, "x-user-id") or body["safety_identifier"] or body["user"] or body["user_id"]
  if u or rule == "user" then return u end
  u = header(headers, "x-session-id") or body["prompt_cache_key"] or body["sequence_id"]
  if u or rule ~= "request" then return u end
  u = header(headers, "x-request-id") or header(headers, "idempotency-key")
  if u then return u end
  asked = asked + 1 -- nobody recognises this request again: any number will do
  return handle:timestampString(EnvoyTimestampResolution.MICROSECOND) .. tostring(models) .. asked
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local body = handle:streamInfo():dynamicMetadata():get("outrigger") or {}
  local name = header(headers, "x-outrigger-model") or body["model"]
  local model = name and models[name]
  headers:remove("x-outrigger-scope")
  headers:remove("x-outrigger-arm")
  headers:replace("x-outrigger-capture", model and name or "*")
  if model then
    headers:replace("x-outrigger-scope", name)
    local stamped = tonumber(header(headers, "x-outrigger-bucket") or "")
    if not stamped or stamped < 0 or stamped >= 10000 or stamped % 1 ~= 0 then
      headers:remove("x-outrigger-bucket")
      local u = unit(model[2], handle, headers, body)
      if u then
        headers:replace("x-outrigger-bucket", tostring(bucket(model[1], u)))
      else
        headers:replace("x-outrigger-arm", "unassigned")
      end
    end
  end
  handle:clearRouteCache()
end
