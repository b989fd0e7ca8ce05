"""Both ends of WebSocket connections by the library websockets, unmodified. `serve ADDRESS`
is an echo until its standard input ends; `ask URL...` talks to it and says PASS."""
import asyncio
import sys

import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve as listen

big = bytes(range(256)) * 8192  # 2 MiB


async def echo(ws):
    try:
        async for message in ws:
            if message == "close":
                await ws.close(4001, "as asked")
            elif message == "break":
                ws.transport.abort()
            elif message == "first":  # the server speaks unasked
                for n in range(100):
                    await ws.send(f"{n}")
            else:
                await ws.send(message)
    except websockets.ConnectionClosed:
        pass  # the client knows how it should have ended


async def serve(address):
    host, port = address.rsplit(":", 1)
    host = host.strip("[]")
    async with listen(echo, host, int(port), subprotocols=["chat"], max_size=None):
        print("listening", flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def ask(url):
    for compression in ("deflate", None):
        async with connect(url, subprotocols=["chat"], compression=compression, max_size=None, proxy=None) as ws:
            assert ws.subprotocol == "chat"
            for message in ("", "hello", "grüße", big.decode("latin1"), b"", b"\x00\xff", big):
                await ws.send(message)
                assert await ws.recv() == message
            await ws.send(iter(["in ", "three ", "frames"]))
            assert await ws.recv() == "in three frames"
            await ws.send("first")
            assert [await ws.recv() for _ in range(100)] == [str(n) for n in range(100)]
            pong = await ws.ping(b"are you there")
            assert await pong >= 0
            await asyncio.gather(*(ws.send(f"{n}") for n in range(50)))
            assert sorted([await ws.recv() for _ in range(50)], key=int) == [str(n) for n in range(50)]
        assert ws.close_code == 1000, ws.close_code
    async with connect(url, subprotocols=["chat"], proxy=None) as ws:
        await ws.send("close")
        try:
            await ws.recv()
            raise AssertionError("still open")
        except websockets.ConnectionClosedError as e:
            assert (e.rcvd.code, e.rcvd.reason) == (4001, "as asked"), e
    async with connect(url, subprotocols=["chat"], proxy=None) as ws:
        await ws.close(3000, "had enough")
        assert ws.close_code == 3000
    async with connect(url, subprotocols=["chat"], proxy=None) as ws:
        await ws.send("break")
        try:
            await ws.recv()
            raise AssertionError("still open")
        except websockets.ConnectionClosedError as e:
            assert e.rcvd is None, e


async def main():
    role, *rest = sys.argv[1:]
    if role == "serve":
        return await serve(*rest)
    for url in rest:
        await asyncio.wait_for(ask(url), 60)
    print("PASS")


asyncio.run(main())
