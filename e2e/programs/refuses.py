"""A tunnel's process that says hello to its agent and refuses everything else.

    refuses.py SOCKET       listens there until it is ended
"""

import os
import socket
import struct
import sys


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def read_varint(data):
    number = shift = at = 0
    while True:
        number |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return number, data[at:]


def answer(request):
    # Fields of ToTunnel and FromTunnel (node-proxy/proto/tunnel.proto): 1 is the request's number, 2 the hello.
    number, rest = read_varint(request[1:])
    said = b"\x08" + varint(number)
    if rest[:1] == b"\x12":
        return said + b"\x18" + varint(os.getpid())
    why = b"not today"
    return said + b"\x12" + varint(len(why)) + why


def exactly(stream, size):
    data = b""
    while len(data) < size:
        part, descriptors, _, _ = socket.recv_fds(stream, size - len(data), 64)
        for descriptor in descriptors:
            os.close(descriptor)
        if not part:
            return None
        data += part
    return data


listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listens", flush=True)
while True:
    stream, _ = listener.accept()
    while head := exactly(stream, 8):
        size, _ = struct.unpack("!II", head)
        said = answer(exactly(stream, size))
        stream.sendall(struct.pack("!II", len(said), 0) + said)
    stream.close()
