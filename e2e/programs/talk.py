"""Small TCP servers and clients whose every step a scenario can know.

    talk.py serve BEHAVIOUR PORT         listens on both address families and writes one JSON line per connection
    talk.py call BEHAVIOUR HOST PORT [N] connects and writes one JSON line about what happened
    talk.py kind KIND HOST PORT          asks an echo server over a socket of this kind
"""

import ctypes
import errno
import hashlib
import json
import mmap
import os
import select
import socket
import struct
import sys
import threading
import time

RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 seconds: close() sends RST (tcp(7))
BLOCK = bytes(range(256)) * 256


def say(**what):
    print(json.dumps(what), flush=True)


def read_all(conn):
    """Everything up to the end of the stream: (bytes, hash)."""
    count, digest = 0, hashlib.sha256()
    while data := conn.recv(1 << 18):
        count += len(data)
        digest.update(data)
    return count, digest.hexdigest()


def write_blocks(conn, count):
    """Sends count bytes; returns their hash."""
    digest, left = hashlib.sha256(), count
    while left:
        part = BLOCK[:left] if left < len(BLOCK) else BLOCK
        conn.sendall(part)
        digest.update(part)
        left -= len(part)
    return digest.hexdigest()


def read_exactly(conn, count):
    digest, left = hashlib.sha256(), count
    while left:
        data = conn.recv(min(left, 1 << 18))
        if not data:
            raise EOFError(f"the stream ended {left} bytes early")
        left -= len(data)
        digest.update(data)
    return digest.hexdigest()


# ---- servers: one function per behaviour, called with each connection

def serve_echo(conn):
    while data := conn.recv(1 << 16):
        conn.sendall(data)


def serve_banner(conn):
    conn.sendall(b"220 welcome\r\n")
    serve_echo(conn)


def serve_web(conn):
    """Answers every request of an HTTP/1.1 connection without a body."""
    while request := conn.recv(1 << 16):
        if request.endswith(b"\r\n\r\n"):
            conn.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


def serve_silent(conn):
    """Listens and never answers."""
    read_all(conn)


def serve_reset(conn):
    conn.recv(1)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)


def serve_answer_after_end(conn):
    """Answers only after the client closed its sending half."""
    count, digest = read_all(conn)
    conn.sendall(json.dumps({"count": count, "sha256": digest}).encode())


def serve_end_first(conn):
    """Closes its own sending half at once and then reads to the end."""
    conn.sendall(b"all I have to say")
    conn.shutdown(socket.SHUT_WR)
    count, digest = read_all(conn)
    say(received=count, sha256=digest)


def serve_swap(conn):
    """Reads a length, then sends and receives that many bytes at the same time."""
    count = int.from_bytes(conn.recv(8, socket.MSG_WAITALL), "big")
    result = {}
    sender = threading.Thread(target=lambda: result.update(sent=write_blocks(conn, count)))
    sender.start()
    result["received"] = read_exactly(conn, count)
    sender.join()
    say(count=count, **result)
    conn.sendall(b"!")


def serve_flood(conn):
    """Sends for as long as anybody takes it."""
    while True:
        conn.sendall(BLOCK)


def serve_listen_to_reset(conn):
    """Says how the client's end shows."""
    conn.sendall(b"go")
    try:
        end = "eof" if not conn.recv(1) else "data"
    except ConnectionResetError:
        end = "reset"
    say(end=end)


def serve_http(conn):
    """HTTP/1.1. Asks for a body that is announced with `Expect` (or refuses it: path /no) and answers in chunks."""
    rest = b""
    while True:
        while b"\r\n\r\n" not in rest:
            data = conn.recv(1 << 16)
            if not data:
                return
            rest += data
        head, _, rest = rest.partition(b"\r\n\r\n")
        first, *lines = head.lower().split(b"\r\n")
        headers = {k.strip(): v.strip() for k, _, v in (line.partition(b":") for line in lines)}
        early = None
        if headers.get(b"expect") == b"100-continue":
            early = len(rest)
            if b" /no " in first:
                conn.sendall(b"HTTP/1.1 417 Expectation Failed\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                return
            conn.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(headers.get(b"content-length", b"0"))
        while len(rest) < length:
            rest += conn.recv(1 << 16)
        body, rest = rest[:length], rest[length:]
        text = json.dumps({"early": early, "sha256": hashlib.sha256(body).hexdigest()}).encode()
        conn.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for part in (text[:1], text[1:20], text[20:]):
            conn.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        conn.sendall(b"0\r\n\r\n")


def one_connection(behaviour, conn, peer):
    with conn:
        say(accepted=peer[0], accepted_port=peer[1], peer=conn.getpeername()[0], local=conn.getsockname()[0])
        try:
            behaviour(conn)
        except (ConnectionError, EOFError) as e:
            say(error=type(e).__name__)


def serve(behaviour, port):
    def listen(family, address):
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind((address, port))
        server.listen(4096)
        return server

    def accept(server):
        while True:
            conn, peer = server.accept()
            threading.Thread(target=one_connection, args=(behaviour, conn, peer), daemon=True).start()

    # Thousands of connections are thousands of threads, none of which goes deep.
    threading.stack_size(256 * 1024)
    six = listen(socket.AF_INET6, "::")
    four = listen(socket.AF_INET, "0.0.0.0")
    threading.Thread(target=accept, args=(six,), daemon=True).start()
    accept(four)


# ---- clients: one function per behaviour, called with the connection; what they return is written

def call_look(conn):
    """How the connection looks from here, and that it works."""
    conn.sendall(b"ping")
    answer = conn.recv(4, socket.MSG_WAITALL).decode()
    return {"peer": conn.getpeername()[0], "peer_port": conn.getpeername()[1],
            "local": conn.getsockname()[0], "local_port": conn.getsockname()[1], "answer": answer}


def call_wait_for_banner(conn):
    """Says nothing before the server did."""
    banner = conn.recv(64).decode()
    conn.sendall(b"ping")
    return {"banner": banner, "answer": conn.recv(4, socket.MSG_WAITALL).decode()}


def call_speak_and_read(conn):
    conn.sendall(b"x")
    return {"received": len(conn.recv(1))}


def call_listen(conn):
    return {"received": len(conn.recv(1))}


def call_stay(conn):
    """Says nothing, and waits for the end."""
    say(stands=True)
    return wait_for_end(conn)


def call_ask_and_stay(conn):
    conn.sendall(b"ping")
    say(stands=True, answer=conn.recv(4, socket.MSG_WAITALL).decode())
    return wait_for_end(conn)


def wait_for_end(conn):
    conn.settimeout(None)
    try:
        return {"end": "data" if conn.recv(1) else "eof"}
    except ConnectionResetError:
        return {"end": "reset"}


def call_keep_asking(conn):
    """Asks an echo server again and again, until killed."""
    say(stands=True)
    while True:
        conn.sendall(b"ping")
        say(asked=conn.recv(4, socket.MSG_WAITALL).decode())
        time.sleep(0.1)


def call_web_until_refused(conn):
    """Makes requests on one connection until one is not answered with 200."""
    stands = False
    while True:
        conn.sendall(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
        head = b""
        while b"\r\n\r\n" not in head:
            data = conn.recv(4096)
            if not data:
                raise EOFError("the connection ended within an answer")
            head += data
        lines = head.split(b"\r\n\r\n")[0].decode().split("\r\n")
        status = int(lines[0].split()[1])
        if status != 200:
            fields = dict(line.lower().split(": ", 1) for line in lines[1:])
            return {"status": status, "reason": fields.get("x-sockmesh-reason", "").upper()}
        if not stands:
            say(stands=True)
            stands = True
        time.sleep(0.1)


def call_end_then_read(conn):
    sent = write_blocks(conn, 300_000)
    conn.shutdown(socket.SHUT_WR)
    answer = b""
    while data := conn.recv(4096):
        answer += data
    return {"sent": sent, "answer": json.loads(answer)}


def call_read_to_end_then_speak(conn):
    heard = b""
    while data := conn.recv(4096):
        heard += data
    sent = write_blocks(conn, 300_000)
    return {"heard": heard.decode(), "sent": sent}


def call_swap(conn):
    count = int(sys.argv[5])
    conn.sendall(count.to_bytes(8, "big"))
    result = {}
    sender = threading.Thread(target=lambda: result.update(sent=write_blocks(conn, count)))
    sender.start()
    result["received"] = read_exactly(conn, count)
    sender.join()
    result["end"] = conn.recv(1).decode()
    return result


def call_reset(conn):
    conn.recv(2, socket.MSG_WAITALL)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
    return {}


def call_take_nothing(conn):
    """Reads one block and then nothing more, until killed."""
    conn.recv(1)
    say(received=1)
    threading.Event().wait()


def call_many(conn):
    """Opens N connections to the same place, keeps all open, and uses each at the same time as all others.

    No more than 200 are on their way at once, since that many ask for a handshake of TLS.
    """
    peer, count = conn.getpeername()[:2], int(sys.argv[5])
    everyone = [conn]
    while len(everyone) < count:
        some = [socket.create_connection(peer, timeout=60) for _ in range(min(200, count - len(everyone)))]
        for each in some:
            each.sendall(b"here")
        assert all(each.recv(4, socket.MSG_WAITALL) == b"here" for each in some)
        everyone += some
    for n, each in enumerate(everyone):
        each.settimeout(60)
        each.sendall(n.to_bytes(4, "big"))
    good = sum(each.recv(4, socket.MSG_WAITALL) == n.to_bytes(4, "big") for n, each in enumerate(everyone))
    return {"good": good}


def read_answer(conn):
    """One HTTP head without its body: its first line."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = conn.recv(1)
        if not byte:
            raise EOFError("the stream ended within a head")
        head += byte
    return head.split(b"\r\n")[0].decode()


def call_expect(conn):
    """Announces a body with `Expect` and sends it only when it is asked for."""
    body = BLOCK
    conn.sendall(b"POST %s HTTP/1.1\r\nhost: expect\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
                 % (sys.argv[5].encode(), len(body)))
    first = read_answer(conn)
    if " 100" not in first:
        return {"first": first}
    conn.sendall(body)
    second, text = read_answer(conn), b""
    while not text.endswith(b"\r\n0\r\n\r\n"):
        text += conn.recv(4096)
    pieces = text.split(b"\r\n")[1::2]
    return {"first": first, "second": second, "answer": json.loads(b"".join(pieces)),
            "sha256": hashlib.sha256(body).hexdigest()}


# Numbers of linux/io_uring.h and of its system calls, which are the same on all architectures.
IO_URING_SETUP, IO_URING_ENTER = 425, 426
IORING_OFF_SQ_RING, IORING_OFF_CQ_RING, IORING_OFF_SQES = 0, 0x8000000, 0x10000000
IORING_OP_CONNECT, IORING_ENTER_GETEVENTS = 16, 1


def socket_address(host, port):
    """A `struct sockaddr_in` or `sockaddr_in6`."""
    if ":" in host:
        return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI16sI", port, 0, socket.inet_pton(socket.AF_INET6, host), 0)
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, socket.inet_aton(host))


def connect_by_io_uring(conn, host, port):
    """One connect that the kernel does on its own behalf. What it lacks shows as an error of `io_uring_setup`."""
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(120)
    ring = libc.syscall(IO_URING_SETUP, 1, params)
    if ring < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    words = struct.unpack("=30I", params.raw)
    sq_entries, cq_entries, sq, cq = words[0], words[1], words[10:18], words[20:28]
    sq_tail, sq_array, cq_cqes = sq[1], sq[6], cq[5]
    submissions = mmap.mmap(ring, sq_array + 4 * sq_entries, offset=IORING_OFF_SQ_RING)
    completions = mmap.mmap(ring, cq_cqes + 16 * cq_entries, offset=IORING_OFF_CQ_RING)
    entries = mmap.mmap(ring, 64 * sq_entries, offset=IORING_OFF_SQES)
    address = ctypes.create_string_buffer(socket_address(host, port))
    entries[0:24] = struct.pack("=BBHiQQ", IORING_OP_CONNECT, 0, 0, conn.fileno(), len(address) - 1,
                                ctypes.addressof(address))
    submissions[sq_array:sq_array + 4] = struct.pack("=I", 0)
    submissions[sq_tail:sq_tail + 4] = struct.pack("=I", 1)
    if libc.syscall(IO_URING_ENTER, ring, 1, 1, IORING_ENTER_GETEVENTS, None, 0) < 0:
        raise OSError(ctypes.get_errno(), "io_uring_enter")
    (result,) = struct.unpack("=i", completions[cq_cqes + 8:cq_cqes + 12])
    os.close(ring)
    if result:
        raise OSError(-result, "connect")


def opened(kind, family):
    """A socket of one of the kinds that an application may use. A kernel without MPTCP fails in `socket`."""
    if kind == "mptcp":
        try:
            return socket.socket(family, socket.SOCK_STREAM, 262)  # IPPROTO_MPTCP
        except OSError as e:
            raise OSError(e.errno, "socket") from e
    return socket.socket(family, socket.SOCK_STREAM)


def connected(kind, host, port):
    """Connects in one of the ways there are."""
    if kind == "mapped":
        conn = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        conn.connect((f"::ffff:{host}", port))
        return conn
    conn = opened(kind, socket.AF_INET6 if ":" in host else socket.AF_INET)
    if kind == "nonblocking":
        conn.setblocking(False)
        if conn.connect_ex((host, port)) not in (0, errno.EINPROGRESS):
            raise OSError("the connect failed at once")
        select.select([], [conn], [], 20)
        if error := conn.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, "connect")
        conn.setblocking(True)
    elif kind == "fastopen":
        conn.sendto(b"ping", socket.MSG_FASTOPEN, (host, port))
    elif kind == "io_uring":
        connect_by_io_uring(conn, host, port)
    else:
        conn.connect((host, port))
    return conn


def kind(kind, host, port):
    """Asks for an echo over a socket of this kind."""
    try:
        conn = connected(kind, host, port)
        conn.settimeout(20)
        if kind != "fastopen":
            conn.sendall(b"ping")
        say(answer=conn.recv(4, socket.MSG_WAITALL).decode(), peer=conn.getpeername()[0])
    except OSError as e:
        say(error=type(e).__name__, errno=errno.errorcode.get(e.errno), call=e.strerror)


def call(behaviour, host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    conn = socket.socket(family, socket.SOCK_STREAM)
    conn.settimeout(20)
    try:
        conn.connect((host, port))
    except OSError as e:
        say(stage="connect", error=type(e).__name__)
        return
    try:
        result = behaviour(conn)
        conn.close()
        say(**result)
    except (OSError, EOFError) as e:
        say(stage="stream", error=type(e).__name__)


def main():
    what, name, *rest = sys.argv[1:]
    if what == "kind":
        kind(name, rest[0], int(rest[1]))
        return
    behaviour = globals()[f"{what}_{name.replace('-', '_')}"]
    if what == "serve":
        serve(behaviour, int(rest[0]))
    else:
        call(behaviour, rest[0], int(rest[1]))


main()
