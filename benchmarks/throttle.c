/* Storage of a given speed: preloaded, it makes reads of regular files wait for their turn.
 *
 *     cc -O2 -shared -fPIC -o throttle.so throttle.c -ldl
 *     LD_PRELOAD=./throttle.so THROTTLE_MB_S=200 THROTTLE_FOLDER=/data program
 *
 * All threads of a process share the speed, as those of a machine share a disk. Files outside the
 * folder are left alone, and so is what is mapped into memory: the kernel reads that by itself.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double free_at; /* when the storage will have delivered what was asked for so far */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static int inside(int descriptor)
{
    const char *folder = getenv("THROTTLE_FOLDER");
    char link[64], path[PATH_MAX];
    ssize_t length;
    if (!folder)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

static ssize_t waited(int descriptor, ssize_t count)
{
    const char *speed = getenv("THROTTLE_MB_S");
    double begin, wait;
    struct timespec pause;
    if (count <= 0 || !speed || !inside(descriptor))
        return count;
    pthread_mutex_lock(&lock);
    begin = now() > free_at ? now() : free_at;
    free_at = begin + count / (atof(speed) * 1e6);
    wait = free_at - now();
    pthread_mutex_unlock(&lock);
    if (wait > 0) {
        pause.tv_sec = (time_t)wait;
        pause.tv_nsec = (long)((wait - pause.tv_sec) * 1e9);
        nanosleep(&pause, NULL);
    }
    return count;
}

#define REAL(name, ...) \
    static ssize_t (*real)(__VA_ARGS__); \
    if (!real) \
        real = (ssize_t(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t read(int d, void *buffer, size_t size)
{
    REAL("read", int, void *, size_t);
    return waited(d, real(d, buffer, size));
}

ssize_t pread(int d, void *buffer, size_t size, off_t offset)
{
    REAL("pread", int, void *, size_t, off_t);
    return waited(d, real(d, buffer, size, offset));
}

ssize_t pread64(int d, void *buffer, size_t size, off64_t offset)
{
    REAL("pread64", int, void *, size_t, off64_t);
    return waited(d, real(d, buffer, size, offset));
}

ssize_t preadv(int d, const struct iovec *parts, int count, off_t offset)
{
    REAL("preadv", int, const struct iovec *, int, off_t);
    return waited(d, real(d, parts, count, offset));
}

ssize_t preadv64(int d, const struct iovec *parts, int count, off64_t offset)
{
    REAL("preadv64", int, const struct iovec *, int, off64_t);
    return waited(d, real(d, parts, count, offset));
}

ssize_t preadv64v2(int d, const struct iovec *parts, int count, off64_t offset, int flags)
{
    REAL("preadv64v2", int, const struct iovec *, int, off64_t, int);
    return waited(d, real(d, parts, count, offset, flags));
}
