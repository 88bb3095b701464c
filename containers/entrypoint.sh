#!/bin/sh
# docker run IMAGE quickstart --arch t5            any rlhf command
# docker run IMAGE rlhf quickstart --arch t5       the same
# docker run IMAGE job STAGE --executor_input=...  a step of the Vertex pipeline
# docker run IMAGE serve --model FOLDER            a tuned model over HTTP, for Vertex's endpoints
#
# exec, so that Python replaces this shell as process 1 and receives SIGTERM itself: a stage saves
# and exits with 75.
set -eu

case "${1:-}" in
job)
    shift
    exec python -m rlhf.vertex.job "$@"
    ;;
serve)
    shift
    exec python -m rlhf.vertex.serve "$@"
    ;;
rlhf)
    shift
    ;;
esac
exec rlhf "$@"
