"""What a step costs the engine core, and how long its message takes to reach every rank, without a model.

The ranks are processes that note when a message arrives, decode it, and answer with a token for each request, as a rank
whose GPU took no time would. Prints one JSON object per batch size:

    cpu_us      the core's processor time for schedule(), encoding and sending to all ranks
    driver_us   the same by the clock: on a machine with fewer cores than ranks, those take the core away meanwhile
    arrival_us  from the beginning of schedule() until the last rank has the message
    update_us   committing the sampled tokens when the output is back
    bytes       of the message, for the median step and for the largest

Usage: python tests/bench/step_overhead.py [RANKS]
"""

import json
import os
import statistics
import struct
import sys
import time
from array import array
from multiprocessing import get_context

import msgspec

from eagleray.cluster.core.messages import EngineRequest
from eagleray.cluster.core.scheduler import Scheduler
from eagleray.workers.protocol.channel import Endpoint, Hub, Peer
from eagleray.workers.protocol.messages import Sampling, Step, StepOutput

BLOCK_SIZES = (128, 16)  # as on CUDA and on CPU; one request in so many gets a block in each step
PROMPT_TOKENS = 100
WARM_UP, STEPS = 50, 400


def rank_process(endpoint: Endpoint, name: bytes) -> None:
    peer = Peer(endpoint, name)
    peer.send(b"")
    decode = msgspec.msgpack.Decoder(Step).decode
    while payload := peer.receive():
        arrived = time.monotonic_ns()
        peer.send(struct.pack("qq", decode(payload).step, arrived))


def measure(num_requests: int, block_size: int, hub: Hub, names: list[bytes]) -> dict[str, float]:
    scheduler = Scheduler(
        num_blocks=num_requests * 64, block_size=block_size, max_num_seqs=num_requests, max_num_batched_tokens=1 << 20
    )
    for index in range(num_requests):
        prompt = array("i", [(index * 7919 + i) % 32000 for i in range(PROMPT_TOKENS + index % block_size)])
        scheduler.add(b"me", EngineRequest(index, prompt.tobytes(), Sampling(), max_tokens=WARM_UP + STEPS + 1))
    encode = msgspec.msgpack.Encoder().encode
    cpu, driver, arrival, update, sizes = [], [], [], [], []
    for _ in range(WARM_UP + STEPS):
        begin, begin_cpu = time.monotonic_ns(), time.thread_time_ns()
        step = scheduler.schedule()
        assert step is not None
        payload = encode(step)
        for name in names:
            hub.send(name, payload)
        sent, sent_cpu = time.monotonic_ns(), time.thread_time_ns()
        arrived = max(struct.unpack("qq", receive(hub))[1] for _ in names)
        output = StepOutput(step.step, array("i", range(num_requests)).tobytes())
        before = time.monotonic_ns()
        scheduler.update(output)
        update.append(time.monotonic_ns() - before)
        cpu.append(sent_cpu - begin_cpu)
        driver.append(sent - begin)
        arrival.append(arrived - begin)
        sizes.append(len(payload))
    return {
        "requests": num_requests,
        "block_size": block_size,
        "ranks": len(names),
        "cpu_us": microseconds(cpu),
        "driver_us": microseconds(driver),
        "arrival_us": microseconds(arrival),
        "update_us": microseconds(update),
        "bytes_median": statistics.median(sizes[WARM_UP:]),
        "bytes_unchanged": min(sizes[WARM_UP:]),
        "bytes_largest": max(sizes[WARM_UP:]),
    }


def microseconds(nanoseconds: list[int]) -> float:
    return round(statistics.median(nanoseconds[WARM_UP:]) / 1000, 1)


def receive(hub: Hub) -> bytes:
    while not (message := hub.receive()):
        hub.socket.poll()
    return message[1]


def main() -> None:
    names = [b"rank %d" % rank for rank in range(int(sys.argv[1]) if len(sys.argv) > 1 else 4)]
    hub = Hub()
    processes = [get_context("spawn").Process(target=rank_process, args=(hub.endpoint, name)) for name in names]
    for process in processes:
        process.start()
    for _ in names:
        receive(hub)
    print(json.dumps({"python": sys.version.split()[0], "cores": os.cpu_count()}))
    for block_size in BLOCK_SIZES:
        for num_requests in (1, 32, 256):
            print(json.dumps(measure(num_requests, block_size, hub, names)), flush=True)
    for name in names:
        hub.send(name, b"")
    for process in processes:
        process.join()
    hub.close()


if __name__ == "__main__":
    main()
