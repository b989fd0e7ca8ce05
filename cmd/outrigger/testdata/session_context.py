"""The calls of the published Python variable client (SessionContext of snakepit v0.4.3),
made anew from its wire protocol with grpcio and stubs generated from the .proto file.
Nothing in here knows of the mesh: addresses and stubs are all it is given.

usage: session_context.py STUBS ADDRESS
"""
import json
import pickle
import sys
import threading
import time

sys.path.insert(0, sys.argv[1])

import grpc  # noqa: E402
from google.protobuf import any_pb2  # noqa: E402
from snakepit import snakepit_bridge_pb2 as pb  # noqa: E402
from snakepit import snakepit_bridge_pb2_grpc as rpc  # noqa: E402

PREFIX = "type.googleapis.com/snakepit."


def encode(kind, value):
    return any_pb2.Any(type_url=PREFIX + kind, value=json.dumps(value).encode())


def infer(value):
    for kind, types in (("boolean", bool), ("integer", int), ("float", float), ("string", str), ("embedding", list)):
        if isinstance(value, types):
            return kind
    raise TypeError(type(value))


class SessionContext:
    def __init__(self, channel, session, ttl=5.0):
        self.__dict__.update(stub=rpc.BridgeServiceStub(channel), session=session, ttl=ttl, cache={}, calls=[])
        # The constructor asks for tools; the stub of the published file has the call.
        tools = channel.unary_unary("/snakepit.bridge.BridgeService/GetExposedElixirTools",
                                    request_serializer=lambda b: b, response_deserializer=lambda b: b)
        self.__dict__["tools"] = tools(pb.GetSessionRequest(session_id=session).SerializeToString())

    def initialize(self):
        try:
            return self.stub.InitializeSession(pb.InitializeSessionRequest(session_id=self.session)).success
        except grpc.RpcError as e:
            if e.code() != grpc.StatusCode.ALREADY_EXISTS:
                raise
            return False

    def _get(self, name):
        hit = self.cache.get(name)
        if hit and time.monotonic() < hit[1]:
            return hit[0]
        self.calls.append("Get")
        v = self.stub.GetVariable(pb.GetVariableRequest(session_id=self.session, variable_identifier=name)).variable
        for key in (v.id, v.name):
            self.cache[key] = (v, time.monotonic() + self.ttl)
        return v

    def _forget(self, v):
        self.cache.pop(v.id, None)
        self.cache.pop(v.name, None)

    def get_variable(self, name):
        return json.loads(self._get(name).value.value)

    def update_variable(self, name, value):
        v = self._get(name)
        self.calls.append("Set")
        r = self.stub.SetVariable(pb.SetVariableRequest(session_id=self.session, variable_identifier=v.id,
                                                        value=encode(v.type, value), metadata={"source": "python"}))
        self._forget(v)
        if not r.success:
            raise RuntimeError(r.error_message)
        return r.new_version

    def register_variable(self, name, kind, value, constraints=None):
        self.calls.append("Register")
        r = self.stub.RegisterVariable(pb.RegisterVariableRequest(
            session_id=self.session, name=name, type=kind, initial_value=encode(kind, value),
            constraints_json=json.dumps(constraints) if constraints else ""))
        if not r.success:
            raise RuntimeError(r.error_message)
        return r.variable_id

    def __setitem__(self, name, value):
        try:
            self.update_variable(name, value)
        except Exception as e:
            if "not found" not in str(e).lower():
                raise
            self.register_variable(name, infer(value), value)

    def __getitem__(self, name):
        return self.get_variable(name)

    __getattr__ = __getitem__
    __setattr__ = __setitem__

    def __contains__(self, name):
        return any(v.name == name for v in self.stub.ListVariables(pb.ListVariablesRequest(session_id=self.session, pattern="*")).variables)

    def update_variables(self, values):
        self.calls.append("GetVariables")
        got = self.stub.GetVariables(pb.BatchGetVariablesRequest(session_id=self.session, variable_identifiers=list(values), include_metadata=True))
        if got.missing_variables:
            raise KeyError("Variables not found: %s" % list(got.missing_variables))
        updates = {name: encode(v.type, values[name]) for name, v in got.variables.items()}
        for v in got.variables.values():
            self._forget(v)
        self.calls.append("SetVariables")
        r = self.stub.SetVariables(pb.BatchSetVariablesRequest(session_id=self.session, updates=updates, atomic=False))
        return dict(r.errors)


def check(what, got, want):
    if got != want:
        sys.exit("%s: got %r, want %r" % (what, got, want))
    print("ok", what)


def refused(what, code, text, call):
    try:
        call()
    except grpc.RpcError as e:
        check(what, (e.code(), text in e.details()), (code, True))
        return
    sys.exit("%s: not refused" % what)


def main():
    channel = grpc.insecure_channel(sys.argv[2])
    grpc.channel_ready_future(channel).result(timeout=20)
    ctx = SessionContext(channel, "py-job")
    check("tools without a tool server", ctx.__dict__["tools"], b"")
    check("the first read of an unknown session", "temperature" in ctx, False)
    check("a session that exists is tolerated", ctx.initialize(), False)

    # Dictionary access registers what is missing, with the inferred type.
    ctx["temperature"] = 0.7
    check("auto-registered", ctx["temperature"], 0.7)
    check("calls so far", ctx.__dict__["calls"], ["Get", "Register", "Get"])
    ctx["temperature"] = 0.9
    check("set and read", ctx["temperature"], 0.9)
    ctx.prompt = "antworte in einem Satz – ohne Umlaute? äöü"
    check("attribute access", ctx.prompt, "antworte in einem Satz – ohne Umlaute? äöü")
    for name, value in {"tries": 3, "flag": True, "vec": [1.0, 2.5]}.items():
        ctx[name] = value
        check("type of " + name, ctx[name], value)
    check("contains", ("tries" in ctx, "none" in ctx), (True, False))

    check("batch", ctx.update_variables({"temperature": 0.1, "tries": 4}), {})
    check("after the batch", (ctx["temperature"], ctx["tries"]), (0.1, 4))
    ctx.register_variable("top_p", "float", 0.5, {"min": 0, "max": 1})
    check("batch with a bad value", list(ctx.update_variables({"top_p": 1.5, "tries": 5})), ["top_p"])
    check("the good part happened", (ctx["top_p"], ctx["tries"]), (0.5, 5))
    refused("constraint", grpc.StatusCode.INVALID_ARGUMENT, "value 1.5 is above maximum 1.0", lambda: ctx.update_variable("top_p", 1.5))
    refused("unknown name", grpc.StatusCode.NOT_FOUND, "Variable not found: nobody", lambda: ctx.get_variable("nobody"))

    # Another client sees a write at once, unless it keeps its own copy.
    other = SessionContext(channel, "py-job", ttl=0.0)
    for i in range(50):
        ctx.update_variable("tries", i)
        if other["tries"] != i:
            sys.exit("write %d: the other client read %r" % (i, other["tries"]))
    print("ok another client sees every write")

    # Bytes that only Python understands, and that run code when loaded, stay bytes.
    blob = pickle.dumps({"weights": list(range(5000))})
    stub = ctx.__dict__["stub"]
    about = any_pb2.Any(type_url=PREFIX + "tensor.binary",
                        value=json.dumps({"shape": [5000], "dtype": "float64", "binary_format": "pickle", "type": "tensor"}).encode())
    stub.RegisterVariable(pb.RegisterVariableRequest(session_id="py-job", name="blob", type="tensor", initial_value=about, initial_binary_value=blob))
    v = stub.GetVariable(pb.GetVariableRequest(session_id="py-job", variable_identifier="blob")).variable
    check("binary", (v.binary_value == blob, v.value.type_url, v.value.value), (True, about.type_url, about.value))

    # Whatever compression grpcio can be told to use.
    text = "wort " * 5000
    ctx.prompt = "kurz"
    for coding in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        r = stub.SetVariable(pb.SetVariableRequest(session_id="py-job", variable_identifier="prompt", value=encode("string", text)), compression=coding)
        v = stub.GetVariable(pb.GetVariableRequest(session_id="py-job", variable_identifier="prompt"), compression=coding).variable
        check("compressed by %s" % coding, (r.success, json.loads(v.value.value) == text), (True, True))

    # Watch from another thread.
    updates = stub.WatchVariables(pb.WatchVariablesRequest(session_id="py-job", variable_identifiers=["temperature"], include_initial_values=True), timeout=20)
    first = next(updates)
    check("watch: initial", (first.update_type, first.variable.value.value), ("initial_value", b"0.1"))
    writer = threading.Thread(target=lambda: ctx.update_variable("temperature", 0.2))
    writer.start()
    second = next(updates)
    writer.join()
    check("watch: change", (second.update_type, second.variable.value.value), ("value_change", b"0.2"))
    updates.cancel()

    # Where answers come from is in the metadata.
    deadline = time.monotonic() + 20
    while True:
        _, call = stub.GetVariable.with_call(pb.GetVariableRequest(session_id="py-job", variable_identifier="tries"))
        head = dict(call.initial_metadata())
        if head["x-outrigger-tier"] == "process" or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    check("tier", (head["x-outrigger-tier"], head["x-outrigger-feed"], head["x-outrigger-version"]), ("process", "live", "52"))
    check("cleanup", stub.CleanupSession(pb.CleanupSessionRequest(session_id="py-job")).success, True)
    print("PASS")


main()
