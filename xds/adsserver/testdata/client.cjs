// A proxyless gRPC client of model "chat" over grpc-js; the same commands as client.py.
// The first argument is the folder of installed modules.
const path = require('path')
const readline = require('readline')
const module_ = name => require(path.resolve(process.argv[2], name))
const grpc = module_('@grpc/grpc-js')
module_('@grpc/grpc-js-xds').register()

const client = new grpc.Client('xds:///model/chat', grpc.credentials.createInsecure())
const bytes = b => b
function call(bucket) {
  const metadata = new grpc.Metadata()
  if (bucket >= 0) metadata.set('x-outrigger-bucket', String(bucket))
  const deadline = Date.now() + 20000
  return new Promise(done => client.makeUnaryRequest('/grpc.health.v1.Health/Check', bytes, bytes, Buffer.alloc(0),
    metadata, { deadline }, err => done(err ? err.message : '')))
}

async function run(c) {
  let next = 0, failed = 0, why = ''
  const worker = async () => {
    while (next < c.n) {
      const err = await call(c.bucket + next++ * c.step)
      if (err) { failed++; why = err }
    }
  }
  await Promise.all(Array.from({ length: c.parallel }, worker))
  return { ok: c.n - failed, failed, why }
}

(async () => {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await run(JSON.parse(line))))
  }
  process.exit(0)
})()
