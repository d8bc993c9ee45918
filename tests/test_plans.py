"""Plans of real studies for TPUs that are not here, at full size. Weights of a device are derived by hand in each."""

import pytest

from subjax import cli
from subjax.parallel.topology import missing, parse_topology

PAPER = "--config=configs/paper_animals.py:traits=owl,runs=1"
LLAMA8 = "--config.models=llama=meta-llama/Llama-3.1-8B-Instruct"
LLAMA70 = "--config.models=llama=meta-llama/Llama-3.1-70B-Instruct"
GEMMA = "--config.models=gemma=google/gemma-3-27b-it"
FULL, ROWS = "--config.student.tuning.kind=full", "--config.student.batch=64"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        missing(parse_topology("v5e:4x4")) is not None, reason="libtpu, which describes TPUs, is not installed"
    ),
]


def planned(capsys, *words: str) -> tuple[int, dict[str, list[str]], str]:
    """Exit status, the table's rows by program, and all that was printed."""
    status = cli.main(["plan", "--quiet", PAPER, *words])
    out = capsys.readouterr().out
    rows = {}
    for line in out.splitlines():
        words_of = line.split()
        for program in ("prefill", "decode", "step"):
            if program in words_of[:4] and ("yes" in words_of or "NO" in words_of):
                rows[program] = words_of[words_of.index(program) :]
    return status, rows, out


def test_qwen_7b_lora_on_sixteen_v5e(capsys):
    """7,615,616,512 weights of bfloat16 over 16 devices: 908 MiB."""
    status, rows, out = planned(capsys, ROWS, "--topology=v5e:4x4", "--mesh=fsdp:16")
    assert status == 0
    assert [rows[name][1] for name in ("prefill", "decode", "step")] == ["yes"] * 3
    assert "step: " in out
    assert "weights 908 MiB" in out
    assert "device-hours, at the roofline" in out.splitlines()[-1]


def test_llama_8b_full_on_sixty_four_v5p(capsys):
    """8,030,261,248 masters of float32 over 64 devices: 479 MiB, their moments 957, the base beside 239."""
    status, rows, out = planned(capsys, LLAMA8, FULL, ROWS, "--topology=v5p:4x4x4", "--mesh=fsdp:64")
    assert status == 0
    assert rows["step"][1] == "yes"
    assert "weights 479 MiB, optimizer 957 MiB" in out
    assert "beside 239 MiB" in out


def test_gemma_27b_sampling_on_sixteen_v6e(capsys):
    """27,009,346,304 weights of bfloat16, matrices over 16 devices: 3.15 GiB."""
    status, rows, out = planned(capsys, GEMMA, ROWS, "--topology=v6e:4x4", "--mesh=tensor:16")
    assert status == 0
    assert [rows[name][1] for name in ("prefill", "decode", "step")] == ["yes"] * 3
    assert "weights 3.15 GiB" in out


def test_gemma_27b_full_on_sixteen_v6e_and_what_would_fit(capsys):
    """Masters of float32 over 16 devices 6.29 GiB, their moments 12.6, the base beside 3.14, gradients 6.29, and of the
    output matrix, gathered, 1,409,630,208 weights in bfloat16 and their gradient in float32, 7.9: 36 GiB of 31.25. The
    sampler's weights, which fsdp does not share out, are 50.3 GiB. The compiler accepts what is named for each.
    """
    status, rows, out = planned(capsys, GEMMA, FULL, ROWS, "--topology=v6e:4x4", "--mesh=fsdp:16")
    assert status == 1
    assert rows["step"][1] == "NO"
    sampler, student = (line for line in out.splitlines() if "does not fit: " in line)
    assert "the share needs 52.4 GiB a device and there are 31.2 GiB (the compiler's word)" in sampler
    assert "what would fit: --mesh=replica:8,tensor:2, " in sampler
    assert "weights 6.29 GiB, optimizer 12.6 GiB" in out
    assert "beside 3.14 GiB" in out
    assert "GiB a device and there are 31.2 GiB (the compiler's word)" in student
    assert "what would fit: --topology=v6e:4x8 --mesh=fsdp:32, " in student
    assert all(line.endswith("a device (compiles)") for line in (sampler, student))
    assert out.splitlines()[-1] == "sweep: no device-hours, because something does not fit"


def test_llama_70b_full_on_five_hundred_and_twelve_v5p(capsys):
    """70,553,706,496 masters of float32 over 512 devices: 526 MiB, their moments 1.03 GiB."""
    status, rows, out = planned(
        capsys, LLAMA70, FULL, "--config.student.batch=512", "--topology=v5p:8x8x8", "--mesh=fsdp:64,tensor:8"
    )
    assert status == 0
    assert rows["step"][1] == "yes"
    assert "weights 526 MiB" in out
    assert "optimizer 1.03 GiB" in out
