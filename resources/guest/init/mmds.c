// SPDX-License-Identifier: Apache-2.0
// The metadata service: a token, and a value with it, over one connection.

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "guest.h"

#define ANSWER_MAX (1 << 20)
#define TIMEOUT_S 20
#define TOKEN_REQUEST "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 3600\r\n\r\n"

struct answer {
	int status;
	const char *body;
	size_t length;
};

static int connect_to(const char *address)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(80) };
	struct timeval timeout = { .tv_sec = TIMEOUT_S };
	int connection = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (connection < 0)
		return -1;
	setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	if (inet_pton(AF_INET, address, &to.sin_addr) != 1 ||
	    connect(connection, (const struct sockaddr *)&to, sizeof(to))) {
		close(connection);
		return -1;
	}
	return connection;
}

// Whether the first `used` bytes are a whole answer, which is taken apart then.
static bool take_apart(const char *text, size_t used, struct answer *answer)
{
	const char *end = strstr(text, "\r\n\r\n"), *length = strstr(text, "Content-Length: ");

	if (!end || !length || length > end || sscanf(text, "HTTP/1.1 %d", &answer->status) != 1)
		return false;
	answer->body = end + 4;
	answer->length = strtoul(length + strlen("Content-Length: "), NULL, 10);
	return used - (answer->body - text) >= answer->length;
}

// Sends a request and waits for its answer, which is good until the next one.
static bool ask(int connection, const char *request, struct answer *answer)
{
	static char text[ANSWER_MAX + 1];
	size_t used = 0;

	if (send(connection, request, strlen(request), 0) != (ssize_t)strlen(request))
		return false;
	while (used < ANSWER_MAX) {
		ssize_t now = recv(connection, text + used, ANSWER_MAX - used, 0);
		if (now <= 0)
			return false;
		used += now;
		text[used] = 0;
		if (take_apart(text, used, answer))
			return true;
	}
	return false;
}

static bool fetch(int connection, const char *path)
{
	char request[1024], token[128];
	struct answer refused, issued, value;

	snprintf(request, sizeof(request), "GET /%s HTTP/1.1\r\n\r\n", path);
	if (!ask(connection, request, &refused))
		return step_failed_errno("mmds", "no answer without a token");
	if (!ask(connection, TOKEN_REQUEST, &issued))
		return step_failed_errno("mmds", "no answer to the wish for a token");
	snprintf(token, sizeof(token), "%.*s", (int)issued.length, issued.body);
	snprintf(request, sizeof(request),
		 "GET /%s HTTP/1.1\r\nAccept: application/json\r\nX-metadata-token: %s\r\n\r\n", path, token);
	if (!ask(connection, request, &value))
		return step_failed_errno("mmds", "no answer with a token");
	return step_ok("mmds", "without=%d token=%d status=%d bytes=%zu fnv=%016llx", refused.status,
		       issued.status, value.status, value.length,
		       (unsigned long long)fnv1a(FNV_START, value.body, value.length));
}

static int get_with(int connection, const char *path, const char *token)
{
	char request[1024];
	struct answer value;

	snprintf(request, sizeof(request),
		 "GET /%s HTTP/1.1\r\nAccept: application/json\r\nX-metadata-token: %s\r\n\r\n", path, token);
	return ask(connection, request, &value) ? value.status : 0;
}

void mmds_session(const char *address, const char *path, char *token, size_t size, int *before, int *after)
{
	int connection = connect_to(address);
	struct answer issued;

	*before = *after = 0;
	if (connection < 0)
		return;
	if (*token)
		*before = get_with(connection, path, token);
	if (ask(connection, TOKEN_REQUEST, &issued) && issued.status == 200) {
		snprintf(token, size, "%.*s", (int)issued.length, issued.body);
		*after = get_with(connection, path, token);
	}
	close(connection);
}

bool step_mmds(const char *argument)
{
	char address[32];
	const char *slash = argument ? strchr(argument, '/') : NULL;
	int connection;
	bool good;

	if (!slash)
		return step_failed("mmds", "give an address and a path, as in mmds=169.254.169.254/a");
	snprintf(address, sizeof(address), "%.*s", (int)(slash - argument), argument);
	connection = connect_to(address);
	if (connection < 0)
		return step_failed_errno("mmds", address);
	good = fetch(connection, slash + 1);
	close(connection);
	return good;
}
