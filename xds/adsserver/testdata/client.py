"""A proxyless gRPC client of model "chat" over C-core. Reads one JSON command per line,
{"n": calls, "bucket": of the first call or -1 for none, "step": to the next, "parallel"},
makes the calls and answers with {"ok": …, "failed": …, "why": the last error}."""
import json, os, sys
from concurrent.futures import ThreadPoolExecutor

import grpc

channel = grpc.insecure_channel("xds:///model/chat")
check = channel.unary_unary("/grpc.health.v1.Health/Check", request_serializer=bytes, response_deserializer=bytes)


def call(bucket):
    metadata = [("x-outrigger-bucket", str(bucket))] if bucket >= 0 else None
    try:
        check(b"", metadata=metadata, timeout=20)
    except grpc.RpcError as e:
        return f"{e.code()} {e.details()}"


for line in sys.stdin:
    c = json.loads(line)
    buckets = [c["bucket"] + i * c["step"] for i in range(c["n"])]
    with ThreadPoolExecutor(c["parallel"]) as pool:
        errors = [e for e in pool.map(call, buckets) if e]
    print(json.dumps({"ok": c["n"] - len(errors), "failed": len(errors), "why": errors[-1] if errors else ""}), flush=True)
os._exit(0)  # not waiting for C-core's threads
