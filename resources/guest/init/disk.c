// SPDX-License-Identifier: Apache-2.0
// Disks: what they say of themselves, files written to them and read back, and
// those that may not be written.

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "guest.h"

#define MOUNT_POINT "/mnt"
#define FILE_NAME "brume-wrote"
#define EXT_MAGIC 0xef53
// O_DIRECT wants whole sectors.
#define FILE_BYTES (16 * 1024)

static const char *disk_name(const char *argument)
{
	return argument && *argument ? argument : "vda";
}

// The file's content: the token and a newline, again and again, cut at FILE_BYTES.
static void fill(char *content)
{
	const char *token = cmdline_value("brume.token");
	size_t length;

	if (!token || !*token)
		token = "brume";
	length = strlen(token);
	for (size_t i = 0; i < FILE_BYTES; i++)
		content[i] = i % (length + 1) == length ? '\n' : token[i % (length + 1)];
}

static bool write_file(const char *path, const char *content)
{
	int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	bool written;

	if (file < 0)
		return false;
	written = write(file, content, FILE_BYTES) == FILE_BYTES && !fsync(file);
	return !close(file) && written;
}

// Past the page cache, so that it is the disk that answers.
static bool read_file(const char *path, char *content)
{
	int file = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	ssize_t length;

	if (file < 0)
		return false;
	length = read(file, content, FILE_BYTES);
	close(file);
	if (length >= 0 && length != FILE_BYTES)
		errno = EIO;
	return length == FILE_BYTES;
}

// The root file system if it is a disk's and no disk was named, else the disk mounted.
static const char *mount_disk(const char *argument)
{
	char device[64];
	struct statfs root;

	if (!argument && !statfs("/", &root) && root.f_type == EXT_MAGIC)
		return mount(NULL, "/", NULL, MS_REMOUNT, NULL) ? NULL : "/";
	snprintf(device, sizeof(device), "/dev/%s", disk_name(argument));
	mkdir(MOUNT_POINT, 0755);
	return mount(device, MOUNT_POINT, "ext4", 0, NULL) ? NULL : MOUNT_POINT;
}

static void unmount_disk(const char *directory)
{
	if (strcmp(directory, "/"))
		umount(directory);
	else
		sync();
}

bool step_disk(const char *argument)
{
	static char wrote[FILE_BYTES], holds[FILE_BYTES] __attribute__((aligned(4096)));
	const char *directory = mount_disk(argument);
	char path[64];
	bool written, there;

	if (!directory)
		return step_failed_errno("disk", "mount");
	fill(wrote);
	snprintf(path, sizeof(path), "%s/%s", directory, FILE_NAME);
	written = write_file(path, wrote);
	there = written && read_file(path, holds);
	if (!written)
		step_failed_errno("disk", "writing");
	else if (!there)
		step_failed_errno("disk", "reading back");
	unmount_disk(directory);
	if (!there)
		return false;
	if (memcmp(wrote, holds, FILE_BYTES))
		return step_failed("disk", "what was read back differs");
	return step_ok("disk", "file=%s bytes=%d fnv=%016llx", path, FILE_BYTES,
		       (unsigned long long)fnv1a(FNV_START, holds, FILE_BYTES));
}

// The errno that a write to the device itself ends with, or 0.
static int write_device(const char *device)
{
	static char sector[512];
	int file = open(device, O_WRONLY | O_CLOEXEC);
	int error = 0;

	if (file < 0)
		return errno;
	if (write(file, sector, sizeof(sector)) != sizeof(sector) || fsync(file))
		error = errno;
	close(file);
	return error;
}

static int create_file(void)
{
	int file = open(MOUNT_POINT "/" FILE_NAME, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	int error = file < 0 ? errno : 0;

	if (file >= 0)
		close(file);
	return error;
}

bool step_diskro(const char *argument)
{
	char device[64];
	int created, wrote;

	snprintf(device, sizeof(device), "/dev/%s", disk_name(argument));
	mkdir(MOUNT_POINT, 0755);
	if (!mount(device, MOUNT_POINT, "ext4", 0, NULL)) {
		umount(MOUNT_POINT);
		return step_failed("diskro", "%s was mounted for writing", device);
	}
	if (mount(device, MOUNT_POINT, "ext4", MS_RDONLY, NULL))
		return step_failed_errno("diskro", "mounting read-only");
	created = create_file();
	umount(MOUNT_POINT);
	wrote = write_device(device);
	if (created != EROFS)
		return step_failed("diskro", "creating a file: %s", strerror(created));
	if (!wrote)
		return step_failed("diskro", "a sector of %s was written", device);
	return step_ok("diskro", "file=EROFS device=%s", wrote == EPERM ? "EPERM" : wrote == EROFS ? "EROFS" : "error");
}

static uint64_t block_number(const char *disk, const char *what)
{
	char path[128];

	snprintf(path, sizeof(path), "/sys/block/%s/%s", disk, what);
	return read_number(path, 0);
}

static void tell_disk(const char *disk)
{
	char path[128], serial[64] = "", cache[32] = "";

	snprintf(path, sizeof(path), "/sys/block/%s/serial", disk);
	read_text(path, serial, sizeof(serial));
	snprintf(path, sizeof(path), "/sys/block/%s/cache_type", disk);
	read_text(path, cache, sizeof(cache));
	step_ok("blkid", "disk=%s bytes=%llu ro=%llu serial=%s cache=%s logical=%llu max_segments=%llu discard_max=%llu",
		disk, (unsigned long long)block_number(disk, "size") * 512,
		(unsigned long long)block_number(disk, "ro"), *serial ? serial : "none",
		// "write back" or "write through"
		strstr(cache, "back") ? "back" : "through",
		(unsigned long long)block_number(disk, "queue/logical_block_size"),
		(unsigned long long)block_number(disk, "queue/max_segments"),
		(unsigned long long)block_number(disk, "queue/discard_max_bytes"));
}

bool step_blkid(const char *argument)
{
	DIR *disks = opendir("/sys/block");
	int count = 0;

	(void)argument;
	for (struct dirent *entry; disks && (entry = readdir(disks));) {
		if (strncmp(entry->d_name, "vd", 2))
			continue;
		tell_disk(entry->d_name);
		count++;
	}
	if (disks)
		closedir(disks);
	return count ? true : step_failed("blkid", "no disk");
}
