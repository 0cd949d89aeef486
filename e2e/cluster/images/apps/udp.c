/* udp listen PORT: sends every datagram back to where it came from.
 * udp ask ADDRESS PORT TEXT COUNT BYTES: sends COUNT datagrams of BYTES bytes that are full of TEXT, one every 10 ms, waits
 * two seconds for the last ones, and prints how many came back as they were. With COUNT 0 it sends until its input ends. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { LARGEST = 65507, MOST = 1000000, PAUSE_MS = 10, LAST_MS = 2000 };
static char sent[LARGEST], got[LARGEST + 1];

static int fail(const char *what) {
    fprintf(stderr, "udp: %s: %s\n", what, strerror(errno));
    return 1;
}

static long now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000 + at.tv_nsec / 1000000;
}

static int input_has_ended(void) {
    char byte;
    struct pollfd input = {.fd = 0, .events = POLLIN};
    return poll(&input, 1, 0) > 0 && read(0, &byte, 1) <= 0;
}

static int serve(const char *port) {
    struct sockaddr_in6 own = {.sin6_family = AF_INET6, .sin6_addr = in6addr_any, .sin6_port = htons((unsigned short)atoi(port))}, from;
    int no = 0, of_both = socket(AF_INET6, SOCK_DGRAM, 0);
    if (of_both < 0 || setsockopt(of_both, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no) < 0 || bind(of_both, (void *)&own, sizeof own) < 0)
        return fail(port);
    for (;;) {
        socklen_t length = sizeof from;
        ssize_t size = recvfrom(of_both, got, sizeof got, 0, (void *)&from, &length);
        if (size >= 0) sendto(of_both, got, (size_t)size, 0, (void *)&from, length);
    }
}

static int ask(char **argv) {
    struct sockaddr_in6 there = {.sin6_family = AF_INET6, .sin6_port = htons((unsigned short)atoi(argv[1]))};
    int count = atoi(argv[3]), bytes = atoi(argv[4]), back = 0;
    char mapped[INET6_ADDRSTRLEN + 8];
    snprintf(mapped, sizeof mapped, strchr(argv[0], ':') ? "%s" : "::ffff:%s", argv[0]);
    if (inet_pton(AF_INET6, mapped, &there.sin6_addr) != 1 || bytes < 4 || bytes > LARGEST || !*argv[2] || count < 0 || count > MOST) {
        fprintf(stderr, "udp: bad address, text, count or size\n");
        return 2;
    }
    int socket_ = socket(AF_INET6, SOCK_DGRAM, 0);
    if (socket_ < 0 || connect(socket_, (void *)&there, sizeof there) < 0) return fail(argv[0]);
    int endless = count == 0;
    if (endless) count = MOST;
    char *seen = calloc((size_t)count, 1);
    if (!seen) return fail("memory");
    /* The first four bytes are the datagram's number. */
    for (int i = 4; i < bytes; i++) sent[i] = argv[2][(size_t)(i - 4) % strlen(argv[2])];
    for (int number = 0; number <= count; number++) {
        if (endless && number < count && input_has_ended()) count = number;
        long end = now() + (number == count ? LAST_MS : PAUSE_MS);
        if (number < count) {
            memcpy(sent, &number, 4);
            send(socket_, sent, (size_t)bytes, 0); /* what is refused is lost, and counted so */
        }
        for (long left; back < count && (left = end - now()) > 0;) {
            struct pollfd wait = {.fd = socket_, .events = POLLIN};
            int which;
            if (poll(&wait, 1, (int)left) <= 0 || recv(socket_, got, sizeof got, 0) != bytes) continue;
            memcpy(&which, got, 4);
            if (which < 0 || which >= count || seen[which] || memcmp(got + 4, sent + 4, (size_t)bytes - 4)) continue;
            seen[which] = 1;
            back++;
        }
    }
    printf("%d of %d came back\n", back, count);
    return back == count ? 0 : 1;
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "listen")) return serve(argv[2]);
    if (argc == 7 && !strcmp(argv[1], "ask")) return ask(argv + 2);
    fprintf(stderr, "usage: udp listen PORT | udp ask ADDRESS PORT TEXT COUNT BYTES\n");
    return 2;
}
