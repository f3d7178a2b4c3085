#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the test guest: vmlinux, bzImage, initramfs.cpio, rootfs.ext4; and cmdline.txt beside them.
#
#   build.sh [--out DIR]        DIR is target/guest of the project if left out
#
# What was built is kept in ${XDG_CACHE_HOME:-~/.cache}/brume/guest, under a
# hash of all that went into it, so the kernel is built once for all checkouts.
# The kernel and the userland are kept apart.
set -euo pipefail
export LC_ALL=C
export PATH=$PATH:/usr/sbin:/sbin

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/brume/guest
out=$here/../../target/guest
work=
child=

say() { printf 'guest: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# For a person who waits: one line that is written over. Nothing in a pipe.
progress() { if [ -t 2 ]; then printf '\r\033[Kguest: %s' "$*" >&2; fi; }
progress_end() { if [ -t 2 ]; then printf '\r\033[K' >&2; fi; }

# A build stopped from outside takes its compilers along, and leaves nothing half done.
clean_up() {
	if [ -n "$child" ]; then kill -- "-$child" 2>/dev/null && wait "$child" || true; fi
	if [ -n "$work" ]; then rm -rf "$work"; fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

packages() { grep -v '^#' "$here/packages.txt" | grep .; }

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

install_packages() {
	local package missing=() root=()
	for package in $(packages); do
		installed "$package" || missing+=("$package")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	command -v apt-get >/dev/null || die "needs these Debian packages: ${missing[*]}"
	if [ "$(id -u)" != 0 ]; then
		sudo -n true 2>/dev/null || die "packages are missing; run: sudo apt-get install ${missing[*]}"
		root=(sudo)
	fi
	say "installing ${missing[*]}"
	logged "$cache/packages.log" "${root[@]}" sh -c 'apt-get update -q &&
		DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"' sh "${missing[@]}"
}

# logged LOG COMMAND...: the command's output goes to the log; its last lines are shown if it fails.
logged() {
	local log=$1 status=0
	shift
	setsid "$@" >"$log" 2>&1 </dev/null &
	child=$!
	while [ -t 2 ] && kill -0 "$child" 2>/dev/null; do
		progress "$(tail -n 1 "$log" | cut -c 1-60)"
		sleep 0.5
	done
	wait "$child" || status=$?
	child=
	progress_end
	[ $status = 0 ] || { tail -n 30 "$log" >&2; die "failed; the whole log is $log"; }
}

# The hash of the named files' names and contents, and of the text given before `--`.
key() {
	local text=()
	while [ "$1" != -- ]; do text+=("$1"); shift; done
	shift
	{
		printf '%s\n' "${text[@]}"
		for file in "$@"; do printf '%s ' "${file#"$here"/}"; sha256sum <"$file"; done
	} | sha256sum | cut -c 1-24
}

version() { dpkg-query -W -f '${Version}' "$1"; }

# build PART KEY FILE...: makes sure that the cache has the part, by running PART.sh if it has not.
build() {
	local part=$1 store=$cache/$1-$2 started=$SECONDS
	[ ! -d "$store" ] || return 0
	exec 9>"$cache/$part.lock"
	if ! flock -n 9; then
		say "$part: waiting for another build"
		flock 9
	fi
	if [ ! -d "$store" ]; then
		# The lock is held, so what lies here was left by a build that was killed.
		rm -rf "$cache/$part".work.*
		work=$(mktemp -d "$cache/$part.work.XXXXXX")
		say "$part: building"
		mkdir "$work/out"
		logged "$cache/$part.log" bash "$here/$part.sh" "$work" "$work/out"
		mv "$work/out" "$store"
		clean_up
		work=
		say "$part: built in $((SECONDS - started)) s"
	fi
	exec 9>&-
}

# Each file appears at once and whole, and stays as it is if nothing changed in it.
deliver() {
	local file to
	for file in "$@"; do
		to=$out/${file##*/}
		cmp -s "$file" "$to" && continue
		cp --sparse=always "$file" "$to.new.$$"
		mv "$to.new.$$" "$to"
	done
}

while [ $# -gt 0 ]; do
	case $1 in
	--out) [ $# -gt 1 ] || die "--out needs a directory"; out=$2; shift 2 ;;
	*) die "usage: build.sh [--out DIR]" ;;
	esac
done

mkdir -p "$cache" "$out"
out=$(cd "$out" && pwd)
install_packages
kernel=$(key "$(version linux-source-6.1)" "$(version gcc)" -- \
	"$here/kernel.sh" "$here/kernel.config" "$here"/patches/*.patch)
userland=$(key "$(version musl-tools)" "$(version musl-dev)" "$(version gcc)" -- \
	"$here/userland.sh" "$here"/init/*.[ch])
build kernel "$kernel"
build userland "$userland"
deliver "$cache/kernel-$kernel"/* "$cache/userland-$userland"/* "$here/cmdline.txt"
say "ready in $out"
