/* LD_PRELOAD shim: counts the system calls that touch files under one folder, and kills the process, tears a write or
 * injects an error at the k-th of them. Armed from inside through ctypes: shim_arm(folder, k, mode, error). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, KILL_BEFORE, KILL_AFTER, TORN, FAIL_ONE, FAIL_FROM, SHORT_WRITE };

static char folder[PATH_MAX];
static size_t folder_length;
static int target, mode = OFF, injected_errno, calls, active;
/* The number of the call that this thread is in: several threads may touch the folder at once. */
static __thread int own;

#define NEXT(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

void shim_arm(const char *path, int k, int how, int error) {
    strncpy(folder, path, sizeof folder - 1);
    folder_length = strlen(folder);
    target = k; mode = how; injected_errno = error; calls = 0; active = 1;
}
int shim_disarm(void) { active = 0; return calls; }

static int path_touches(const char *path) {
    return active && path && strncmp(path, folder, folder_length) == 0;
}
static int fd_touches(int fd) {
    char link[64], path[PATH_MAX];
    if (!active) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return path_touches(path);
}
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* Returns 1 when the call is to fail with errno set. */
static int before(int touches) {
    if (!touches) return 0;
    own = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if ((mode == FAIL_ONE && own == target) || (mode == FAIL_FROM && own >= target)) {
        errno = injected_errno;
        return 1;
    }
    if (own == target && (mode == KILL_BEFORE || mode == TORN)) die();
    return 0;
}
static void after(int touches) { if (touches && own == target && mode == KILL_AFTER) die(); }

#define WRAP(touches_expr, call) do { int t = (touches_expr); if (before(t)) return -1; __auto_type r = (call); \
    int e = errno; after(t); errno = e; return r; } while (0)

#define OPEN_MODE mode_t m = 0; if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list a; va_start(a, flags); m = va_arg(a, mode_t); va_end(a); }
int open(const char *path, int flags, ...) { OPEN_MODE WRAP(path_touches(path), NEXT(open)(path, flags, m)); }
int open64(const char *path, int flags, ...) { OPEN_MODE WRAP(path_touches(path), NEXT(open64)(path, flags, m)); }
int openat(int at, const char *path, int flags, ...) {
    OPEN_MODE WRAP(path_touches(path), NEXT(openat)(at, path, flags, m));
}
int openat64(int at, const char *path, int flags, ...) {
    OPEN_MODE WRAP(path_touches(path), NEXT(openat64)(at, path, flags, m));
}

#define WRITING(real_whole, real_half) do { int t = fd_touches(fd); \
    if (t && calls + 1 == target && n > 1) { \
        if (mode == TORN) { (void)!(real_half); die(); } \
        if (mode == SHORT_WRITE) { calls++; return (real_half); } } \
    WRAP(t, real_whole); } while (0)
ssize_t write(int fd, const void *b, size_t n) { WRITING(NEXT(write)(fd, b, n), NEXT(write)(fd, b, n / 2)); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) {
    WRITING(NEXT(pwrite)(fd, b, n, o), NEXT(pwrite)(fd, b, n / 2, o));
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
    WRITING(NEXT(pwrite64)(fd, b, n, o), NEXT(pwrite64)(fd, b, n / 2, o));
}
int fsync(int fd) { WRAP(fd_touches(fd), NEXT(fsync)(fd)); }
int fdatasync(int fd) { WRAP(fd_touches(fd), NEXT(fdatasync)(fd)); }
int ftruncate(int fd, off_t n) { WRAP(fd_touches(fd), NEXT(ftruncate)(fd, n)); }
int ftruncate64(int fd, off64_t n) { WRAP(fd_touches(fd), NEXT(ftruncate64)(fd, n)); }
int close(int fd) {
    int t = fd_touches(fd);
    /* A close that fails has closed all the same. */
    if (before(t)) { int e = errno; NEXT(close)(fd); errno = e; return -1; }
    int r = NEXT(close)(fd), e = errno;
    after(t);
    errno = e;
    return r;
}
int rename(const char *a, const char *b) { WRAP(path_touches(a), NEXT(rename)(a, b)); }
int renameat(int x, const char *a, int y, const char *b) { WRAP(path_touches(a), NEXT(renameat)(x, a, y, b)); }
int link(const char *a, const char *b) { WRAP(path_touches(a), NEXT(link)(a, b)); }
int linkat(int x, const char *a, int y, const char *b, int f) { WRAP(path_touches(a), NEXT(linkat)(x, a, y, b, f)); }
int unlink(const char *a) { WRAP(path_touches(a), NEXT(unlink)(a)); }
int unlinkat(int x, const char *a, int f) { WRAP(path_touches(a), NEXT(unlinkat)(x, a, f)); }
int mkdir(const char *a, mode_t m) { WRAP(path_touches(a), NEXT(mkdir)(a, m)); }
