// The OpenFeature SDK with its OFREP provider against a sidecar: what it evaluates, as JSON.
import { createRequire } from 'node:module';
const [base, modules] = process.argv.slice(2);
const require = createRequire(modules + '/');
const { OpenFeature } = require('@openfeature/server-sdk');
const { OFREPProvider } = require('@openfeature/ofrep-provider');

await OpenFeature.setProviderAndWait(new OFREPProvider({ baseUrl: base }));
const client = OpenFeature.getClient();
const out = {};
for (const targetingKey of ['ann', 'ben', 'cat', 'dan']) {
  const ctx = { targetingKey };
  const enabled = await client.getBooleanDetails('ab.enabled', false, ctx);
  out[targetingKey] = {
    variant: enabled.variant, reason: enabled.reason, enabled: enabled.value,
    temperature: await client.getNumberValue('ab.temperature', -1, ctx),
    prompt: await client.getStringValue('ab.prompt', 'none', ctx),
    all: await client.getObjectValue('ab', {}, ctx),
  };
}
const unknown = await client.getBooleanDetails('zz', true, { targetingKey: 'ann' });
out.unknown = { value: unknown.value, code: unknown.errorCode };
const nobody = await client.getBooleanDetails('ab.enabled', true, {});
out.nobody = { value: nobody.value, code: nobody.errorCode };
console.log(JSON.stringify(out));
await OpenFeature.close();
