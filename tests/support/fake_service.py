"""A stand-in for any service: `python fake_service.py KIND`, led by FAKE_* environment variables.

The gateway answers `/health`. FAKE_DIES names a kind that ends with status 3: at once, or when a
file FAKE_DIES_AT is there. FAKE_STUBBORN names a kind that ignores SIGTERM.
"""

import http.server
import os
import signal
import sys
import threading
import time
from pathlib import Path


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(kind: str) -> None:
    say(f"{kind} says hello")
    if os.environ.get("FAKE_STUBBORN") == kind:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if kind == "gateway" and "FAKE_SICK" not in os.environ:
        address = os.environ["LEMIX_HOST"], int(os.environ["LEMIX_PORT"])
        threading.Thread(target=http.server.HTTPServer(address, Health).serve_forever, daemon=True).start()
    while True:
        if os.environ.get("FAKE_DIES") == kind and Path(os.environ.get("FAKE_DIES_AT", "/")).exists():
            say("this is why")
            os._exit(3)
        time.sleep(0.01)


main(sys.argv[1])
