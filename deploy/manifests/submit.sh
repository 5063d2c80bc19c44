#!/usr/bin/env bash
# Submits `eagleray batch` to a Ray cluster as a job, and follows its log until it ends:
#
#   deploy/manifests/submit.sh INPUT OUTPUT --model DIR [more options of `eagleray batch`]
#   deploy/manifests/submit.sh --address http://head:8265 --no-wait -- INPUT OUTPUT --model DIR
#
# What stands before -- goes to `ray job submit`, which finds the cluster by --address or RAY_API_SERVER_ADDRESS. Paths
# are those of the cluster's nodes, where Eagleray must be installed. A job that was killed goes on when it is submitted
# again with the same words.
set -euo pipefail

fail() {
    echo "submit.sh: $1" >&2
    exit 2
}

submit_options=()
for word in "$@"; do
    if [ "$word" = -- ]; then
        while [ "$1" != -- ]; do
            submit_options+=("$1")
            shift
        done
        shift
        break
    fi
done

[ $# -ge 2 ] || fail "give INPUT and OUTPUT first, then options of \`eagleray batch\`"
for place in "$1" "$2"; do
    case "$place" in
    /* | *://*) ;;
    *) fail "$place is neither an absolute path nor a URL; the job runs on the cluster, in another directory" ;;
    esac
done
command -v ray >/dev/null || fail "there is no \`ray\` command; install Eagleray here, too, or activate its environment"

exec ray job submit ${submit_options[@]+"${submit_options[@]}"} -- python -m eagleray batch "$@"
