/* refuse-connect CGROUP SECONDS: attaches a cgroup/connect4 program to the version 2 cgroup at CGROUP that refuses every
 * connect() but those to 127.0.0.0/8 (with which the kubelet reaches containerd), for SECONDS. Shows that a privileged pod
 * can do on its node what the mesh's agent does, and to whom. */
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static long bpf(int command, union bpf_attr *attr) { return syscall(SYS_bpf, command, attr, sizeof *attr); }

static int fail(const char *what) {
    fprintf(stderr, "refuse-connect: %s: %s\n", what, strerror(errno));
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: refuse-connect CGROUP SECONDS\n");
        return 2;
    }
    int group = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (group < 0) return fail(argv[1]);

    struct bpf_insn refuse[] = { /* r1 = the address' first byte; return r1 == 127 */
        {.code = BPF_LDX | BPF_MEM | BPF_W, .dst_reg = BPF_REG_1, .src_reg = BPF_REG_1, .off = offsetof(struct bpf_sock_addr, user_ip4)},
        {.code = BPF_ALU | BPF_END | BPF_TO_BE, .dst_reg = BPF_REG_1, .imm = 32},
        {.code = BPF_ALU64 | BPF_RSH | BPF_K, .dst_reg = BPF_REG_1, .imm = 24},
        {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 1},
        {.code = BPF_JMP | BPF_JEQ | BPF_K, .dst_reg = BPF_REG_1, .imm = 127, .off = 1},
        {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 0},
        {.code = BPF_JMP | BPF_EXIT},
    };
    union bpf_attr load = {
        .prog_type = BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        .expected_attach_type = BPF_CGROUP_INET4_CONNECT,
        .insns = (unsigned long)refuse,
        .insn_cnt = sizeof refuse / sizeof *refuse,
        .license = (unsigned long)"GPL",
    };
    long program = bpf(BPF_PROG_LOAD, &load);
    if (program < 0) return fail("loading the program");

    union bpf_attr link = {.link_create = {.prog_fd = program, .target_fd = group, .attach_type = BPF_CGROUP_INET4_CONNECT}};
    if (bpf(BPF_LINK_CREATE, &link) < 0) return fail("attaching it");
    puts("refusing");
    fflush(stdout);
    sleep((unsigned)atoi(argv[2])); /* the link, and with it the program, ends with this process */
    return 0;
}
