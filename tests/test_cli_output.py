"""Tables and readable sizes."""

from homer_triton.cli.output import readable_bytes, readable_flops, table


def test_table_aligns_its_columns() -> None:
    lines = table(["name", "n"], [["a", "1,000"], ["longer", "2"]]).splitlines()
    assert lines == ["name        n", "──────  ─────", "a       1,000", "longer      2"]


def test_readable_sizes() -> None:
    assert [readable_bytes(n) for n in (0, 1023, 1536, 3 << 30, 5 << 60)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
        "5120.0 PiB",
    ]
    assert [readable_flops(n) for n in (999, 2_000_000_000)] == ["999 FLOP", "2.0 GFLOP"]
