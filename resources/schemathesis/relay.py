# SPDX-License-Identifier: Apache-2.0
"""Serves brume's API on a TCP port, for tools that do not know unix sockets.

Usage: relay.py PORT BRUME [ARGUMENT...]

Starts brume with an API socket in the current directory, and again whenever a client has ended it
with PATCH /vm or its guest has. One connection is served at a time, with one request on it. That
brume ends in any other way ends the relay with status 1.
"""

import os
import signal
import socket
import subprocess
import sys
import time

API = "api.sock"
PATIENCE = 10


class Brume:
    """The process behind the port."""

    def __init__(self, command):
        self.command = command + ["--api-sock", API]
        self.process = None

    def connect(self):
        """A connection to the API of a process that runs."""
        if self.process is not None:
            status = self.process.poll()
            if status not in (None, 0):
                sys.exit(f"relay: brume ended with status {status}")
            if status == 0:
                self.process = None
        if self.process is None:
            self.start()
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(PATIENCE)
        stream.connect(API)
        return stream

    def start(self):
        """Starts a process and waits for its socket."""
        if os.path.exists(API):
            os.remove(API)
        with open("brume.out", "ab") as out:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        end = time.monotonic() + PATIENCE
        while not os.path.exists(API):
            if time.monotonic() > end or self.process.poll() is not None:
                sys.exit("relay: brume does not start; see brume.out")
            time.sleep(0.005)

    def stop(self):
        """Ends the process."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def read_request(client):
    """One request, as it came."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(65536)
        if not part:
            return data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    while len(body) < length:
        part = client.recv(65536)
        if not part:
            break
        body += part
    return head + b"\r\n\r\n" + body


def exchange(client, brume):
    """Takes a request to brume and the answer back."""
    request = read_request(client)
    if not request:
        return
    answer = b""
    with brume.connect() as api:
        try:
            api.sendall(request)
            # Brume closes the connection after the answer: each request asks for that.
            while part := api.recv(65536):
                answer += part
        except ConnectionError as error:
            # What did not read all of the request may still have answered it.
            print(f"relay: {request[:80]!r}: {error}", file=sys.stderr)
    client.sendall(answer)
    stops = request.startswith(b"PATCH /vm") and b"Stopped" in request
    if stops and answer.startswith(b"HTTP/1.1 204"):
        brume.process.wait(PATIENCE)


def main():
    port, command = int(sys.argv[1]), sys.argv[2:]
    brume = Brume(command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listener = socket.create_server(("127.0.0.1", port))
    try:
        while True:
            client, _ = listener.accept()
            with client:
                client.settimeout(PATIENCE)
                exchange(client, brume)
    finally:
        brume.stop()


if __name__ == "__main__":
    main()
