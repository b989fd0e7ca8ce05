"""A mail server on the address given: it speaks first, as SMTP has it, and says on
standard output that it listens and what it received."""
import sys

from aiosmtpd.controller import Controller


class Print:
    async def handle_DATA(self, server, session, envelope):
        print("mail", envelope.mail_from, len(envelope.content), flush=True)
        return "250 OK"


host, port = sys.argv[1], int(sys.argv[2])
c = Controller(Print(), hostname=host, port=port)
c.start()
print("listening", flush=True)
sys.stdin.read()
c.stop()
