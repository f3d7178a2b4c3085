#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The demo: boots a Linux guest with a disk and a network, shows what it says, and ends with 0 only
# if the guest reached user space, wrote a file and read it back, pinged the host, and powered off.
#
#   demo.sh BRUME GUEST_FOLDER
#
# Bridge and TAP live in a network namespace that ends with the demo, so the host's own network is
# not touched and nothing is left behind.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

brume=$(readlink -f "$1")
guest=$(readlink -f "$2")
here=$(dirname "$(readlink -f "$0")")

if [ "${BRUME_DEMO_INSIDE:-}" != 1 ]; then
    [ -r /dev/kvm ] && [ -w /dev/kvm ] || {
        echo "demo: /dev/kvm is missing or not ours to use (is the user in its group?)" >&2
        exit 1
    }
    unshare=(unshare --net)
    [ "$(id -u)" -eq 0 ] || unshare+=(--map-root-user)
    BRUME_DEMO_INSIDE=1 exec "${unshare[@]}" bash "$0" "$@"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

host=10.77.0.1 address=10.77.0.2 token=demo-$$
cp --sparse=always "$guest/rootfs.ext4" "$work/disk.ext4"
ip link set lo up
ip link add br0 type bridge
ip address add "$host/24" dev br0
ip link set br0 up

status=0
"$brume" run \
    --kernel "$guest/vmlinux" --initrd "$guest/initramfs.cpio" --memory 256M \
    --disk "$work/disk.ext4" --net bridge=br0 \
    --cmdline "$(cat "$here/guest/cmdline.txt") brume.token=$token brume.ip=$address/24 \
brume.do=hello,cpus,disk,net,ping=$host,poweroff" </dev/null | tee "$work/console" || status=$?

echo
missing=0
check() { # WHAT COMMAND...
    local what=$1
    shift
    if "$@" >/dev/null 2>&1; then
        echo "demo: ok      $what"
    else
        echo "demo: MISSING $what"
        missing=1
    fi
}
said() { grep -q "^brume-guest: $1 ok" "$work/console"; }
check "the guest reached user space" said hello
check "its CPU works" said cpus
check "it wrote a file on its disk and read it back" said disk
check "it reached the host over its network" said ping
check "it asked to be powered off" said poweroff
check "brume ended with status 0" test "$status" -eq 0
check "the host finds the guest's file on the disk" \
    sh -c "debugfs -R 'cat /brume-wrote' '$work/disk.ext4' 2>/dev/null | grep -q '$token'"
exit "$missing"
