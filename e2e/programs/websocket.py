"""A WebSocket echo server and client (RFC 6455), as much of it as one conversation needs.

    websocket.py serve PORT
    websocket.py call HOST PORT TEXT    writes what came back
"""

import base64
import hashlib
import os
import socket
import struct
import sys
import threading

MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3


def accept_key(key):
    return base64.b64encode(hashlib.sha1(key + MAGIC).digest())


def read_head(stream):
    lines = []
    while (line := stream.readline().rstrip(b"\r\n")) or not lines:
        lines.append(line)
    return lines[0], dict((k.strip().lower(), v.strip()) for k, _, v in (line.partition(b":") for line in lines[1:]))


def read_frame(stream):
    first, second = stream.read(2)
    length = second & 0x7F
    if length == 126:
        (length,) = struct.unpack(">H", stream.read(2))
    elif length == 127:
        (length,) = struct.unpack(">Q", stream.read(8))
    mask = stream.read(4) if second & 0x80 else bytes(4)
    data = stream.read(length)
    return first & 0x0F, bytes(b ^ mask[i % 4] for i, b in enumerate(data))


def frame(opcode, data, mask):
    head = bytes([0x80 | opcode])
    bit = 0x80 if mask else 0
    if len(data) < 126:
        head += bytes([bit | len(data)])
    elif len(data) < 1 << 16:
        head += bytes([bit | 126]) + struct.pack(">H", len(data))
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", len(data))
    if mask:
        key = os.urandom(4)
        return head + key + bytes(b ^ key[i % 4] for i, b in enumerate(data))
    return head + data


def converse(conn):
    with conn, conn.makefile("rb") as stream:
        _, headers = read_head(stream)
        conn.sendall(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
                     b"sec-websocket-accept: " + accept_key(headers[b"sec-websocket-key"]) + b"\r\n\r\n")
        # The server speaks first here, so that the stream is seen to be open in both directions.
        conn.sendall(frame(1, b"hello", False))
        while True:
            opcode, data = read_frame(stream)
            conn.sendall(frame(opcode, data, False))
            if opcode == 8:
                return


def serve(port):
    server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        conn, _ = server.accept()
        threading.Thread(target=converse, args=(conn,), daemon=True).start()


def call(host, port, text):
    key = base64.b64encode(os.urandom(16))
    conn = socket.create_connection((host, port), timeout=20)
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    conn.sendall(b"GET /chat HTTP/1.1\r\nhost: " + authority.encode() + b"\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
                 b"sec-websocket-version: 13\r\nsec-websocket-key: " + key + b"\r\n\r\n")
    stream = conn.makefile("rb")
    status, headers = read_head(stream)
    assert b" 101 " in status, status
    assert headers[b"sec-websocket-accept"] == accept_key(key), headers
    assert read_frame(stream) == (1, b"hello")
    for size in (len(text), 1000, 100_000):
        sent = (text * size)[:size].encode()
        conn.sendall(frame(1, sent, True))
        assert read_frame(stream) == (1, sent), size
    conn.sendall(frame(8, struct.pack(">H", 1000), True))
    assert read_frame(stream)[0] == 8
    assert stream.read() == b"", "the server said something after its close"
    print(text)


if sys.argv[1] == "serve":
    serve(int(sys.argv[2]))
else:
    call(sys.argv[2], int(sys.argv[3]), sys.argv[4])
