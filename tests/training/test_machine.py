"""What the system reports of a machine."""

from __future__ import annotations

from pathlib import Path

from adapterhub.training import machine


def test_a_processor_is_fast_by_its_flags(tmp_path: Path) -> None:
    assert not machine.multiplies_bfloat16_fast(tmp_path)
    (tmp_path / "proc").mkdir()
    for flags, is_fast in (("fpu avx2 avx512f", False), ("fpu avx512f avx512_bf16 sse", True), ("amx_bf16", True)):
        (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n")
        assert machine.multiplies_bfloat16_fast(tmp_path) is is_fast


def test_free_memory_is_the_least_of_the_machine_and_the_control_group(tmp_path: Path) -> None:
    assert machine.free_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9 kB\nMemAvailable:      5000 kB\n")
    assert machine.free_memory(tmp_path) == 5_120_000
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert machine.free_memory(tmp_path) == 5_120_000
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("2500000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 400000\n")
    assert machine.free_memory(tmp_path) == 900_000


def test_cores_are_busy_where_threads_wait_for_them(tmp_path: Path) -> None:
    assert not machine.cores_are_busy(tmp_path)
    (tmp_path / "proc/pressure").mkdir(parents=True)
    for share, busy in (("0.00", False), ("9.12", False), ("55.20", True)):
        lines = f"some avg10={share} avg60=99.00 avg300=0.00 total=1\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n"
        (tmp_path / "proc/pressure/cpu").write_text(lines)
        assert machine.cores_are_busy(tmp_path) is busy
