"""Vendors' own Python clients (OpenAI, Anthropic, Triton), unmodified: what they return and
raise is the same with the model server as with a sidecar before it. What a sidecar answers
by itself is checked as well.

usage: model_clients.py SERVER SIDECAR CLIENT...   (host:port each; openai, anthropic, triton)
The models are org/model and tensors. Where OpenAI's and Anthropic's APIs are is told by
their own environment variables.
"""
import asyncio
import os
import queue
import sys

MODEL = "org/model"
got = []  # by the client that runs


def say(text):
    return [{"role": "user", "content": text}]


def same(what, value):
    got.append("%s: %r" % (what, value))


def check(what, value, want):
    if value != want:
        sys.exit("%s: got %r, want %r" % (what, value, want))


def raised(kind, call):
    try:
        returned = call()
    except kind as e:
        return e
    sys.exit("not raised: %r, but returned %r" % (kind, returned))


def of_openai(address, sidecar):
    import openai
    c = openai.OpenAI(max_retries=0)
    raw = c.chat.completions.with_raw_response.create(model=MODEL, messages=say("one two äöü"))
    same("chat", (raw.parse().model_dump(), raw.request_id))
    for text in ("one two äöü \u2028🙂", "odd framing"):
        parts = list(c.chat.completions.create(model=MODEL, messages=say(text), stream=True))
        same("stream of " + text, [p.model_dump() for p in parts])
    e = raised(openai.RateLimitError, lambda: c.chat.completions.create(model=MODEL, messages=say("429")))
    same("error", (e.body, e.code, e.response.headers["retry-after"], e.request_id))
    e = raised(openai.APIError, lambda: list(c.chat.completions.create(model=MODEL, messages=say("error event"), stream=True)))
    same("error in a stream", (type(e).__name__, e.message, e.code))
    again = openai.OpenAI(max_retries=2).chat.completions.create(model=MODEL, messages=say("503 at first"))
    same("after retries", again.model_dump())
    large = c.chat.completions.create(model=MODEL, messages=say("x" * (3 << 20)))
    same("large", len(large.choices[0].message.content))
    same("gzip", c.chat.completions.create(model=MODEL, messages=say("gzip")).choices[0].message.content)

    async def many():
        async with openai.AsyncOpenAI(max_retries=0) as a:
            return [r.choices[0].message.content for r in await asyncio.gather(
                *[a.chat.completions.create(model=MODEL, messages=say(str(i))) for i in range(20)])]
    same("many at once", asyncio.run(many()))
    cut = raised(Exception, lambda: list(c.chat.completions.create(model=MODEL, messages=say("cut"), stream=True)))
    if not sidecar:
        return
    check("version", raw.headers["x-outrigger-version"], "v1")
    check("lost stream", (isinstance(cut, openai.APIError), getattr(cut, "code", cut)), (True, "upstream_lost"))
    raised(openai.NotFoundError, lambda: c.chat.completions.create(model="org/nobody", messages=say("x")))
    for base in ("/v1", "/openai/v1", "/api/v1"):
        c = openai.OpenAI(max_retries=0, base_url="http://" + address + base)
        check(base + ": models", sorted(m.id for m in c.models.list()), [MODEL, "tensors"])
        check(base + ": model", c.models.retrieve(MODEL).id, MODEL)
        raised(openai.NotFoundError, lambda: c.models.retrieve("org/nobody"))


def of_anthropic(address, sidecar):
    import anthropic
    c = anthropic.Anthropic(max_retries=0)
    same("message", c.messages.create(model=MODEL, max_tokens=9, messages=say("x")).model_dump())
    with c.messages.stream(model=MODEL, max_tokens=9, messages=say("x")) as s:
        same("events", [e.type for e in s])
        same("message of events", s.get_final_message().model_dump())
    e = raised(anthropic.RateLimitError, lambda: c.messages.create(model=MODEL, max_tokens=9, messages=say("429")))
    same("anthropic error", (e.message, e.status_code))
    if not sidecar:
        return
    raised(anthropic.NotFoundError, lambda: c.messages.create(model="nobody", max_tokens=9, messages=say("x")))
    check("models", sorted(m.display_name for m in c.models.list()), [MODEL, "tensors"])
    check("model", c.models.retrieve(MODEL).id, MODEL)


def of_triton(address, sidecar):
    import numpy as np
    import tritonclient.grpc as triton_grpc
    import tritonclient.http as triton

    def tensor_of(kind, array):
        t = kind.InferInput("in", array.shape, "FP32")
        t.set_data_from_numpy(array)
        return [t]

    array = np.arange(6, dtype=np.float32)
    with triton.InferenceServerClient(address) as c:
        same("live, ready", (c.is_server_live(), c.is_server_ready(), c.is_model_ready("tensors")))
        for coding in (None, "gzip", "deflate"):
            r = c.infer("tensors", tensor_of(triton, array), request_id="7", request_compression_algorithm=coding)
            same("tensor, %s" % coding, (r.get_response(), r.as_numpy("in").tolist()))
    with triton_grpc.InferenceServerClient(address) as c:
        same("rpc: live, ready", (c.is_server_live(), c.is_server_ready(), c.is_model_ready("tensors")))
        for coding in (None, "gzip"):
            r = c.infer("tensors", tensor_of(triton_grpc, array), request_id="7", compression_algorithm=coding)
            same("rpc: tensor, %s" % coding, (r.get_response().id, r.as_numpy("in").tolist()))
        large = c.infer("tensors", tensor_of(triton_grpc, np.ones(2 << 20, dtype=np.float32)))
        same("rpc: large", large.as_numpy("in").sum())
        e = raised(triton_grpc.InferenceServerException, lambda: c.infer("tensors", tensor_of(triton_grpc, array), request_id="bad"))
        same("rpc: error", (e.status(), e.message()))
        e = raised(triton_grpc.InferenceServerException,
                   lambda: c.infer("tensors", tensor_of(triton_grpc, array), request_id="slow", client_timeout=0.2))
        same("rpc: deadline", e.status())
        answers = queue.Queue()
        c.start_stream(callback=lambda result, error: answers.put((result, error)))
        for k in ("1", "bad", "3"):
            c.async_stream_infer("tensors", tensor_of(triton_grpc, array), request_id=k, sequence_id=5)
        for _ in range(3):
            result, error = answers.get(timeout=60)
            same("rpc: stream", str(error) if error else (result.get_response().id, result.as_numpy("in").tolist()))
        c.stop_stream()


for name in sys.argv[3:]:
    client = {"openai": of_openai, "anthropic": of_anthropic, "triton": of_triton}[name]
    says = []
    for address in sys.argv[1:3]:
        os.environ.update(OPENAI_BASE_URL="http://%s/v1" % address, ANTHROPIC_BASE_URL="http://" + address)
        client(address, address == sys.argv[2])
        says.append(list(got))
        got.clear()
    for server, sidecar in zip(*says):
        check("through the sidecar", sidecar, server)
    print(name, len(says[0]), "answers")
print("PASS")
