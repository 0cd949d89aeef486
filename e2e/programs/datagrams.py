"""Datagrams whose every loss a scenario can know.

    datagrams.py serve PORT                          echoes UDP on both address families
    datagrams.py hold FIRST NUMBER                   takes so many UDP ports and does nothing with them
    datagrams.py udp HOST PORT SIZE TEXT [FROM]      sends some, each with TEXT in it, and writes how many were answered
    datagrams.py icmp HOST SIZE TEXT                 the same with echo requests
    datagrams.py keep HOST PORT TEXT                 sends one every 5 ms until SIGTERM, and then writes what was answered
"""

import errno
import json
import os
import select
import signal
import socket
import struct
import sys
import time

NUMBER = 20
PATIENCE = 5.0


def say(**what):
    print(json.dumps(what), flush=True)


def take(port):
    sockets = []
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        sock = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sockets.append(sock)
    return sockets


def hold(first, number):
    held = [take(port) for port in range(first, first + number)]
    say(holds=len(held))
    signal.pause()


def serve(port):
    sockets = take(port)
    say(listens=port)
    while True:
        for sock in select.select(sockets, [], [])[0]:
            data, peer = sock.recvfrom(65535)
            try:
                sock.sendto(data, peer)
            except OSError as e:
                say(error=e.strerror)


def body(number, size, text):
    head = struct.pack("!I", number) + text.encode()
    return head + bytes(max(size - len(head), 0))


def udp(host, port, size, text, source=None):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if source:
        sock.bind((source, 0))
    sock.connect((host, port))
    answered = set()
    for _ in range(2):
        errors = set()
        for number in set(range(NUMBER)) - answered:
            try:
                sock.send(body(number, size, text))
            except OSError as e:
                errors.add(e.strerror)
            collect(sock, answered, errors, 0.02)
        # Told that a packet was too big, one sends again (RFC 8201 section 5.2); the kernel knows by now.
        if errors != {os.strerror(errno.EMSGSIZE)}:
            break
        errors.clear()
    collect(sock, answered, errors, PATIENCE, NUMBER)
    say(sent=NUMBER, answered=len(answered), errors=sorted(errors))


def collect(sock, answered, errors, patience, enough=None):
    """Reads answers for so long, or until there are enough."""
    end = time.monotonic() + patience
    while (left := end - time.monotonic()) > 0 and (enough is None or len(answered) < enough):
        if not select.select([sock], [], [], left)[0]:
            return
        try:
            answered.add(struct.unpack("!I", sock.recv(65535)[:4])[0])
        except OSError as e:
            errors.add(e.strerror)


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def icmp(host, size, text):
    six = ":" in host
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
    request, reply = (128, 129) if six else (8, 0)
    sock = socket.socket(family, socket.SOCK_RAW, protocol)
    own = os.getpid() & 0xFFFF
    answered = set()
    for number in range(NUMBER):
        message = struct.pack("!BBHHH", request, 0, 0, own, number) + body(number, size, text)
        if not six:
            message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]
        sock.sendto(message, (host, 0))
        end = time.monotonic() + (PATIENCE if number == 0 else 1)
        while number not in answered and (left := end - time.monotonic()) > 0:
            if not select.select([sock], [], [], left)[0]:
                break
            data = sock.recv(65535)
            data = data if six else data[(data[0] & 15) * 4:]
            kind, _, _, who, which = struct.unpack("!BBHHH", data[:8])
            if (kind, who) == (reply, own):
                answered.add(which)
    say(sent=NUMBER, answered=len(answered))


def keep(host, port, text):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.connect((host, port))
    running = [True]
    signal.signal(signal.SIGTERM, lambda *_: running.clear())
    answered, errors, number, told = set(), set(), 0, 0
    while running:
        try:
            sock.send(body(number, 100, text))
        except OSError as e:
            errors.add(e.strerror)
        number += 1
        collect(sock, answered, errors, 0.005)
        if len(answered) >= told + 100:
            told = len(answered)
            say(progress=told)
    collect(sock, answered, errors, PATIENCE, number)
    missing = [n for n in range(number) if n not in answered]
    say(sent=number, answered=len(answered), lost=missing[:50], errors=sorted(errors))


def main():
    what, *rest = sys.argv[1:]
    if what == "serve":
        serve(int(rest[0]))
    elif what == "hold":
        hold(int(rest[0]), int(rest[1]))
    elif what == "udp":
        udp(rest[0], int(rest[1]), int(rest[2]), *rest[3:])
    elif what == "icmp":
        icmp(rest[0], int(rest[1]), rest[2])
    else:
        keep(rest[0], int(rest[1]), rest[2])


main()
