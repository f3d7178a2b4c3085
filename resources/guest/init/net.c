// SPDX-License-Identifier: Apache-2.0
// The network: a NIC brought up, echo requests sent and answered.

#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

// musl's headers lack this part of linux/icmp.h.
#define ICMP_FILTER 1

#define PINGS 3
#define PING_TIMEOUT_MS 5000
#define PINGED_TIMEOUT_MS 120000

static uint64_t microseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ULL + now.tv_nsec / 1000;
}

static bool set_address(int control, struct ifreq *request, struct in_addr address, int length)
{
	struct sockaddr_in *in = (struct sockaddr_in *)&request->ifr_addr;

	in->sin_family = AF_INET;
	in->sin_addr = address;
	if (ioctl(control, SIOCSIFADDR, request))
		return false;
	in->sin_addr.s_addr = length ? htonl(~0U << (32 - length)) : 0;
	if (ioctl(control, SIOCSIFNETMASK, request) || ioctl(control, SIOCGIFFLAGS, request))
		return false;
	request->ifr_flags |= IFF_UP | IFF_RUNNING;
	return !ioctl(control, SIOCSIFFLAGS, request);
}

static bool tell_nic(const struct ifreq *request, const char *address)
{
	char path[64], mac[32] = "none";

	snprintf(path, sizeof(path), "/sys/class/net/%s/address", request->ifr_name);
	read_text(path, mac, sizeof(mac));
	snprintf(path, sizeof(path), "/sys/class/net/%s/mtu", request->ifr_name);
	return step_ok("net", "nic=%s address=%s mac=%s mtu=%llu", request->ifr_name, address, mac,
		       (unsigned long long)read_number(path, 0));
}

// NIC:A.B.C.D/LEN, where the NIC is eth0 if left out and the length 24.
static bool read_address(const char *text, struct ifreq *request, struct in_addr *address, int *length)
{
	char copy[64], *colon, *slash, *number = copy;

	snprintf(copy, sizeof(copy), "%s", text);
	colon = strchr(copy, ':');
	if (colon) {
		*colon = 0;
		number = colon + 1;
	}
	snprintf(request->ifr_name, IFNAMSIZ, "%s", colon ? copy : "eth0");
	slash = strchr(number, '/');
	if (slash)
		*slash = 0;
	*length = slash ? atoi(slash + 1) : 24;
	return inet_pton(AF_INET, number, address) == 1 && *length >= 0 && *length <= 32;
}

bool step_net(const char *argument)
{
	const char *text = argument ? argument : cmdline_value("brume.ip");
	struct ifreq request = { 0 };
	struct in_addr address;
	int length, control;
	bool up;

	if (!text)
		return step_failed("net", "no address: give brume.ip=A.B.C.D/LEN");
	if (!read_address(text, &request, &address, &length))
		return step_failed("net", "not NIC:A.B.C.D/LEN: %s", text);
	control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	up = control >= 0 && set_address(control, &request, address, length);
	if (!up)
		step_failed_errno("net", request.ifr_name);
	if (control >= 0)
		close(control);
	return up ? tell_nic(&request, text) : false;
}

static uint16_t checksum(const void *bytes, size_t length)
{
	const uint16_t *word = bytes;
	uint32_t sum = 0;

	for (size_t i = 0; i < length / 2; i++)
		sum += word[i];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

// A raw socket that hears one type of ICMP message only.
static int icmp_socket(int type)
{
	uint32_t deaf = ~(1U << type);
	int icmp = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_ICMP);

	if (icmp >= 0 && setsockopt(icmp, SOL_RAW, ICMP_FILTER, &deaf, sizeof(deaf))) {
		close(icmp);
		return -1;
	}
	return icmp;
}

// The ICMP message of the next packet, or NULL after the time is up.
static const struct icmphdr *next_message(int icmp, uint64_t until)
{
	static char packet[2048] __attribute__((aligned(8)));
	struct pollfd wait = { .fd = icmp, .events = POLLIN };

	for (uint64_t now; (now = microseconds()) < until;) {
		if (poll(&wait, 1, (until - now) / 1000 + 1) <= 0)
			continue;
		ssize_t length = recv(icmp, packet, sizeof(packet), 0);
		size_t header = length > 0 ? (packet[0] & 15) * 4 : 0;
		if (length >= (ssize_t)(header + sizeof(struct icmphdr)) && header)
			return (const struct icmphdr *)(packet + header);
	}
	return NULL;
}

// The round trip in microseconds, or 0 if nothing came back.
static uint64_t ping_once(int icmp, const struct sockaddr_in *to, uint16_t number)
{
	struct {
		struct icmphdr header;
		char data[56];
	} request = { .header = { .type = ICMP_ECHO } };
	const struct icmphdr *reply;
	uint64_t sent = microseconds();

	memset(request.data, 0xb5, sizeof(request.data));
	request.header.un.echo.id = htons(0xb3);
	request.header.un.echo.sequence = htons(number);
	request.header.checksum = checksum(&request, sizeof(request));
	if (sendto(icmp, &request, sizeof(request), 0, (const struct sockaddr *)to, sizeof(*to)) < 0)
		return 0;
	while ((reply = next_message(icmp, sent + PING_TIMEOUT_MS * 1000ULL)))
		if (reply->un.echo.id == request.header.un.echo.id &&
		    reply->un.echo.sequence == request.header.un.echo.sequence)
			return microseconds() - sent;
	return 0;
}

bool step_ping(const char *argument)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	uint64_t trip, least = UINT64_MAX, sum = 0;
	int icmp, replies = 0;

	if (!argument || inet_pton(AF_INET, argument, &to.sin_addr) != 1)
		return step_failed("ping", "give an address, as in ping=10.0.0.1");
	icmp = icmp_socket(ICMP_ECHOREPLY);
	if (icmp < 0)
		return step_failed_errno("ping", "socket");
	for (uint16_t number = 1; number <= PINGS; number++) {
		trip = ping_once(icmp, &to, number);
		replies += trip != 0;
		sum += trip;
		if (trip && trip < least)
			least = trip;
	}
	close(icmp);
	if (replies < PINGS)
		return step_failed("ping", "%d of %d replies from %s", replies, PINGS, argument);
	return step_ok("ping", "to=%s replies=%d rtt_us_min=%llu rtt_us_avg=%llu", argument, replies,
		       (unsigned long long)least, (unsigned long long)(sum / PINGS));
}

bool step_pinged(const char *argument)
{
	int wanted = argument ? atoi(argument) : 1, heard = 0;
	uint64_t until = microseconds() + PINGED_TIMEOUT_MS * 1000ULL;
	int icmp = icmp_socket(ICMP_ECHO);

	if (icmp < 0)
		return step_failed_errno("pinged", "socket");
	step_note("pinged", "waiting_for=%d", wanted);
	while (heard < wanted && next_message(icmp, until))
		heard++;
	close(icmp);
	if (heard < wanted)
		return step_failed("pinged", "%d of %d requests came", heard, wanted);
	return step_ok("pinged", "requests=%d", heard);
}

bool step_serve(const char *argument)
{
	unsigned seconds = argument ? atoi(argument) : 10;

	step_note("serve", "seconds=%u", seconds);
	sleep(seconds);
	return step_ok("serve", "seconds=%u", seconds);
}
