// OpenAI's client for Node, unmodified and told of nothing but the model server: JSON,
// streams, its own retry, an error event and a stream that breaks off. Arguments: modules'
// folder, base URL, and the version that the mesh must say has answered, if it is to be part
// of it.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const [modules, baseURL, version] = process.argv.slice(2)
const { default: OpenAI } = await import(pathToFileURL(createRequire(modules + '/').resolve('openai')))
const c = new OpenAI({ baseURL, apiKey: 'k', maxRetries: 1 })
const ask = (text, stream) => ({ model: 'org/model', stream, messages: [{ role: 'user', content: text }] })
const read = async text => {
  let got = ''
  for await (const part of await c.chat.completions.create(ask(text, true))) got += part.choices[0]?.delta?.content ?? ''
  return got
}

const { data, response } = await c.chat.completions.create(ask('one two')).withResponse()
assert.equal(data.choices[0].message.content, 'one two')
assert.equal(response.headers.get('x-outrigger-version'), version ?? null)
assert.equal((await c.chat.completions.create(ask('503 at first'))).choices[0].message.content, '503 at first')
assert.equal((await c.chat.completions.create(ask('gzip'))).choices[0].message.content, 'gzip')
assert.equal(await read('one two three'), 'one two three')
await assert.rejects(read('error event'), e => e instanceof OpenAI.APIError && /the engine died/.test(e.message))
await assert.rejects(read('cut'), e => e instanceof Error)
await assert.rejects(c.chat.completions.create(ask('429'), { maxRetries: 0 }), e => e instanceof OpenAI.RateLimitError && e.code === 'busy')
console.log('PASS')
