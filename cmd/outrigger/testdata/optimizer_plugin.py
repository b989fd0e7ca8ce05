"""An optimiser written in Python, as a plugin: python optimizer_plugin.py STUBS [FLAW].

STUBS is where the modules generated from optimizer.proto are. It prints its address and
serves until standard input ends. It is a (1+1) evolution strategy: it moves one step from
the best setting, shorter as the budget is used up. With FLAW "coin" it does not go by its
seed.
"""

import concurrent.futures
import math
import random
import sys

sys.path.insert(0, sys.argv[1])
import grpc  # noqa: E402
from google.protobuf import json_format  # noqa: E402
from outrigger.v1 import optimizer_pb2, optimizer_pb2_grpc  # noqa: E402

FLAW = sys.argv[2] if len(sys.argv) > 2 else ""


class Search:
    def __init__(self, start):
        self.params, self.budget = list(start.params), start.budget
        self.random = random.SystemRandom() if FLAW == "coin" else random.Random(start.seed)
        self.first = json_format.MessageToDict(start.start) if start.HasField("start") else None
        self.asked, self.pending, self.best = 0, {}, None

    def value(self, p, before):
        share = self.asked / self.budget
        step = 0.3 * math.exp(-4 * share)
        if p.kind == "boolean":
            return self.random.random() < 0.5 if before is None or self.random.random() < 0.2 else before
        if p.kind == "categorical":
            return self.random.choice(list(p.choices)) if before is None or self.random.random() < 0.2 else before
        low, high = (math.log(p.min), math.log(p.max)) if p.log else (p.min, p.max)
        if before is None:
            x = self.random.uniform(low, high)
        else:
            x = self.random.gauss(math.log(before) if p.log else before, step * (high - low))
        x = min(max(x, low), high)
        x = min(max(math.exp(x) if p.log else x, p.min), p.max)
        return round(x) if p.kind == "int" else x

    def ask(self, n):
        for _ in range(min(n, self.budget - self.asked)):
            if self.asked == 0 and self.first is not None:
                setting = self.first
            else:
                start = self.best[1] if self.best and self.asked > 6 else {}
                setting = {p.name: self.value(p, start.get(p.name)) for p in self.params}
            self.asked += 1
            self.pending[self.asked] = setting
            trial = optimizer_pb2.OptimizerTrial(id=self.asked)
            trial.params.update(setting)
            yield trial

    def tell(self, results):
        for r in results:
            setting = self.pending.pop(r.id)
            if not r.failed and (self.best is None or r.loss < self.best[0]):
                self.best = (r.loss, setting)


class Plugin(optimizer_pb2_grpc.OptimizerPluginServicer):
    def Describe(self, request, context):
        return optimizer_pb2.OptimizerInfo(
            id="py_evolution", name="(1+1) evolution strategy", family="evolutionary",
            kinds=["float", "int", "categorical", "boolean"], noise=True, min_budget=20, max_budget=1000, parallel=1)

    def Optimize(self, questions, context):
        search = None
        for q in questions:
            kind = q.WhichOneof("question")
            if kind == "start":
                search = Search(q.start)
                yield optimizer_pb2.OptimizerAnswer(started=optimizer_pb2.OptimizerStarted())
            elif search is None:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first question is not start")
            elif kind == "ask":
                yield optimizer_pb2.OptimizerAnswer(trials=optimizer_pb2.OptimizerTrials(trials=search.ask(q.ask.n)))
            else:
                search.tell(q.tell.results)
                yield optimizer_pb2.OptimizerAnswer(told=optimizer_pb2.OptimizerTold())


server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=16))
optimizer_pb2_grpc.add_OptimizerPluginServicer_to_server(Plugin(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(f"127.0.0.1:{port}", flush=True)
sys.stdin.read()
server.stop(0)
