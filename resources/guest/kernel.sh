#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# kernel.sh WORK OUT: builds vmlinux and bzImage into OUT. For build.sh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$1
out=$2
source=$work/source

# The same input gives the same image, wherever and whenever it is built.
export KBUILD_BUILD_USER=brume KBUILD_BUILD_HOST=brume KBUILD_BUILD_VERSION=1
export KBUILD_BUILD_TIMESTAMP='2024-01-01 00:00:00 UTC'
# Memory is cleared and copied eight bytes at a time: an emulator pays by the step.
export KCFLAGS='-mmemset-strategy=rep_8byte:-1:noalign -mmemcpy-strategy=rep_8byte:-1:noalign'

# Every line of the fragment must stand in the configuration that came of it: Kconfig drops
# what cannot be without a word.
check_config() {
	local line wrong=0
	while read -r line; do
		case $line in
		CONFIG_*) grep -qxF -- "$line" .config || { echo "not in .config: $line"; wrong=1; } ;;
		'# CONFIG_'*' is not set')
			line=${line#\# }
			! grep -q "^${line%% *}=" .config || { echo "still on: ${line%% *}"; wrong=1; } ;;
		esac
	done <"$here/kernel.config"
	return $wrong
}

mkdir "$source"
echo "unpacking the source"
tar -x -J -f /usr/src/linux-source-6.1.tar.xz -C "$source" --strip-components=1
cd "$source"
for patch in "$here"/patches/*.patch; do
	patch -p1 -i "$patch"
done
make -s tinyconfig
scripts/kconfig/merge_config.sh -m .config "$here/kernel.config"
make -s olddefconfig
check_config
make -j"$(nproc)" vmlinux bzImage
strip -o "$out/vmlinux" vmlinux
cp arch/x86/boot/bzImage "$out/bzImage"
