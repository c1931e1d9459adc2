"""Answers every request with nothing, a while after it came: what makes nginx wait, run by s3.py.

python slow_answers.py SECONDS; prints its port.
"""

from __future__ import annotations

import asyncio
import sys

_ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while await reader.readuntil(b"\r\n\r\n"):
            await asyncio.sleep(float(sys.argv[1]))
            writer.write(_ANSWER)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
