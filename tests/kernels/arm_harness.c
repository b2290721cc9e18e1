/* Runs one kernel on the memory of the process that started it, page by page as the kernel touches it.

   The tests' arrays lie in another process, at addresses that are free in this one. A page that the kernel touches is
   asked for and mapped where it is there; after the call whatever bytes the kernel changed are sent back, and all pages
   are dropped, since their owner goes on writing to them.

   in:   24 arguments, int64; for each page asked for, its bytes
   out:  messages of three uint64: PAGE address 0       asks for a page
                                   CHANGED address n    n bytes follow, which the kernel wrote at the address
                                   DONE 0 0             the kernel has returned
                                   TAKEN address 0      the address is not free here; this process ends

   The kernel is linked in under the name `kernel`; it reads as many of the arguments as it has. */

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE, CHANGED, DONE, TAKEN };
enum { BYTES = 4096 };

typedef int64_t word;
extern void kernel(word, word, word, word, word, word, word, word, word, word, word, word,
                   word, word, word, word, word, word, word, word, word, word, word, word);

struct page {
    struct page *next;
    unsigned char *here;
    unsigned char before[BYTES];
};
static struct page *pages;

static void tell(uint64_t what, const void *address, uint64_t count)
{
    uint64_t message[3] = {what, (uint64_t)address, count};
    if (write(1, message, sizeof message) != sizeof message)
        _exit(3);
}

static int receive(void *to, size_t count)
{
    for (size_t got = 0; got < count;) {
        ssize_t n = read(0, (char *)to + got, count - got);
        if (n <= 0)
            return 0;
        got += (size_t)n;
    }
    return 1;
}

static void fetch(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)context;
    unsigned char *at = (unsigned char *)((uintptr_t)info->si_addr & ~(uintptr_t)(BYTES - 1));
    struct page *p = mmap(NULL, sizeof *p, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    /* Not MAP_FIXED, which would replace what the emulator itself has there. */
    if (mmap(at, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != at || p == MAP_FAILED) {
        tell(TAKEN, at, 0);
        _exit(2);
    }
    tell(PAGE, at, 0);
    if (!receive(at, BYTES))
        _exit(1);
    memcpy(p->before, at, BYTES);
    p->here = at, p->next = pages, pages = p;
}

/* Only what differs: the bytes beside it may belong to somebody who has changed them meanwhile. */
static void send_changes(const struct page *p)
{
    for (size_t i = 0; i < BYTES; i++) {
        size_t first = i;
        while (i < BYTES && p->here[i] != p->before[i])
            i++;
        if (i > first) {
            uint64_t message[3] = {CHANGED, (uint64_t)(p->here + first), i - first};
            fwrite(message, sizeof message, 1, stdout);
            fwrite(p->here + first, 1, i - first, stdout);
        }
    }
}

int main(void)
{
    struct sigaction action = {.sa_sigaction = fetch, .sa_flags = SA_SIGINFO};
    word a[24];
    if (sigaction(SIGSEGV, &action, NULL))
        return 3;
    while (receive(a, sizeof a)) {
        kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11],
               a[12], a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23]);
        for (struct page *p = pages; p; p = p->next)
            send_changes(p);
        fflush(stdout);
        tell(DONE, NULL, 0);
        while (pages) {
            struct page *p = pages;
            pages = p->next;
            munmap(p->here, BYTES);
            munmap(p, sizeof *p);
        }
    }
    return 0;
}
