#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# userland.sh WORK OUT: builds initramfs.cpio and rootfs.ext4 into OUT. For build.sh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$1
out=$2
tree=$work/tree

# SSE2 and no more: a kernel told `noxsave` keeps nothing wider for its programs.
flags=(-std=gnu11 -D_GNU_SOURCE -static -Os -march=x86-64 -Wall -Wextra -Werror -Wno-format-truncation)
musl-gcc "${flags[@]}" -o "$work/init" "$here"/init/*.c
strip "$work/init"

# An archive without compression, and of one file: each costs the emulated kernel time.
mkdir "$tree"
cp "$work/init" "$tree/init"
touch -d @0 "$tree" "$tree/init"
(cd "$tree" && echo init | cpio --quiet --reproducible -o -H newc -R +0:+0) >"$out/initramfs.cpio"
rm "$tree/init"

mkdir -p "$tree"/{dev,etc,mnt,proc,root,sbin,sys,tmp}
cp "$work/init" "$tree/sbin/init"
echo 'The test guest of brume.' >"$tree/etc/motd"
find "$tree" -exec touch -d @0 {} +

# No journal and no checksums: what they cost the emulated kernel tests nothing of a disk.
# Fixed identifiers, and nothing left for the guest to initialise.
mke2fs -q -t ext4 -L brume -U 6272756d-6500-4000-8000-677565737401 \
	-O '^has_journal,^metadata_csum,^64bit,^resize_inode' \
	-E hash_seed=6272756d-6500-4000-8000-677565737402,lazy_itable_init=0,root_owner=0:0 \
	-d "$tree" "$out/rootfs.ext4" 48M
