#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lets schemathesis send what it makes up from the OpenAPI document to a live brume, and checks that
# each answer is as the document says: resources/schemathesis.sh BRUME [GUEST_DIRECTORY]
# First to a machine that is not started; with a guest, then to one that runs.
# SCHEMATHESIS_ARGS has more arguments for it, such as `--seed 1` or `--max-examples 500`.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
brume=$(readlink -f "$1")
guest=${2:+$(readlink -f "$2")}
venv=$here/../target/schemathesis
port=${SCHEMATHESIS_PORT:-18731}
version=4.32.5

if ! "$venv/bin/schemathesis" --version 2>/dev/null | grep -q "$version"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet "schemathesis==$version"
fi
schemathesis=$(readlink -f "$venv/bin")/schemathesis

# Clients choose the paths of logs, metrics and sockets: a directory that is thrown away.
dir=$(mktemp -d)
relay=
status=0
end() {
    [ -z "$relay" ] || kill "$relay" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$dir"
}
trap end EXIT
cd "$dir"

# The stream of events has no end. What is valid by its form can still be refused, because there is
# no such file for example; and an unknown method gets Firecracker's 400.
checks=not_a_server_error,status_code_conformance,content_type_conformance
checks+=,response_headers_conformance,response_schema_conformance,negative_data_rejection

run() {
    python3 "$here/schemathesis/relay.py" "$port" "$brume" "$@" &
    relay=$!
    # shellcheck disable=SC2086
    "$schemathesis" run "$here/openapi.yaml" --url "http://127.0.0.1:$port" \
        --wait-for-schema 10 --request-timeout 10 --header "Connection: close" \
        --phases examples,coverage,fuzzing --checks "$checks" --exclude-path /events \
        --continue-on-failure --warnings off ${SCHEMATHESIS_ARGS:-} || status=1
    # It has failed already if brume ended in a way of its own.
    kill "$relay" || status=1
    wait "$relay" || status=1
    relay=
}

echo "schemathesis: a machine that is not started"
run
if [ -n "$guest" ]; then
    # Without a root file system it comes to a panic, and stays there.
    truncate -s 1M disk
    args=$(sed 's/panic=-1/panic=0/' "$guest/cmdline.txt")
    cat >vm.json <<END
{
    "boot-source": {"kernel_image_path": "$guest/vmlinux", "boot_args": "$args"},
    "drives": [{"drive_id": "root", "is_root_device": true, "path_on_host": "disk"}],
    "balloon": {
        "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1,
        "free_page_hinting": true
    },
    "entropy": {}
}
END
    echo "schemathesis: a machine that runs"
    run --config-file vm.json
fi
exit "$status"
