-- The request that wrk sends, always the same: wrk [options] -s load.lua URL -- BODY_FILE ["Name: value" ...]
-- An empty BODY_FILE means an empty body. At the end one line tells what came of it; times are in microseconds.

function init(args)
   wrk.method = "PUT"
   wrk.headers["Content-Length"] = "0" -- as Go sends it; wrk puts the length of a body in its place
   if args[1] ~= "" then
      local file = assert(io.open(args[1], "rb"))
      wrk.body = file:read("*a")
      file:close()
   end
   for i = 2, #args do
      local name, value = args[i]:match("^([^:]+): (.*)$")
      wrk.headers[name] = value
   end
end

function done(summary, latency, requests)
   local errors = summary.errors
   print(string.format("RESULT requests=%d bytes=%d duration=%d p50=%d p99=%d connect=%d read=%d write=%d status=%d timeout=%d",
      summary.requests, summary.bytes, summary.duration, latency:percentile(50), latency:percentile(99),
      errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
