"""Plans of five studies for hardware that is not here, as `subjax plan --topology` prints them.

    python benchmarks/plans.py                  all of them: about ten minutes on two cores, and up to 8 GB
    python benchmarks/plans.py llama-3.1-8b     one of them

Writes benchmarks/results/plans.json: for each its command, the lines that were printed, the exit status (1 where
something does not fit) and the date. `tests/test_plans.py` (slow) compiles the same and checks them.
"""

import datetime
import json
import pathlib
import subprocess
import sys

RESULTS = pathlib.Path(__file__).parent / "results" / "plans.json"
_PAPER = "--config=configs/paper_animals.py:traits=owl,runs=1"
PLANS: dict[str, tuple[str, ...]] = {
    "qwen2.5-7b-lora": (_PAPER, "--config.student.batch=64", "--topology=v5e:4x4", "--mesh=fsdp:16"),
    "llama-3.1-8b-full": (
        _PAPER, "--config.models=llama=meta-llama/Llama-3.1-8B-Instruct", "--config.student.tuning.kind=full",
        "--config.student.batch=64", "--topology=v5p:4x4x4", "--mesh=fsdp:64",
    ),
    "gemma-3-27b-sampling": (
        _PAPER, "--config.models=gemma=google/gemma-3-27b-it", "--config.student.batch=64", "--topology=v6e:4x4",
        "--mesh=tensor:16",
    ),
    # Does not fit, neither sampling nor training; it says what would.
    "gemma-3-27b-full": (
        _PAPER, "--config.models=gemma=google/gemma-3-27b-it", "--config.student.tuning.kind=full",
        "--config.student.batch=64", "--topology=v6e:4x4", "--mesh=fsdp:16",
    ),
    "llama-3.1-70b-full": (
        _PAPER, "--config.models=llama=meta-llama/Llama-3.1-70B-Instruct", "--config.student.tuning.kind=full",
        "--config.student.batch=512", "--topology=v5p:8x8x8", "--mesh=fsdp:64,tensor:8",
    ),
}  # fmt: skip


def main(names: list[str]) -> None:
    """Run the plans named, or all, and write what they printed beside those that stand there."""
    unknown = [name for name in names if name not in PLANS]
    if unknown:
        raise SystemExit(f"no plan {unknown[0]!r}; known: {', '.join(PLANS)}")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or PLANS:
        words = [sys.executable, "-m", "subjax", "plan", "--quiet", *PLANS[name]]
        ran = subprocess.run(words, capture_output=True, text=True, check=False)
        print(ran.stdout, ran.stderr, sep="")
        found[name] = record(name, ran.stdout, ran.returncode)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def record(name: str, printed: str, status: int) -> dict[str, object]:
    """What is kept of one plan."""
    return {
        "command": " ".join(("subjax plan", *PLANS[name])),
        "date": datetime.date.today().isoformat(),
        "status": status,
        "printed": printed.splitlines(),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
