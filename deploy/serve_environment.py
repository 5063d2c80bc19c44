"""How Ray Serve is set up for streams of small events, where `eagleray serve` starts Ray itself.

Serve reads these from the environment of its processes, which is that of Ray's nodes. Where Ray runs already they must
have been there when it started: `deploy/README.md` says how. What the user has set stays.
"""

import os

FASTER_STREAMS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # the replica waits for nothing but its event loop
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # events go from replica to proxy over gRPC, and not as Ray objects
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",  # lines; an error writes them at once
}


def set_environment() -> None:
    """For Ray processes that this one starts."""
    for name, value in FASTER_STREAMS.items():
        os.environ.setdefault(name, value)
