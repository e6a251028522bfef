"""Trains, scores and compares everything behind the evidence: `python figure/run_evidence.py --size small`.

Jobs run several at a time, spread over the GPUs. It can be repeated: what is done is not done again. At the end, and
whenever it is stopped, the results so far are written to figure/results/SIZE.json, and draw_evidence.py makes figures
and claims of them. figure/README.md says more.
"""

import argparse
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "dual_rl")]
from draw_evidence import draw_all  # noqa: E402
from evidence.collecting import collect, write_results  # noqa: E402
from evidence.machine import Machine, find_gpus  # noqa: E402
from evidence.merging import merge  # noqa: E402
from evidence.plan import Plan  # noqa: E402
from evidence.running import REPOSITORY, Runner  # noqa: E402
from evidence.sizes import SIZES  # noqa: E402


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="see evidence/sizes.py")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="arms or jobs, shell patterns")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these of the size's seeds")
    parser.add_argument(
        "--jobs", type=int, help="at a time; default: one a CPU core, with GPUs min(cores / 2, 8 a GPU)"
    )
    parser.add_argument("--device", choices=["cpu", "gpu"], default="gpu" if find_gpus() else "cpu")
    parser.add_argument("--attempts", type=int, default=3, help="tries of a job that fails")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then; the same command goes on")
    parser.add_argument("--work", help="folder for data, models and logs; default: figure/output/SIZE")
    parser.add_argument("--results", type=Path, help="file of results; default: figure/results/SIZE.json")
    parser.add_argument("--list", action="store_true", help="show the commands and stop")
    parser.add_argument("--collect", action="store_true", help="run nothing, write the results so far")
    parser.add_argument(
        "--merge", nargs="+", type=Path, default=[], metavar="FILE", help="run nothing, add results of other machines"
    )
    options = parser.parse_args(argv)
    if options.device == "gpu" and not find_gpus():
        parser.error("--device gpu finds none: see `nvidia-smi --list-gpus` and CUDA_VISIBLE_DEVICES")
    return options


def stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the ending
    sys.exit("stopped; the same command goes on")


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 when a job failed or was done with another command."""
    options = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    machine = Machine.find(options.device, options.jobs)
    work = os.path.relpath(options.work or HERE / "output" / options.size, REPOSITORY)
    plan = Plan(SIZES[options.size], work, device=machine.device)
    jobs = plan.select(options.only, seeds=options.seeds)
    if options.list:
        sys.stdout.write("".join(f"{job.name}\n    {job.text}\n" for job in jobs))
        return 0
    results = options.results or HERE / "results" / f"{options.size}.json"

    def publish(others: Sequence[Path] = ()) -> None:
        write_results(results, merge(collect(plan, REPOSITORY / work, name=options.size), others, plan))
        sys.stdout.write(draw_all(results))

    failed = []
    try:
        if options.merge:
            publish(options.merge)
            return 0
        signal.signal(signal.SIGTERM, stop)
        try:
            if not options.collect:
                attempts, minutes = options.attempts, options.minutes
                failed = Runner(REPOSITORY / work, machine=machine, attempts=attempts, minutes=minutes).run(jobs)
        finally:
            publish()
    except (OSError, ValueError, TimeoutError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}; the same command tries them again\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
