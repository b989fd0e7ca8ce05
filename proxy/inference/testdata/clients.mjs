// OpenAI's, Anthropic's and Ollama's own clients for Node, unmodified, against the
// sidecar: JSON, streams, retries and errors. Arguments: modules' folder, the sidecar's
// URL, and that of a sidecar whose model breaks off streams and refuses JSON.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const [modules, good, bad] = process.argv.slice(2)
const require = createRequire(modules + '/')
const load = name => import(pathToFileURL(require.resolve(name)))
const { default: OpenAI } = await load('openai')
const { default: Anthropic } = await load('@anthropic-ai/sdk')
const { Ollama } = await load('ollama')
const messages = [{ role: 'user', content: 'one two three' }]

async function openai() {
  const c = new OpenAI({ baseURL: good + '/v1', apiKey: 'k', maxRetries: 0 })
  const { data, response } = await c.chat.completions.create({ model: 'gpt', messages, user: 'u' }).withResponse()
  assert.equal(data.choices[0].message.content, 'one two three')
  assert.equal(response.headers.get('x-outrigger-version'), 'v1')
  let text = ''
  for await (const part of await c.chat.completions.create({ model: 'gpt', messages, stream: true })) text += part.choices[0]?.delta?.content ?? ''
  assert.equal(text.trim(), 'one two three')
  assert.deepEqual((await c.models.list()).data.map(m => m.id), ['gpt'])
  await assert.rejects(c.chat.completions.create({ model: 'nobody', messages }), e => e instanceof OpenAI.NotFoundError && e.code === 'model_not_found' && e.param === 'model')

  const broken = new OpenAI({ baseURL: bad + '/v1', apiKey: 'k', maxRetries: 1 })
  await assert.rejects(async () => { for await (const _ of await broken.chat.completions.create({ model: 'gpt', messages, stream: true })); },
    e => e instanceof OpenAI.APIError && /connection to the model was lost/.test(e.message))
  await assert.rejects(broken.chat.completions.create({ model: 'gpt', messages }), e => e instanceof OpenAI.InternalServerError && e.status === 503)
}

async function anthropic() {
  const c = new Anthropic({ baseURL: good, apiKey: 'k', maxRetries: 0 })
  const m = await c.messages.create({ model: 'gpt', max_tokens: 9, messages })
  assert.equal(m.content[0].text, 'a b c')
  assert.equal(m.usage.output_tokens, 3)
  const whole = await c.messages.stream({ model: 'gpt', max_tokens: 9, messages }).finalMessage()
  assert.equal(whole.content[0].text, 'a b c')
  await assert.rejects(c.messages.create({ model: 'nobody', max_tokens: 9, messages }), e => e instanceof Anthropic.NotFoundError && e.error.error.type === 'not_found_error')
}

async function ollama() {
  const c = new Ollama({ host: good })
  const m = await c.chat({ model: 'gpt', messages })
  assert.equal(m.message.content, 'a b c')
  let text = '', last
  for await (const part of await c.chat({ model: 'gpt', messages, stream: true })) { text += part.message.content; last = part }
  assert.equal(text, 'a b c')
  assert.equal(last.eval_count, 3)
  await assert.rejects(c.chat({ model: 'nobody', messages }), e => e.status_code === 404 && /does not exist/.test(e.message))
}

await openai()
await anthropic()
await ollama()
console.log('PASS')
