// SPDX-License-Identifier: Apache-2.0
// A guest that lives on while its machine is saved and restored, and tells how
// it is: by UDP, over vsock and on the console.

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define PORT 7070
#define JOURNAL "/mnt/journal"

#define PAGES 1024
#define WORDS 512
#define PAGES_PER_TURN 16
#define TURN_MS 20
#define TURNS_PER_RECORD 8

#define MMDS_ADDRESS "169.254.170.2"
#define MMDS_PATH "value"

// What a page holds follows from its number and its version; the versions stand elsewhere.
static uint64_t (*pages)[WORDS];
static uint64_t versions[PAGES];
static uint64_t turns, writes, bad, records;
static bool journal_rests;
static int journal = -1;
static volatile uint64_t busy;
static unsigned streams, resets;
static char token[128];

// musl has no linux/vm_sockets.h.
struct vsock_address {
	sa_family_t family;
	uint16_t reserved;
	uint32_t port, cid, zero;
};
#define ANY_CID ~0U

enum { UDP, CONSOLE, LISTENER, STREAM, SOURCES };
static struct pollfd sources[SOURCES];

static uint64_t word(uint64_t page, uint64_t version, uint64_t index)
{
	uint64_t value = (page << 32 ^ version) + (index + 1) * 0x9e3779b97f4a7c15ULL;

	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ULL;
	return value ^ value >> 27;
}

static bool holds(uint64_t page)
{
	for (uint64_t i = 0; i < WORDS; i++)
		if (pages[page][i] != word(page, versions[page], i))
			return false;
	return true;
}

static void rewrite(uint64_t page)
{
	versions[page]++;
	for (uint64_t i = 0; i < WORDS; i++)
		pages[page][i] = word(page, versions[page], i);
}

// Huge pages save the emulated kernel a fault for each 4 KiB.
static bool take_memory(void)
{
	size_t length = PAGES * sizeof(*pages);

	write_text("/sys/kernel/mm/transparent_hugepage/enabled", "madvise");
	pages = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pages == MAP_FAILED)
		return false;
	madvise(pages, length, MADV_HUGEPAGE);
	for (uint64_t page = 0; page < PAGES; page++)
		rewrite(page);
	return true;
}

static bool open_journal(void)
{
	mkdir("/mnt", 0755);
	if (mount("/dev/vda", "/mnt", "ext4", MS_NOATIME, NULL))
		return false;
	journal = open(JOURNAL, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644);
	return journal >= 0;
}

// One line of 32 bytes: which record it is, and the turn it was written in.
static bool write_record(void)
{
	char line[33];
	int length = snprintf(line, sizeof(line), "%015llu %015llu\n", (unsigned long long)records,
			      (unsigned long long)turns);

	if (write(journal, line, length) != length || fsync(journal))
		return false;
	records++;
	return true;
}

static uint64_t milliseconds(clockid_t clock)
{
	struct timespec now;

	// The kernel's own reading: not every KVM gives programs a time-stamp counter of the guest's.
	syscall(SYS_clock_gettime, clock, &now);
	return now.tv_sec * 1000ULL + now.tv_nsec / 1000000;
}

static void *keep_busy(void *argument)
{
	cpu_set_t second;

	CPU_ZERO(&second);
	CPU_SET(1, &second);
	if (sched_setaffinity(0, sizeof(second), &second))
		return NULL;
	while (argument)
		busy++;
	return NULL;
}

// The second CPU counts for ever; all else is the first one's.
static void occupy_second_cpu(void)
{
	pthread_t thread;
	cpu_set_t first;

	if (sysconf(_SC_NPROCESSORS_ONLN) < 2)
		return;
	CPU_ZERO(&first);
	CPU_SET(0, &first);
	sched_setaffinity(0, sizeof(first), &first);
	pthread_create(&thread, NULL, keep_busy, (void *)&busy);
}

static int bound_socket(int family, int type, const void *address, socklen_t length)
{
	int made = socket(family, type | SOCK_CLOEXEC, 0);

	if (made >= 0 && !bind(made, address, length) && (type != SOCK_STREAM || !listen(made, 4)))
		return made;
	if (made >= 0)
		close(made);
	return -1;
}

static bool open_sources(void)
{
	struct sockaddr_in udp = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	struct vsock_address vsock = { .family = AF_VSOCK, .cid = ANY_CID, .port = PORT };

	for (int i = 0; i < SOURCES; i++)
		sources[i] = (struct pollfd){ .fd = -1, .events = POLLIN };
	sources[UDP].fd = bound_socket(AF_INET, SOCK_DGRAM, &udp, sizeof(udp));
	sources[LISTENER].fd = bound_socket(AF_VSOCK, SOCK_STREAM, &vsock, sizeof(vsock));
	sources[CONSOLE].fd = STDIN_FILENO;
	return sources[UDP].fd >= 0 && sources[LISTENER].fd >= 0;
}

static void tell(char *text, size_t size)
{
	uint64_t random = 0;

	for (uint64_t page = 0; page < PAGES; page++)
		bad += !holds(page);
	getrandom(&random, sizeof(random), 0);
	snprintf(text, size,
		 "turns=%llu writes=%llu bad=%llu records=%llu real_ms=%llu up_ms=%llu busy=%llu streams=%u "
		 "resets=%u random=%016llx",
		 (unsigned long long)turns, (unsigned long long)writes, (unsigned long long)bad,
		 (unsigned long long)records, (unsigned long long)milliseconds(CLOCK_REALTIME),
		 (unsigned long long)milliseconds(CLOCK_MONOTONIC), (unsigned long long)busy, streams, resets,
		 (unsigned long long)random);
}

// What a request is answered with. False if it is the last.
static bool answer(const char *request, char *text, size_t size)
{
	int before = 0, after = 0;

	switch (*request) {
	case 'r':
		journal_rests = true;
		snprintf(text, size, "rests records=%llu", (unsigned long long)records);
		return true;
	case 'g':
		journal_rests = false;
		snprintf(text, size, "goes records=%llu", (unsigned long long)records);
		return true;
	case 'm':
		mmds_session(MMDS_ADDRESS, MMDS_PATH, token, sizeof(token), &before, &after);
		snprintf(text, size, "mmds before=%d after=%d", before, after);
		return true;
	default:
		tell(text, size);
		return *request != 'q';
	}
}

// The answer begins with the request. One that comes again, because its answer took long, is
// answered as before.
static bool answer_datagram(void)
{
	static char last[64], text[640];
	char request[64];
	struct sockaddr_in from;
	socklen_t length = sizeof(from);
	ssize_t got = recvfrom(sources[UDP].fd, request, sizeof(request) - 1, MSG_DONTWAIT,
			       (struct sockaddr *)&from, &length);
	bool more = true;

	if (got < 0)
		return true;
	request[got] = 0;
	if (strcmp(request, last)) {
		size_t used = snprintf(text, sizeof(text), "%s ", request);
		more = answer(request, text + used, sizeof(text) - used);
		strcpy(last, request);
	}
	sendto(sources[UDP].fd, text, strlen(text), 0, (struct sockaddr *)&from, length);
	return more;
}

static bool answer_console(void)
{
	char request[64], text[512];
	ssize_t got = read(STDIN_FILENO, request, sizeof(request) - 1);

	if (got <= 0)
		return true;
	request[got] = 0;
	bool more = answer(request, text, sizeof(text));
	step_note("witness", "%s", text);
	return more;
}

static void accept_stream(void)
{
	int stream = accept4(sources[LISTENER].fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (stream < 0)
		return;
	if (sources[STREAM].fd >= 0)
		close(sources[STREAM].fd);
	sources[STREAM].fd = stream;
	streams++;
}

// A stream that its peer closed ends; that of a machine that was restored fails.
static void answer_stream(void)
{
	char request[64], text[512];
	ssize_t got = read(sources[STREAM].fd, request, sizeof(request) - 1);

	if (got < 0 && errno == EAGAIN)
		return;
	if (got <= 0) {
		resets += got < 0;
		close(sources[STREAM].fd);
		sources[STREAM].fd = -1;
		return;
	}
	request[got] = 0;
	answer(request, text, sizeof(text) - 1);
	strcat(text, "\n");
	send(sources[STREAM].fd, text, strlen(text), MSG_NOSIGNAL);
}

static bool turn(void)
{
	for (int i = 0; i < PAGES_PER_TURN; i++, writes++) {
		bad += !holds(writes % PAGES);
		rewrite(writes % PAGES);
	}
	return ++turns % TURNS_PER_RECORD || journal_rests || write_record();
}

static bool bear_witness(void)
{
	bool more = true;

	while (more) {
		if (poll(sources, SOURCES, TURN_MS) < 0)
			return step_failed_errno("witness", "poll");
		if (!turn())
			return step_failed_errno("witness", JOURNAL);
		if (sources[LISTENER].revents)
			accept_stream();
		else if (sources[STREAM].revents)
			answer_stream();
		if (sources[UDP].revents)
			more = answer_datagram();
		if (sources[CONSOLE].revents)
			more = answer_console() && more;
	}
	return true;
}

bool step_witness(const char *argument)
{
	(void)argument;
	if (!open_journal())
		return step_failed_errno("witness", "the journal on /dev/vda");
	if (!take_memory() || !open_sources())
		return step_failed_errno("witness", "setting up");
	// So that the console shows what the kernel has to say of the machine's being another one.
	klogctl(8, NULL, 6); // SYSLOG_ACTION_CONSOLE_LEVEL
	occupy_second_cpu();
	step_note("witness", "ready");
	if (!bear_witness())
		return false;
	close(journal);
	if (umount("/mnt"))
		return step_failed_errno("witness", "umount");
	return step_ok("witness", "turns=%llu records=%llu bad=%llu", (unsigned long long)turns,
		       (unsigned long long)records, (unsigned long long)bad);
}
