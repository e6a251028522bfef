"""Trains, scores and compares everything behind the evidence: `python figure/run_evidence.py --size small`.

Can be repeated: what is done is not done again. At the end, and whenever it is stopped, the results so far are written
to figure/results/SIZE.json, and draw_evidence.py makes figures and claims of them. figure/README.md says more.
"""

import argparse
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "dual_rl")]
from draw_evidence import draw_all  # noqa: E402
from evidence.collecting import collect, write_results  # noqa: E402
from evidence.plan import Device, Plan  # noqa: E402
from evidence.running import REPOSITORY, Runner  # noqa: E402
from evidence.sizes import SIZES  # noqa: E402

GPU_SHARE = 0.6  # of the memory, for all engines together


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="see evidence/sizes.py")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="arms or jobs, shell patterns")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these of the size's seeds")
    parser.add_argument("--jobs", type=int, help="experiments at a time; default: one a CPU core, 4 on a GPU")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="gpu" if shutil.which("nvidia-smi") else "cpu")
    parser.add_argument("--attempts", type=int, default=2, help="tries of a job that fails")
    parser.add_argument("--work", help="folder for data, models and logs; default: figure/output/SIZE")
    parser.add_argument("--results", type=Path, help="file of results; default: figure/results/SIZE.json")
    parser.add_argument("--list", action="store_true", help="show the commands and stop")
    parser.add_argument("--collect", action="store_true", help="run nothing, write the results so far")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 when a job failed or was done with another command."""
    options = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    num_jobs = options.jobs or (4 if options.device == "gpu" else len(os.sched_getaffinity(0)))
    share = round(GPU_SHARE / num_jobs, 3)
    device = Device(1, share, scoring_threads=4) if options.device == "gpu" else Device()
    work = os.path.relpath(options.work or HERE / "output" / options.size, REPOSITORY)
    plan = Plan(SIZES[options.size], work, device=device)
    jobs = plan.select(options.only, seeds=options.seeds)
    if options.list:
        sys.stdout.write("".join(f"{job.name}\n    {job.text}\n" for job in jobs))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    failed = []
    try:
        if not options.collect:
            failed = Runner(REPOSITORY / work, num_parallel=num_jobs, attempts=options.attempts).run(jobs)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        results = options.results or HERE / "results" / f"{options.size}.json"
        write_results(results, collect(plan, REPOSITORY / work, name=options.size))
        sys.stdout.write(draw_all(results))
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}; the same command tries them again\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
